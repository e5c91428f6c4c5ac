// Warps that walk the cache on their own: how a call is cut, and where a block keeps what in shared memory.
//
// A block has 8, 16 or 32 rows of queries that share a head of keys and a group of values. Its four warps have
// tokens of their own, 16 or 32 at a time, and rings of stages that copies fill in the background; they meet at the
// end. A block takes every so-many-th tile of the context, so that what a mask closes is shared out evenly.

#ifndef SKIPCAT_LATENT_WALK_LAYOUT_CUH
#define SKIPCAT_LATENT_WALK_LAYOUT_CUH

#include "lanes.cuh"
#include "stage.cuh"

namespace skipcat::latent
{

constexpr int kWarps = 4;
constexpr int kWalkThreads = 32 * kWarps;
constexpr int kUnit = 32;         // bytes of a token that are loaded as one fragment
constexpr int kPairs = 32;        // of a rebuilt key, made at once
constexpr int kMostStages = 4;
constexpr int kJoinWarps = 8;

struct WalkLayout
{
    int pairs;                             // of a rebuilt key, filled up; 0 where keys are as cached
    int columns;                           // of a staged query, in the order of the keys' fragments
    int queryStride, upStride;             // numbers
    int keyStride, valueStride;            // bytes of a token in a stage
    int valuesAt, keyStepsAt, valueStepsAt; // in a stage
    int stageBytes;                        // of a warp
    int query, turned, up, turns, mean, ring, bytes;
};

struct WalkArguments
{
    Problem problem;
    Pointers pointers;
    float* shares;  // [rows of blocks, splits, rows, rank of the values]
    float* maximum; // [rows of blocks, splits, rows]
    float* total;   // likewise
    int units;      // groups of heads that share keys and values
    int rowTiles;
    int rows; // of a block: 8, 16 or 32
    int splits;
    int slices; // of the values
    int stages;
    WalkLayout at;
};

template <Form FORM>
struct FormOf
{
    static constexpr Form value = FORM;
};

// Calls `use` with the form as a type.
template <typename Use>
__device__ __forceinline__ void withForm(Form form, Use use)
{
    switch (form)
    {
    case Form::kNumbers: return use(FormOf<Form::kNumbers>{});
    case Form::kBytes: return use(FormOf<Form::kBytes>{});
    case Form::kNibbles: return use(FormOf<Form::kNibbles>{});
    }
}

__host__ __device__ constexpr int stepsPerUnit(Form form)
{
    return form == Form::kNumbers ? 1 : form == Form::kBytes ? 2 : 4;
}

__host__ __device__ inline int bytesOf(Side const& side)
{
    return side.form == Form::kNumbers ? 2 * side.held : side.held;
}

__host__ __device__ inline int unitsIn(Side const& side)
{
    return (bytesOf(side) + kUnit - 1) / kUnit;
}

// Fragments of 16 values that a warp sums up for 8, 16 or 32 rows: in registers, of which rebuilt keys take many.
__host__ __device__ constexpr int fragmentsOf(int rows, bool rebuilt)
{
    return (rebuilt && rows < 32 ? 64 : 128) / rows;
}

// 32-byte units of the values that a block sums up.
__host__ __device__ inline int unitsPerSlice(Side const& values, int rows, bool rebuilt)
{
    return fragmentsOf(rows, rebuilt) / stepsPerUnit(values.form);
}

// Rows that begin so far apart are loaded as matrices without two on one bank: an odd number of 16 bytes.
__host__ __device__ inline int oddStride(int bytes)
{
    int const chunks = (bytes + 15) / 16;
    return 16 * (chunks + (chunks % 2 == 0 ? 1 : 0));
}

__host__ __device__ inline WalkLayout walkLayoutOf(Problem const& p, int rows, int tokens, int stages)
{
    WalkLayout at{};
    bool const rebuilt = p.headsPerGroup > 0;
    int const keyColumns = 16 * stepsPerUnit(p.keys.form) * unitsIn(p.keys);
    int const sliceBytes = kUnit * unitsPerSlice(p.values, rows, rebuilt);
    int const valueBytes = bytesOf(p.values) < sliceBytes ? bytesOf(p.values) : sliceBytes;
    at.pairs = rebuilt ? (p.width / 2 + kPairs - 1) / kPairs * kPairs : 0;
    at.columns = rebuilt ? 2 * at.pairs : keyColumns;
    at.queryStride = at.columns + 8;
    at.upStride = 2 * at.pairs + 8;
    // Half a unit of keys is filled up by zeros, as no number times a query's zero would not be zero.
    at.keyStride = oddStride(bytesOf(p.keys) + bytesOf(p.keys) % kUnit);
    at.valueStride = oddStride(valueBytes);
    at.valuesAt = tokens * at.keyStride;
    at.keyStepsAt = at.valuesAt + tokens * at.valueStride;
    at.valueStepsAt = at.keyStepsAt + (p.keys.form == Form::kNumbers ? 0 : 4 * tokens);
    at.stageBytes = at.valueStepsAt + (p.values.form == Form::kNumbers ? 0 : 4 * tokens);
    at.query = 0;
    at.turned = at.query + rows * at.queryStride * 2;
    at.up = at.turned + (rebuilt ? kWarps * rows * at.queryStride * 2 : 0);
    at.turns = at.up + (rebuilt ? keyColumns * at.upStride * 2 : 0);
    at.mean = at.turns + (rebuilt ? tokens * (at.pairs + 8) * 4 : 0);
    at.ring = at.mean + 2 * at.pairs * 4;
    // A row's last unit may be half its own. What the warps found is laid where the ring was.
    int const ring = kWarps * stages * at.stageBytes + 16;
    int const found = kWarps * rows * (16 * fragmentsOf(rows, rebuilt) + 2) * 4;
    at.bytes = at.ring + (ring > found ? ring : found);
    return at;
}

// The number that a column of a staged query, or a row of a staged map, stands for, as keys' fragments have them;
// -1 where there is none.
__device__ __forceinline__ int numberOfColumn(int column, int held, Form form)
{
    if (form == Form::kNumbers)
    {
        return column < held ? column : -1;
    }
    int const within = 4 * (column % 8 / 2) + 2 * (column % 2);
    int const upper = column % 16 / 8;
    if (form == Form::kBytes)
    {
        int const byte = column / 16 * 16 + within + upper;
        return byte < held ? byte : -1;
    }
    int const byte = column / 32 * 16 + within + column / 16 % 2;
    return byte < held ? byte + upper * held : -1;
}

} // namespace skipcat::latent

#endif
