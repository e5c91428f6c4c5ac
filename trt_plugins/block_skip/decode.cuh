// Few rows (up to 8): out = init + in w, weights of any size and alignment, loaded to registers; stream.cuh
// has what is quicker where rows of w are aligned.
//
// A block owns a tile of columns and a slice of the reduction; its 8 warps take steps of 16 rows in
// turn. The rows of `in` are the 8 columns of the matrix unit's second operand, so one row costs what
// eight cost. Slices of one tile meet in `partial`: the block that comes last, by a counter, adds them
// in order, so that the sum does not depend on who that was.

#ifndef SKIPCAT_DECODE_CUH
#define SKIPCAT_DECODE_CUH

#include "weights.cuh"

namespace skipcat
{

constexpr int kDecodeRows = 8;
constexpr int kDecodeThreads = 256;
constexpr int kDecodeWarps = kDecodeThreads / 32;
constexpr int kStep = 16;
constexpr int kRound = kStep * kDecodeWarps;

template <typename T>
struct DecodeArguments
{
    T const* in;          // [rows, inStride]; x itself where there is an init
    T const* init;        // null, or x: its first w.columns columns are added, `in` is what follows them
    int32_t const* index; // null, or the order of the columns of x
    T* out;               // [rows, outStride]
    float* partial;       // [slices, rows, columns]
    uint32_t* counters;   // one for each tile, zero
    Matrix w;
    int rows;
    int inStride;
    int outStride;
    int slice; // rows of w for each block, a multiple of kRound
};

template <WeightType W>
__host__ __device__ constexpr int decodeTile()
{
    return 8 * Weights<__half, W>::kColumns;
}

// Numbers of one staged row of `in`: no two rows start at the same bank.
__host__ __device__ constexpr int stagedStride(int slice)
{
    return slice + 4;
}

// Bytes of shared memory: the staged inputs, then in their place the warps' sums; and the ticket.
template <WeightType W>
__host__ __device__ constexpr size_t decodeSharedBytes(int rows, int slice)
{
    size_t const staged = static_cast<size_t>(rows) * stagedStride(slice) * 2;
    size_t const sums = static_cast<size_t>(kDecodeWarps) * rows * decodeTile<W>() * 4;
    return (staged > sums ? staged : sums) + 16;
}

// The block's slice of `in`, gathered, and zeros up to a whole step of STEP rows. LOADS of a thread are under way at
// once, first of the index, then of what it names.
template <int STEP, int LOADS, typename T>
__device__ __forceinline__ void stageInputs(DecodeArguments<T> const& p, T* staged, int begin, int end)
{
    int const padded = (end - begin + STEP - 1) / STEP * STEP;
    int const first = (p.init != nullptr ? p.w.columns : 0) + begin;
    for (int top = static_cast<int>(threadIdx.x); top < padded; top += LOADS * kDecodeThreads)
    {
        int column[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
        {
            int const k = top + i * kDecodeThreads;
            column[i] = p.index != nullptr && begin + k < end ? p.index[first + k] : first + k;
        }
        for (int row = 0; row < p.rows; ++row)
        {
            T const* const from = p.in + static_cast<int64_t>(row) * p.inStride;
            T value[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
            {
                fromFloat(0.0f, value[i]);
                if (begin + top + i * kDecodeThreads < end)
                {
                    value[i] = from[column[i]];
                }
            }
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
            {
                if (top + i * kDecodeThreads < padded)
                {
                    staged[row * stagedStride(p.slice) + top + i * kDecodeThreads] = value[i];
                }
            }
        }
    }
}

// What a result starts from: its column of x, or nothing.
template <typename T>
__device__ __forceinline__ float startOf(DecodeArguments<T> const& p, int row, int column)
{
    if (p.init == nullptr)
    {
        return 0.0f;
    }
    int const from = p.index != nullptr ? p.index[column] : column;
    return toFloat(p.init[static_cast<int64_t>(row) * p.inStride + from]);
}

template <typename T>
__device__ __forceinline__ void finish(DecodeArguments<T> const& p, int row, int column, float sum)
{
    fromFloat(sum, p.out[static_cast<int64_t>(row) * p.outStride + column]);
}

// Column C of rows 2P and 2P + 1 as the matrix unit takes them: codes with their scale, or as they are.
template <bool SCALED, int P, int C, typename W>
__device__ __forceinline__ uint32_t operandOf(W const& w)
{
    if constexpr (SCALED)
    {
        return w.template pair<P, C>();
    }
    else
    {
        return w.template codes<P, C>();
    }
}

// One step: 16 rows of w against 16 columns of the staged inputs, 2 columns of w to a product.
template <typename T, bool SCALED, typename W, int PAIR = 0>
__device__ __forceinline__ void multiplyStep(float (&sums)[W::kColumns / 2][4], W const& w, uint2 in)
{
    if constexpr (PAIR < W::kColumns / 2)
    {
        constexpr int kLeft = 2 * PAIR;
        multiply(T{}, sums[PAIR], operandOf<SCALED, 0, kLeft>(w), operandOf<SCALED, 0, kLeft + 1>(w),
            operandOf<SCALED, 1, kLeft>(w), operandOf<SCALED, 1, kLeft + 1>(w), in.x, in.y);
        multiplyStep<T, SCALED, W, PAIR + 1>(sums, w, in);
    }
}

// Sums of the block's warps, for each row and column of the tile: the results, or one of several slices.
template <typename T, WeightType W>
__device__ __forceinline__ void reduce(DecodeArguments<T> const& p,
    float const (&sums)[Weights<T, W>::kColumns / 2][4], unsigned char* shared, int slices)
{
    constexpr int kTile = decodeTile<W>();
    constexpr int kColumns = Weights<T, W>::kColumns;
    float* const warps = reinterpret_cast<float*>(shared);
    int const thread = static_cast<int>(threadIdx.x);
    int const lane = static_cast<int>(threadIdx.x % 32);
    int const warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i)
    {
#pragma unroll
        for (int e = 0; e < 4; ++e)
        {
            int const row = 2 * (lane % 4) + e % 2;
            if (row < p.rows)
            {
                warps[(warp * p.rows + row) * kTile + kColumns * (lane / 4) + 2 * i + e / 2] = sums[i][e];
            }
        }
    }
    __syncthreads();
    int const left = static_cast<int>(blockIdx.x) * kTile;
    for (int o = thread; o < p.rows * kTile; o += kDecodeThreads)
    {
        int const row = o / kTile;
        int const column = left + o % kTile;
        float sum = 0.0f;
        for (int i = 0; i < kDecodeWarps; ++i)
        {
            sum += warps[i * p.rows * kTile + o];
        }
        if (column < p.w.columns && slices == 1)
        {
            finish(p, row, column, sum + startOf(p, row, column));
        }
        else if (column < p.w.columns)
        {
            p.partial[(static_cast<int64_t>(blockIdx.y) * p.rows + row) * p.w.columns + column] = sum;
        }
    }
}

// The last block of a tile adds the slices and leaves the counter at zero.
template <typename T, WeightType W>
__device__ __forceinline__ void addSlices(DecodeArguments<T> const& p, unsigned* ticket)
{
    constexpr int kTile = decodeTile<W>();
    int const thread = static_cast<int>(threadIdx.x);
    int const slices = static_cast<int>(gridDim.y);
    __threadfence();
    __syncthreads();
    if (thread == 0)
    {
        *ticket = atomicAdd(p.counters + blockIdx.x, 1u);
    }
    __syncthreads();
    if (*ticket != static_cast<unsigned>(slices - 1))
    {
        return;
    }
    __threadfence();
    for (int o = thread; o < p.rows * kTile; o += kDecodeThreads)
    {
        int const row = o / kTile;
        int const column = static_cast<int>(blockIdx.x) * kTile + o % kTile;
        if (column < p.w.columns)
        {
            float sum = 0.0f;
            for (int s = 0; s < slices; ++s)
            {
                sum += loadShared(p.partial + (static_cast<int64_t>(s) * p.rows + row) * p.w.columns + column);
            }
            finish(p, row, column, sum + startOf(p, row, column));
        }
    }
    if (thread == 0)
    {
        p.counters[blockIdx.x] = 0;
    }
}

// sums += rows [begin, end) of w, for the thread's columns, against the same part of `in`. Loads the first
// weights, then stages the inputs, then goes on: p.slice or fewer rows.
template <typename T, WeightType W, bool VECTOR>
__device__ __forceinline__ void accumulate(
    DecodeArguments<T> const& p, float (&sums)[Weights<T, W>::kColumns / 2][4], T* staged, int begin, int end)
{
    // Steps of each warp that are under way at once; as many as the registers of two blocks hold.
    constexpr int kDepth = VECTOR ? 3 : 1;
    int const lane = static_cast<int>(threadIdx.x % 32);
    int const warp = static_cast<int>(threadIdx.x / 32);
    int const column = static_cast<int>(blockIdx.x) * decodeTile<W>() + Weights<T, W>::kColumns * (lane / 4);
    Weights<T, W> ahead[kDepth];
    int const first = begin + warp * kStep;
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
    {
        if (first + d * kRound < end)
        {
            ahead[d].template load<VECTOR>(p.w, first + d * kRound + 4 * (lane % 4), end, column);
        }
    }
    awaitPrevious();
    stageInputs<kStep, 4>(p, staged, begin, end);
    __syncthreads();

    T const* const mine = staged + (lane / 4) * stagedStride(p.slice) + 4 * (lane % 4) - begin;
    for (int base = first; base < end; base += kDepth * kRound)
    {
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
        {
            int const k = base + d * kRound;
            if (k < end)
            {
                uint2 const in = lane / 4 < p.rows ? *reinterpret_cast<uint2 const*>(mine + k) : uint2{0, 0};
                multiplyStep<T, true>(sums, ahead[d], in);
            }
            int const next = k + kDepth * kRound;
            if (next < end)
            {
                ahead[d].template load<VECTOR>(p.w, next + 4 * (lane % 4), end, column);
            }
        }
    }
    // The staged inputs may be written over now.
    __syncthreads();
}

template <typename T, WeightType W>
__global__ void __launch_bounds__(kDecodeThreads, 2) decodeProduct(DecodeArguments<T> p)
{
    unsigned char* const shared = sharedMemory();
    int const begin = static_cast<int>(blockIdx.y) * p.slice;
    int const end = begin + p.slice < p.w.rows ? begin + p.slice : p.w.rows;
    releaseNext();
    float sums[Weights<T, W>::kColumns / 2][4] = {};
    accumulate<T, W, false>(p, sums, reinterpret_cast<T*>(shared), begin, end);
    reduce<T, W>(p, sums, shared, static_cast<int>(gridDim.y));
    if (gridDim.y > 1)
    {
        addSlices<T, W>(p, reinterpret_cast<unsigned*>(shared + decodeSharedBytes<W>(p.rows, p.slice) - 16));
    }
}

} // namespace skipcat

#endif
