// Sums of a thread's columns over stages of stream.cuh. Those of codes are kept for each group of rows, and multiplied
// by its scale where the group ends.

#ifndef SKIPCAT_SUMS_CUH
#define SKIPCAT_SUMS_CUH

#include "decode.cuh"

namespace skipcat
{

// The lane's four of 16 rows of a stage, from the ring.
template <typename T, WeightType W>
__device__ __forceinline__ void takeRows(Weights<T, W>& weights, unsigned char const* from)
{
    int const lane = static_cast<int>(threadIdx.x % 32);
    int const group = lane / 4;
    int const turn = lane % 4;
    if constexpr (W == WeightType::kInt4)
    {
        int const start = turn * 256 + (group * 8 ^ turn * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            uint2 const value = *reinterpret_cast<uint2 const*>(from + (start ^ i % 2 * 64) + i / 2 * 128);
            weights.word[i][0] = value.x, weights.word[i][1] = value.y;
        }
    }
    else
    {
        int const start = turn * 512 + (group * 16 ^ turn * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            uint4 const value = *reinterpret_cast<uint4 const*>(from + start + i * 128);
            weights.word[i][0] = value.x, weights.word[i][1] = value.y;
            weights.word[i][2] = value.z, weights.word[i][3] = value.w;
        }
    }
}

// Sums of a thread's columns; of codes also those of the group that is under way, and its scales.
template <typename T, WeightType W>
struct Sums
{
    static constexpr int kPairs = Weights<T, W>::kColumns / 2;
    float total[kPairs][4];
    float group[W == WeightType::kFloat ? 1 : kPairs][4];
    Scales<T> scales;

    __device__ __forceinline__ void add(Weights<T, W> const& weights, uint2 in)
    {
        if constexpr (W == WeightType::kFloat)
        {
            multiplyStep<T, true>(total, weights, in);
        }
        else
        {
            multiplyStep<T, false>(group, weights, in);
        }
    }

    // The group that begins here has these scales.
    __device__ __forceinline__ void open(unsigned char const* ofGroup)
    {
        int const lane = static_cast<int>(threadIdx.x % 32);
        uint4 const low = reinterpret_cast<uint4 const*>(ofGroup + lane / 4 * 32)[0];
        uint4 const high = reinterpret_cast<uint4 const*>(ofGroup + lane / 4 * 32)[1];
        scales.word[0] = low.x, scales.word[1] = low.y, scales.word[2] = low.z, scales.word[3] = low.w;
        scales.word[4] = high.x, scales.word[5] = high.y, scales.word[6] = high.z, scales.word[7] = high.w;
    }

    // The group's sums times its scales are part of the total.
    __device__ __forceinline__ void close()
    {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
        {
            float const left = firstOf(T{}, scales.word[i]);
            float const right = secondOf(T{}, scales.word[i]);
#pragma unroll
            for (int e = 0; e < 4; ++e)
            {
                total[i][e] += group[i][e] * (e < 2 ? left : right);
                group[i][e] = 0.0f;
            }
        }
    }
};

} // namespace skipcat

#endif
