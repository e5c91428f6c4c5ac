// From scores to weights, and what the weights make of the values of a stage.

#ifndef SKIPCAT_LATENT_WALK_VALUES_CUH
#define SKIPCAT_LATENT_WALK_VALUES_CUH

#include "walk_keys.cuh"

namespace skipcat::latent
{

constexpr float kLog2e = 1.44269504f;

// What a warp has found of its rows so far: lane 4g + t has rows 2t and 2t + 1 of every 8.
template <int NT, int FRAGMENTS>
struct Found
{
    float maximum[NT][2];
    float total[NT][2];           // over the lane's own tokens
    float sums[FRAGMENTS][NT][4]; // of values g and g + 8 of a fragment
};

// Where the mask's line of each row begins; -1 of rows that are not there.
template <int NT>
__device__ __forceinline__ void findLines(int (&lines)[NT][2], WalkArguments const& p, Place const& at)
{
    int const t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int n = 0; n < NT; ++n)
    {
#pragma unroll
        for (int e = 0; e < 2; ++e)
        {
            int const row = 8 * n + 2 * t + e;
            lines[n][e] = row < at.rows ? queryOf(p.problem, at, p.rows, row).y * p.problem.slots : -1;
        }
    }
}

// The mask of the tokens of a stage; kNothing where it is closed, or there is no token or row. Whether it closes
// a row that is there to a token.
template <typename T, int NT, int MT>
__device__ __forceinline__ bool readMask(
    Scores<NT, MT>& added, int const (&lines)[NT][2], T const* mask, int token, int slots)
{
    bool closed = false;
#pragma unroll
    for (int m = 0; m < MT; ++m)
    {
#pragma unroll
        for (int h = 0; h < 2; ++h)
        {
            int const of = token + 16 * m + 8 * h + static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
            for (int n = 0; n < NT; ++n)
            {
#pragma unroll
                for (int e = 0; e < 2; ++e)
                {
                    bool const is = lines[n][e] >= 0 && of < slots;
                    float const found = is ? toFloat(mask[lines[n][e] + of]) : kNothing;
                    bool const open = found > kClosed;
                    closed = closed || (lines[n][e] >= 0 && !open);
                    added[m][n][2 * h + e] = open ? found : kNothing;
                }
            }
        }
    }
    return closed;
}

// Values, and their steps, of tokens that no row may look at become zero: a weight of zero does not make zero
// of what is no number.
template <int NT, int MT>
__device__ __forceinline__ void clearClosed(
    Scores<NT, MT> const& added, WalkLayout const& at, unsigned char* stage, int chunks, bool steps)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < MT; ++m)
    {
#pragma unroll
        for (int h = 0; h < 2; ++h)
        {
            float largest = kNothing;
#pragma unroll
            for (int n = 0; n < NT; ++n)
            {
                largest = fmaxf(largest, fmaxf(added[m][n][2 * h], added[m][n][2 * h + 1]));
            }
            largest = fmaxf(largest, shuffleXor(largest, 1));
            largest = fmaxf(largest, shuffleXor(largest, 2));
            int const token = 16 * m + 8 * h + lane / 4;
            if (largest > kNothing)
            {
                continue;
            }
            unsigned char* const row = stage + at.valuesAt + token * at.valueStride;
            for (int chunk = lane % 4; chunk < chunks; chunk += 4)
            {
                *reinterpret_cast<uint4*>(row + 16 * chunk) = uint4{0, 0, 0, 0};
            }
            if (steps && lane % 4 == 0)
            {
                *reinterpret_cast<uint32_t*>(stage + at.valueStepsAt + 4 * token) = 0;
            }
        }
    }
    __syncwarp();
}

