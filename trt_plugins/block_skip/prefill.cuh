// Many rows: out = init + in w in tiles of 128 columns on the matrix unit, the accumulators starting at
// `init`. Tiles of `in` and of float weights come through a ring of asynchronous copies; codes are read into
// registers while a stage is multiplied, and decoded into the same ring after it; weights whose rows are not
// aligned are read number by number.

#ifndef SKIPCAT_PREFILL_CUH
#define SKIPCAT_PREFILL_CUH

#include "prefill_weights.cuh"

namespace skipcat
{

__host__ __device__ constexpr int prefillStageNumbers(int tileRows)
{
    return tileRows * kInStride + kTileDepth * kWeightStride;
}

__host__ __device__ constexpr size_t prefillSharedBytes(int tileRows, int ring = kRing)
{
    return static_cast<size_t>(ring) * prefillStageNumbers(tileRows) * 2;
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
    int const lane = static_cast<int>(threadIdx.x % 32);
    int const warp = static_cast<int>(threadIdx.x / 32);
    int const top = static_cast<int>(blockIdx.x) * TILE_ROWS;
    int const left = static_cast<int>(blockIdx.y) * kTileColumns;
    int const warpTop = warp % S::kWarpsDown * S::kWarpRows;
    int const warpLeft = warp / S::kWarpsDown * S::kWarpColumns;
    int const steps = (p.w.rows + kTileDepth - 1) / kTileDepth;
    constexpr bool kCodes = VECTOR && W != WeightType::kFloat;
    RowCodes<T, kCodes ? W : WeightType::kInt4> codes; // of kCodes alone
    auto const stageOf = [&](int step) { return ring + step % RING * prefillStageNumbers(TILE_ROWS); };
    auto const fetch = [&](int step)
    {
        if (step < steps)
        {
            if constexpr (GATHER)
            {
                gatherInputs<T, TILE_ROWS>(p, stageOf(step), top, step * kTileDepth);
            }
            else
            {
                fetchInputs<T, TILE_ROWS>(p, stageOf(step), top, step * kTileDepth);
            }
            if constexpr (kCodes)
            {
                codes.load(p.w, left, step * kTileDepth);
            }
            else
            {
                fetchWeights<T, W, VECTOR>(p, stageOf(step) + TILE_ROWS * kInStride, left, step * kTileDepth);
            }
        }
        closeCopies();
    };
    auto const decode = [&](int step)
    {
        if (kCodes && step < steps)
        {
            codes.store(stageOf(step) + TILE_ROWS * kInStride);
        }
    };
    for (int step = 0; step < RING - 1; ++step)
    {
        fetch(step);
        decode(step);
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
        T const* const stage = stageOf(step);
        multiplyTile<T, TILE_ROWS>(
            sums, stage + warpTop * kInStride, stage + TILE_ROWS * kInStride + warpLeft, lane);
        decode(step + RING - 1);
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
