// Weights of a tile on their way into the ring of prefill.cuh.

#ifndef SKIPCAT_PREFILL_WEIGHTS_CUH
#define SKIPCAT_PREFILL_WEIGHTS_CUH

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

__device__ __forceinline__ int bytesInside(int from, int end)
{
    int const left = end - from;
    return left <= 0 ? 0 : (left >= 8 ? 16 : 2 * left);
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

// Codes of a row's 16 columns, from where they are read until they are numbers in the ring: the rows of a thread's
// stages are a stage apart, so that scales are read where a group begins.
template <typename T, WeightType W>
struct RowCodes
{
    static constexpr int kWords = W == WeightType::kInt8 ? 4 : 2;
    uint32_t word[kWords];
    Scales<T> scales;
    int group{-1};

    // This thread's part of the stage at row k of w and column `left`.
    __device__ __forceinline__ void load(Matrix const& w, int left, int k)
    {
        int const row = k + static_cast<int>(threadIdx.x / 8);
        int const column = left + static_cast<int>(threadIdx.x % 8) * 16;
        bool const inside = row < w.rows && column < w.columns;
        int64_t const at = static_cast<int64_t>(row) * w.columns + column;
        unsigned char const* const codes = static_cast<unsigned char const*>(w.codes);
        if constexpr (W == WeightType::kInt8)
        {
            uint4 const value = inside ? loadOnce16(codes + at) : uint4{0, 0, 0, 0};
            word[0] = value.x, word[1] = value.y, word[2] = value.z, word[3] = value.w;
        }
        else
        {
            uint2 const value = inside ? loadOnce8(codes + at / 2) : uint2{0, 0};
            word[0] = value.x, word[1] = value.y;
        }
        int const now = row / w.groupSize;
        if (now != group)
        {
            group = now;
            scales.template load<true>(w, row, w.rows, column);
        }
    }

    // Eight numbers in their order, as four registers.
    template <int EIGHT>
    __device__ __forceinline__ uint4 numbers() const
    {
        uint32_t pairs[4];
        if constexpr (W == WeightType::kInt8)
        {
            uint32_t const low = word[2 * EIGHT] ^ 0x80808080u;
            uint32_t const high = word[2 * EIGHT + 1] ^ 0x80808080u;
            pairs[0] = fromBytes<0>(T{}, low), pairs[1] = fromBytes<1>(T{}, low);
            pairs[2] = fromBytes<0>(T{}, high), pairs[3] = fromBytes<1>(T{}, high);
        }
        else
        {
            uint32_t const far[4] = {fromNibbles<0>(T{}, word[EIGHT]), fromNibbles<1>(T{}, word[EIGHT]),
                fromNibbles<2>(T{}, word[EIGHT]), fromNibbles<3>(T{}, word[EIGHT])};
            pairs[0] = permute<0x5410>(far[0], far[1]), pairs[1] = permute<0x5410>(far[2], far[3]);
            pairs[2] = permute<0x7632>(far[0], far[1]), pairs[3] = permute<0x7632>(far[2], far[3]);
        }
        return {scaled(T{}, pairs[0], scales.word[4 * EIGHT]), scaled(T{}, pairs[1], scales.word[4 * EIGHT + 1]),
            scaled(T{}, pairs[2], scales.word[4 * EIGHT + 2]), scaled(T{}, pairs[3], scales.word[4 * EIGHT + 3])};
    }

    __device__ __forceinline__ void store(T* to) const
    {
        T* const place = to + static_cast<int>(threadIdx.x / 8) * kWeightStride + static_cast<int>(threadIdx.x % 8) * 16;
        reinterpret_cast<uint4*>(place)[0] = numbers<0>();
        reinterpret_cast<uint4*>(place)[1] = numbers<1>();
    }
};

static_assert(kTileThreads * 16 == kTileDepth * kTileColumns, "every thread has 16 columns of one row");

} // namespace skipcat

#endif