// Adds the mask to a row's scores; the largest of them, and of what was the largest before.
template <int NT, int MT>
__device__ __forceinline__ float largestScore(
    Scores<NT, MT>& scores, Scores<NT, MT> const& added, float before, int n, int e)
{
    float largest = kNothing;
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i)
    {
        int const at = 2 * (i % 2) + e;
        float const add = added[i / 2][n][at];
        scores[i / 2][n][at] = add > kNothing ? scores[i / 2][n][at] + add : kNothing;
        largest = fmaxf(largest, scores[i / 2][n][at]);
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2)
    {
        largest = fmaxf(largest, shuffleXor(largest, distance));
    }
    return fmaxf(largest, before);
}

// Scores, with the mask's `added`, to weights exp(score - largest so far), rounded, as the second operand of the
// values' product: weights[m][n] of tokens 2t, 2t + 1 and those 8 on, row g. Moves what was found on.
template <typename T, int NT, int MT, int FRAGMENTS>
__device__ __forceinline__ void weigh(uint32_t (&weights)[MT][NT][2], Scores<NT, MT>& scores,
    Scores<NT, MT> const& added, Found<NT, FRAGMENTS>& found)
{
    float factor[NT][2];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2 * NT; ++i)
    {
        float& maximum = found.maximum[i / 2][i % 2];
        float const largest = largestScore<NT, MT>(scores, added, maximum, i / 2, i % 2);
        float const by = powerOf2((maximum - largest) * kLog2e);
        moved = moved || by != 1.0f;
        factor[i / 2][i % 2] = by;
        maximum = largest;
        found.total[i / 2][i % 2] *= by;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
    {
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i)
        {
            float weight[2];
#pragma unroll
            for (int e = 0; e < 2; ++e)
            {
                float const score = scores[i / 2][n][2 * (i % 2) + e];
                T rounded;
                fromFloat(score > kNothing ? powerOf2((score - found.maximum[n][e]) * kLog2e) : 0.0f, rounded);
                weight[e] = toFloat(rounded);
                found.total[n][e] += weight[e];
            }
            weights[i / 2][n][i % 2] = transposed(packed(T{}, weight[0], weight[1]));
        }
    }
    // The largest scores seldom move, once some tokens were seen.
    if (!anyLane(moved))
    {
        return;
    }
#pragma unroll
    for (int i = 0; i < 4 * FRAGMENTS * NT; ++i)
    {
        int const f = i / 4 / NT;
        int const n = i / 4 % NT;
        found.sums[f][n][i % 4] *= factor[n][i % 2];
    }
}

template <typename T, Form FORM, int NT, int MT, int FRAGMENTS>
__device__ __forceinline__ void mixValues(Found<NT, FRAGMENTS>& found, WalkLayout const& at,
    unsigned char const* stage, uint32_t const (&weights)[MT][NT][2], int units)
{
    constexpr int kSteps = stepsPerUnit(FORM);
    int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < MT; ++m)
    {
        Steps steps[2];
        if constexpr (FORM != Form::kNumbers)
        {
            uint32_t const* const words = reinterpret_cast<uint32_t const*>(stage + at.valueStepsAt) + 16 * m;
            int const token = 2 * (lane % 4);
            steps[0] = stepsOf(words[token], words[token + 1]);
            steps[1] = stepsOf(words[token + 8], words[token + 9]);
        }
#pragma unroll
        for (int u = 0; u < FRAGMENTS / kSteps; ++u)
        {
            if (u < units)
            {
                uint32_t unit[4];
                uint32_t a[kSteps][4];
                loadTransposed(
                    unit, stage + at.valuesAt + (16 * m + lane % 16) * at.valueStride + kUnit * u + lane / 16 * 16);
                valueFragments<T, FORM>(a, unit, steps);
#pragma unroll
                for (int k = 0; k < kSteps; ++k)
                {
#pragma unroll
                    for (int n = 0; n < NT; ++n)
                    {
                        multiply(T{}, found.sums[kSteps * u + k][n], a[k][0], a[k][1], a[k][2], a[k][3],
                            weights[m][n][0], weights[m][n][1]);
                    }
                }
            }
        }
    }
}

} // namespace skipcat::latent

#endif
