// One product of the layer as one launch with plain arguments, which TensorRT can embed in an engine.
//
//     mix:      out = x1 + x2 w,  [x1 x2] = in[..., index],  in [rows, columns + reduction]
//     product:  out = in w,                                  in [rows, reduction]
//
// w [reduction, columns] and out [rows, columns]. An embedded kernel has neither scratch memory nor
// counters, so a block takes all of the reduction; and at most 48 KB of shared memory, more of which has
// to be asked for.

#ifndef SKIPCAT_AOT_CUH
#define SKIPCAT_AOT_CUH

#include "decode.cuh"
#include "prefill.cuh"

namespace skipcat
{

// Numbers of `in` that are staged at once: slices of 1920 for 8 rows, of 15360 for one.
constexpr int kAotStaged = kDecodeRows * (1920 + 4);
constexpr int kAotDecodeSharedBytes = 2 * kAotStaged + 16;
static_assert(decodeSharedBytes<WeightType::kFloat>(kDecodeRows, 1920) == kAotDecodeSharedBytes);

// Stages of the ring that fit into 48 KB.
template <int TILE_ROWS>
__host__ __device__ constexpr int aotRing()
{
    return TILE_ROWS <= 32 ? 4 : 3;
}

static_assert(prefillSharedBytes(32, aotRing<32>()) <= 48 * 1024 && prefillSharedBytes(64, aotRing<64>()) <= 48 * 1024);

// Grid: tiles of 64 columns, groups of 8 rows.
template <typename T, bool MIX, bool VECTOR>
__device__ __forceinline__ void aotDecode(
    T const* in, T const* w, int32_t const* index, int rows, int reduction, int columns, T* out)
{
    int const top = static_cast<int>(blockIdx.y) * kDecodeRows;
    DecodeArguments<T> p{};
    p.inStride = MIX ? columns + reduction : reduction;
    p.outStride = columns;
    p.in = in + static_cast<int64_t>(top) * p.inStride;
    p.init = MIX ? p.in : nullptr;
    p.index = index;
    p.out = out + static_cast<int64_t>(top) * columns;
    p.w = {w, nullptr, reduction, columns, 0};
    p.rows = rows - top < kDecodeRows ? rows - top : kDecodeRows;
    p.slice = (kAotStaged / p.rows - 4) / kRound * kRound;
    unsigned char* const shared = sharedMemory();
    float sums[Weights<T, WeightType::kFloat>::kColumns / 2][4] = {};
    for (int begin = 0; begin < reduction; begin += p.slice)
    {
        int const end = begin + p.slice < reduction ? begin + p.slice : reduction;
        accumulate<T, WeightType::kFloat, VECTOR>(p, sums, reinterpret_cast<T*>(shared), begin, end);
    }
    reduce<T, WeightType::kFloat>(p, sums, shared, 1);
}

// Grid: tiles of TILE_ROWS rows, tiles of 128 columns. GATHER unless rows and halves of `in` are aligned.
template <typename T, bool MIX, bool VECTOR, int TILE_ROWS, bool GATHER>
__device__ __forceinline__ void aotTile(
    T const* in, T const* w, int32_t const* index, int rows, int reduction, int columns, T* out)
{
    int const stride = MIX ? columns + reduction : reduction;
    PrefillArguments<T> const p{MIX && !GATHER ? in + columns : in, MIX ? in : nullptr, out,
        {w, nullptr, reduction, columns, 0}, rows, stride, stride, columns, index};
    prefillTile<T, WeightType::kFloat, VECTOR, TILE_ROWS, aotRing<TILE_ROWS>(), GATHER>(p);
}

// Tactics as aot.py numbers them: rows of a tile, or 8 for decode.
template <typename T, bool MIX, bool VECTOR, int TILE_ROWS, bool GATHER>
__device__ __forceinline__ void aotProduct(
    T const* in, T const* w, int32_t const* index, int rows, int reduction, int columns, T* out)
{
    if constexpr (TILE_ROWS == kDecodeRows)
    {
        aotDecode<T, MIX, VECTOR>(in, w, index, rows, reduction, columns, out);
    }
    else
    {
        aotTile<T, MIX, VECTOR, TILE_ROWS, GATHER>(in, w, index, rows, reduction, columns, out);
    }
}

} // namespace skipcat

#endif
