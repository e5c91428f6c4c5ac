// Many rows: out = init + in w in tiles of 128 columns on the matrix unit, the accumulators starting at
// `init`. Tiles of `in` and of float weights come through a ring of asynchronous copies; codes, and
// weights whose rows are not 16-byte aligned, are decoded on their way into the same ring.

#ifndef SKIPCAT_PREFILL_CUH
#define SKIPCAT_PREFILL_CUH

#include "weights.cuh"

namespace skipcat
{

constexpr int kTileColumns = 128;
constexpr int kTileDepth = 32;
constexpr int kTileThreads = 256;
constexpr int kRing = 4;
// Padding that spreads the rows of a matrix load over all banks.
constexpr int kInStride = kTileDepth + 8;
constexpr int kWeightStride = kTileColumns + 8;

template <typename T>
struct PrefillArguments
{
    T const* in;   // [rows, inStride], 16-byte aligned rows; x itself where inputs are gathered
    T const* init; // null or [rows, initStride]
    T* out;        // [rows, outStride]
    Matrix w;
    int rows;
    int inStride;
    int initStride;
    int outStride;
    int32_t const* index{nullptr}; // order of the columns of x, where inputs are gathered; or null
};

__host__ __device__ constexpr int prefillStageNumbers(int tileRows)
{
    return tileRows * kInStride + kTileDepth * kWeightStride;
}

__host__ __device__ constexpr size_t prefillSharedBytes(int tileRows, int ring = kRing)
{
    return static_cast<size_t>(ring) * prefillStageNumbers(tileRows) * 2;
}

__device__ __forceinline__ int bytesInside(int from, int end)
{
    int const left = end - from;
    return left <= 0 ? 0 : (left >= 8 ? 16 : 2 * left);
}

template <typename T, int TILE_ROWS>
__device__ __forceinline__ void fetchInputs(PrefillArguments<T> const& p, T* to, int top, int k)
{
    constexpr int kChunks = TILE_ROWS * kTileDepth / 8;
#pragma unroll
    for (int i = 0; i < (kChunks + kTileThreads - 1) / kTileThreads; ++i)
    {
        int const chunk = i * kTileThreads + static_cast<int>(threadIdx.x);
        int const row = chunk / (kTileDepth / 8);
        int const column = chunk % (kTileDepth / 8) * 8;
        if (row < TILE_ROWS)
        {
            int const bytes = top + row < p.rows ? bytesInside(k + column, p.w.rows) : 0;
            T const* const from = p.in + static_cast<int64_t>(top + row) * p.inStride + k + column;
            copyAsync16(to + row * kInStride + column, bytes > 0 ? from : p.in, bytes);
        }
    }
}

// Column of x that stands at `place` of the ordered x.
template <typename T>
__device__ __forceinline__ int64_t columnOf(PrefillArguments<T> const& p, int place)
{
    return p.index != nullptr ? p.index[place] : place;
}

// The same number by number, in order: for an x that is indexed, or whose rows or halves are not aligned.
template <typename T, int TILE_ROWS>
__device__ __forceinline__ void gatherInputs(PrefillArguments<T> const& p, T* to, int top, int k)
{
    int const first = p.init != nullptr ? p.w.columns : 0;
    for (int i = static_cast<int>(threadIdx.x); i < TILE_ROWS * kTileDepth; i += kTileThreads)
    {
        int const row = i / kTileDepth;
        int const column = i % kTileDepth;
        T value;
        fromFloat(0.0f, value);
        if (top + row < p.rows && k + column < p.w.rows)
        {
            value = p.in[static_cast<int64_t>(top + row) * p.inStride + columnOf(p, first + k + column)];
        }
        to[row * kInStride + column] = value;
    }
}

template <typename T>
__device__ __forceinline__ T decoded(Matrix const& w, int row, int column, WeightType type)
{
    T value;
    if (type == WeightType::kFloat)
    {
        return static_cast<T const*>(w.codes)[static_cast<int64_t>(row) * w.columns + column];
    }
    int code;
    if (type == WeightType::kInt8)
    {
        code = static_cast<int8_t const*>(w.codes)[static_cast<int64_t>(row) * w.columns + column];
    }
    else
    {
        int64_t const stride = (w.columns + 1) / 2;
        uint8_t const both = static_cast<uint8_t const*>(w.codes)[row * stride + column / 2];
        code = ((column % 2 == 0 ? both & 15 : both >> 4) ^ 8) - 8;
    }
    T const scale = static_cast<T const*>(w.scale)[static_cast<int64_t>(row / w.groupSize) * w.columns + column];
    fromFloat(static_cast<float>(code) * toFloat(scale), value);
    return value;
}

template <typename T, WeightType W, bool VECTOR>
__device__ __forceinline__ void fetchWeights(PrefillArguments<T> const& p, T* to, int left, int k)
{
    constexpr int kChunks = kTileDepth * kTileColumns / 8;
#pragma unroll
    for (int i = 0; i < kChunks / kTileThreads; ++i)
    {
        int const chunk = i * kTileThreads + static_cast<int>(threadIdx.x);
        int const row = chunk / (kTileColumns / 8);
        int const column = chunk % (kTileColumns / 8) * 8;
        if constexpr (VECTOR && W == WeightType::kFloat)
        {
            int const bytes = k + row < p.w.rows ? bytesInside(left + column, p.w.columns) : 0;
            T const* const weights = static_cast<T const*>(p.w.codes);
            T const* const from = weights + static_cast<int64_t>(k + row) * p.w.columns + left + column;
            copyAsync16(to + row * kWeightStride + column, bytes > 0 ? from : weights, bytes);
        }
        else
        {
#pragma unroll
            for (int c = 0; c < 8; ++c)
            {
                T value;
                fromFloat(0.0f, value);
                if (k + row < p.w.rows && left + column + c < p.w.columns)
                {
                    value = decoded<T>(p.w, k + row, left + column + c, W);
                }
                to[row * kWeightStride + column + c] = value;
            }
        }
    }
}

// Warps side by side: each takes kWarpRows x kWarpColumns of the tile.
template <int TILE_ROWS>
struct Shape
{
    static constexpr int kWarpsDown = TILE_ROWS / 32 < 2 ? 1 : 2;
    static constexpr int kWarpsAcross = kTileThreads / 32 / kWarpsDown;
    static constexpr int kWarpRows = TILE_ROWS / kWarpsDown;
    static constexpr int kWarpColumns = kTileColumns / kWarpsAcross;
    static constexpr int kDown = kWarpRows / 16;
    static constexpr int kAcross = kWarpColumns / 8;
};

template <typename T, int TILE_ROWS>
__device__ __forceinline__ void multiplyTile(
    float (&sums)[Shape<TILE_ROWS>::kDown][Shape<TILE_ROWS>::kAcross][4], T const* in, T const* weights, int lane)
{
    using S = Shape<TILE_ROWS>;
#pragma unroll
    for (int k = 0; k < kTileDepth; k += 16)
    {
        uint32_t left[S::kDown][4];
        uint32_t right[S::kAcross / 2][4];
#pragma unroll
        for (int i = 0; i < S::kDown; ++i)
        {
            loadMatrices(left[i], in + (16 * i + lane % 16) * kInStride + k + lane / 16 * 8);
        }
#pragma unroll
        for (int j = 0; j < S::kAcross / 2; ++j)
        {
            loadTransposed(right[j], weights + (k + lane % 16) * kWeightStride + 16 * j + lane / 16 * 8);
        }
#pragma unroll
        for (int i = 0; i < S::kDown; ++i)
        {
#pragma unroll
            for (int j = 0; j < S::kAcross; ++j)
            {
                multiply(T{}, sums[i][j], left[i][0], left[i][1], left[i][2], left[i][3], right[j / 2][j % 2 * 2],
                    right[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

// Calls visit(row, column, pair) for each two neighbouring columns that this thread holds sums of and the
// matrix has, the second of them perhaps not.
template <typename T, int TILE_ROWS, typename Visit>
__device__ __forceinline__ void eachPair(PrefillArguments<T> const& p,
    float (&sums)[Shape<TILE_ROWS>::kDown][Shape<TILE_ROWS>::kAcross][4], int top, int left, int lane, Visit visit)
{
    using S = Shape<TILE_ROWS>;
#pragma unroll
    for (int i = 0; i < S::kDown; ++i)
    {
#pragma unroll
        for (int j = 0; j < S::kAcross; ++j)
        {
#pragma unroll
            for (int half = 0; half < 2; ++half)
            {
                int const row = top + 16 * i + lane / 4 + 8 * half;
                int const column = left + 8 * j + lane % 4 * 2;
                if (row < p.rows && column < p.w.columns)
                {
                    visit(row, column, &sums[i][j][2 * half]);
                }
            }
        }
    }
}

// Both in one store where that is aligned: `out` is, and `column` is even.
template <typename T>
__device__ __forceinline__ void storePair(PrefillArguments<T> const& p, int row, int column, float const* pair)
{
    T* const to = p.out + static_cast<int64_t>(row) * p.outStride + column;
    T both[2];
    fromFloat(pair[0], both[0]);
    fromFloat(pair[1], both[1]);
    if (p.outStride % 2 == 0 && column + 1 < p.w.columns)
    {
        *reinterpret_cast<uint32_t*>(to) = reinterpret_cast<uint32_t const&>(both);
        return;
    }
    to[0] = both[0];
    if (column + 1 < p.w.columns)
    {
        to[1] = both[1];
    }
}

// One tile of the results. RING stages of copies; GATHER takes x number by number (gatherInputs).
template <typename T, WeightType W, bool VECTOR, int TILE_ROWS, int RING, bool GATHER>
__device__ __forceinline__ void prefillTile(PrefillArguments<T> const& p)
{
    using S = Shape<TILE_ROWS>;
    T* const ring = reinterpret_cast<T*>(sharedMemory());
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const warp = static_cast<int>(threadIdx.x) / 32;
    int const top = static_cast<int>(blockIdx.x) * TILE_ROWS;
    int const left = static_cast<int>(blockIdx.y) * kTileColumns;
    int const warpTop = warp % S::kWarpsDown * S::kWarpRows;
    int const warpLeft = warp / S::kWarpsDown * S::kWarpColumns;
    int const steps = (p.w.rows + kTileDepth - 1) / kTileDepth;
    auto const fetch = [&](int step)
    {
        if (step < steps)
        {
            T* const stage = ring + step % RING * prefillStageNumbers(TILE_ROWS);
            if constexpr (GATHER)
            {
                gatherInputs<T, TILE_ROWS>(p, stage, top, step * kTileDepth);
            }
            else
            {
                fetchInputs<T, TILE_ROWS>(p, stage, top, step * kTileDepth);
            }
            fetchWeights<T, W, VECTOR>(p, stage + TILE_ROWS * kInStride, left, step * kTileDepth);
        }
        closeCopies();
    };
    for (int step = 0; step < RING - 1; ++step)
    {
        fetch(step);
    }
    float sums[S::kDown][S::kAcross][4] = {};
    if (p.init != nullptr)
    {
        eachPair<T, TILE_ROWS>(p, sums, top + warpTop, left + warpLeft, lane,
            [&](int row, int column, float* pair)
            {
                T const* const from = p.init + static_cast<int64_t>(row) * p.initStride;
                auto const place = [&](int j) { return GATHER ? columnOf(p, j) : static_cast<int64_t>(j); };
                pair[0] = toFloat(from[place(column)]);
                pair[1] = column + 1 < p.w.columns ? toFloat(from[place(column + 1)]) : 0.0f;
            });
    }
    for (int step = 0; step < steps; ++step)
    {
        awaitCopies<RING - 2>();
        __syncthreads();
        fetch(step + RING - 1);
        T const* const stage = ring + step % RING * prefillStageNumbers(TILE_ROWS);
        multiplyTile<T, TILE_ROWS>(
            sums, stage + warpTop * kInStride, stage + TILE_ROWS * kInStride + warpLeft, lane);
    }
    eachPair<T, TILE_ROWS>(p, sums, top + warpTop, left + warpLeft, lane,
        [&](int row, int column, float* pair) { storePair(p, row, column, pair); });
}

template <typename T, WeightType W, bool VECTOR, int TILE_ROWS>
__global__ void __launch_bounds__(kTileThreads) prefillProduct(PrefillArguments<T> p)
{
    prefillTile<T, W, VECTOR, TILE_ROWS, kRing, false>(p);
}

// x[..., index] in two aligned halves, so that tiles of either can be copied 16 bytes at a time.
template <typename T>
struct GatherArguments
{
    T const* x;
    int32_t const* index; // or null
    T* first;
    T* second;
    int n;
    int rank;
    int firstStride;
    int secondStride;
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads) gather(GatherArguments<T> p)
{
    int64_t const row = blockIdx.x;
    for (int j = static_cast<int>(threadIdx.x); j < p.n; j += kTileThreads)
    {
        T const value = p.x[row * p.n + (p.index != nullptr ? p.index[j] : j)];
        if (j < p.rank)
        {
            p.first[row * p.firstStride + j] = value;
        }
        else
        {
            p.second[row * p.secondStride + j - p.rank] = value;
        }
    }
}

} // namespace skipcat

#endif
