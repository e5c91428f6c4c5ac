// Scores of the tokens of a stage: keys multiplied as they are cached, or rebuilt and turned in registers.
//
// A warp has tokens as the rows of its products and queries as their columns, 8 at a time, so that rebuilt keys, which
// come out of a product, go into the next one without leaving registers.

#ifndef SKIPCAT_LATENT_WALK_KEYS_CUH
#define SKIPCAT_LATENT_WALK_KEYS_CUH

#include "rebuild.cuh"
#include "walk_copies.cuh"

namespace skipcat::latent
{

// [tokens of a stage][8 rows of queries, NT times]: lane 4g + t has tokens g and g + 8, rows 2t and 2t + 1.
template <int NT, int MT>
using Scores = float[MT][NT][4];

// scores += a[16 tokens][16 columns] * queries, of which the columns begin at `column`.
template <typename T, int NT>
__device__ __forceinline__ void multiplyQueries(
    float (&scores)[NT][4], uint32_t const (&a)[4], T const* query, int stride, int column)
{
    int const lane = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int n = 0; n < NT; ++n)
    {
        uint32_t b[2];
        loadMatrixPair(b, query + (8 * n + lane % 8) * stride + column + lane / 8 * 8);
        multiply(T{}, scores[n], a[0], a[1], a[2], a[3], b[0], b[1]);
    }
}

// Steps of tokens g and g + 8, each twice; nothing where keys are numbers.
template <Form FORM>
__device__ __forceinline__ void keySteps(Steps (&steps)[2], unsigned char const* at, int first)
{
    if constexpr (FORM != Form::kNumbers)
    {
        uint32_t const* const words = reinterpret_cast<uint32_t const*>(at);
        int const token = first + static_cast<int>(threadIdx.x) % 32 / 4;
        steps[0] = stepsOf(words[token], words[token]);
        steps[1] = stepsOf(words[token + 8], words[token + 8]);
    }
}

// A unit of 16 tokens.
__device__ __forceinline__ void loadUnit(uint32_t (&unit)[4], unsigned char const* rows, int stride, int first, int at)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    loadMatrices(unit, rows + (first + lane % 16) * stride + kUnit * at + lane / 16 * 16);
}

template <typename T, Form FORM, int NT, int MT>
__device__ __forceinline__ void scoreCached(
    Scores<NT, MT>& scores, WalkArguments const& p, unsigned char const* stage, T const* query)
{
    constexpr int kSteps = stepsPerUnit(FORM);
    int const units = unitsIn(p.problem.keys);
#pragma unroll
    for (int m = 0; m < MT; ++m)
    {
        Steps steps[2];
        keySteps<FORM>(steps, stage + p.at.keyStepsAt, 16 * m);
#pragma unroll 2
        for (int u = 0; u < units; ++u)
        {
            uint32_t unit[4];
            uint32_t a[kSteps][4];
            loadUnit(unit, stage, p.at.keyStride, 16 * m, u);
            keyFragments<T, FORM>(a, unit, steps);
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
            {
                multiplyQueries<T, NT>(scores[m], a[k], query, p.at.queryStride, 16 * (kSteps * u + k));
            }
        }
    }
}

// The queries turned back to where the stage begins, and stretched as the tables are: what a token is turned beyond
// that is the same in every stage. `query` and `turned` [rows][2 pairs].
template <typename T>
__device__ __forceinline__ void turnQueries(
    WalkArguments const& p, T const* query, T* turned, int rows, int64_t slot)
{
    int const half = p.problem.width / 2;
    int const stride = p.at.queryStride;
    for (int pair = 2 * (static_cast<int>(threadIdx.x) % 32); pair < p.at.pairs; pair += 64)
    {
        float2 c{0.0f, 0.0f};
        float2 s{0.0f, 0.0f};
        if (pair < half)
        {
            c = *reinterpret_cast<float2 const*>(p.pointers.cos + slot * half + pair);
            s = *reinterpret_cast<float2 const*>(p.pointers.sin + slot * half + pair);
        }
        for (int row = 0; row < rows; ++row)
        {
            T const* const x = query + row * stride + pair;
            T const* const y = x + p.at.pairs;
            float const first[2] = {toFloat(x[0]), toFloat(x[1])};
            float const second[2] = {toFloat(y[0]), toFloat(y[1])};
            T* const to = turned + row * stride + pair;
            storeWord(to, packed(T{}, first[0] * c.x + second[0] * s.x, first[1] * c.y + second[1] * s.y));
            storeWord(to + p.at.pairs, packed(T{}, second[0] * c.x - first[0] * s.x, second[1] * c.y - first[1] * s.y));
        }
    }
}

// What a block keeps for keys that are rebuilt.
template <typename T>
struct Map
{
    T const* up;         // [numbers of a latent][2 pairs]
    __half2 const* turns; // [tokens][pairs], the cosines of two pairs before their sines
    float const* mean;   // [2 pairs]
};

// Keys of 32 pairs before they are turned, on top of their mean: of each m-tile 4 tiles of first numbers, then 4 of
// second ones.
template <typename T, Form FORM, int MT>
__device__ __forceinline__ void rebuildPairs(float (&made)[MT][8][4], WalkArguments const& p,
    unsigned char const* stage, Map<T> const& map, Steps const (&steps)[MT][2], int pair)
{
    constexpr int kSteps = stepsPerUnit(FORM);
    int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < 8; ++j)
    {
        int const column = pair + 8 * (j % 4) + (j < 4 ? 0 : p.at.pairs) + 2 * (lane % 4);
        float2 const mean = *reinterpret_cast<float2 const*>(map.mean + column);
#pragma unroll
        for (int i = 0; i < 4 * MT; ++i)
        {
            made[i / 4][j][i % 4] = i % 2 == 0 ? mean.x : mean.y;
        }
    }
    int const units = unitsIn(p.problem.keys);
    T const* up = map.up + lane % 16 * p.at.upStride + lane / 16 * 8 + pair;
#pragma unroll 1
    for (int u = 0; u < units; ++u)
    {
        uint32_t a[MT][kSteps][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
        {
            uint32_t unit[4];
            loadUnit(unit, stage, p.at.keyStride, 16 * m, u);
            keyFragments<T, FORM>(a[m], unit, steps[m]);
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
        {
#pragma unroll
            for (int j = 0; j < 8; j += 2)
            {
                uint32_t b[4];
                loadTransposed(b, (j < 4 ? up : up + p.at.pairs) + 8 * (j % 4));
#pragma unroll
                for (int m = 0; m < MT; ++m)
                {
                    multiply(T{}, made[m][j], a[m][k][0], a[m][k][1], a[m][k][2], a[m][k][3], b[0], b[1]);
                    multiply(T{}, made[m][j + 1], a[m][k][0], a[m][k][1], a[m][k][2], a[m][k][3], b[2], b[3]);
                }
            }
            up += 16 * p.at.upStride;
        }
    }
}

// Two pairs (x, y) turned by the cosines and sines of theirs, in the type of the keys' product: halves are rounded as
// they are made, after each product and at the end, which is fewer instructions than floats.
__device__ __forceinline__ uint2 turnedPairs(__half, float const* x, float const* y, uint2 const& turn)
{
    __half2 const first = __floats2half2_rn(x[0], x[1]);
    __half2 const second = __floats2half2_rn(y[0], y[1]);
    __half2 const c = halvesOf(turn.x);
    __half2 const s = halvesOf(turn.y);
    __half2 const none = halvesOf(0x80008000u); // -0, so that nothing is added
    __half2 const left = __hfma2(second, halvesOf(turn.y ^ 0x80008000u), none);
    return {wordOf(__hfma2(first, c, left)), wordOf(__hfma2(first, s, __hfma2(second, c, none)))};
}

__device__ __forceinline__ uint2 turnedPairs(__nv_bfloat16, float const* x, float const* y, uint2 const& turn)
{
    float const c[2] = {__low2float(halvesOf(turn.x)), __high2float(halvesOf(turn.x))};
    float const s[2] = {__low2float(halvesOf(turn.y)), __high2float(halvesOf(turn.y))};
    return {packed(__nv_bfloat16{}, x[0] * c[0] - y[0] * s[0], x[1] * c[1] - y[1] * s[1]),
        packed(__nv_bfloat16{}, y[0] * c[0] + x[0] * s[0], y[1] * c[1] + x[1] * s[1])};
}

// The pairs turned: `made` becomes what the matrix unit takes, [first, second numbers][tiles of 8][tokens g, g + 8].
template <typename T>
__device__ __forceinline__ void turnPairs(
    uint32_t (&a)[2][4][2], float const (&made)[8][4], WalkArguments const& p, Map<T> const& map, int first, int pair)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    __half2 const* const turns = map.turns + (first + lane / 4) * (p.at.pairs + 8) + pair + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 4; ++j)
    {
#pragma unroll
        for (int h = 0; h < 2; ++h)
        {
            uint2 const turn = *reinterpret_cast<uint2 const*>(turns + 8 * h * (p.at.pairs + 8) + 8 * j);
            uint2 const both = turnedPairs(T{}, made[j] + 2 * h, made[j + 4] + 2 * h, turn);
            a[0][j][h] = both.x;
            a[1][j][h] = both.y;
        }
    }
}

template <typename T, Form FORM, int NT, int MT>
__device__ __forceinline__ void scoreRebuilt(
    Scores<NT, MT>& scores, WalkArguments const& p, unsigned char const* stage, T const* turned, Map<T> const& map)
{
    Steps steps[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
    {
        keySteps<FORM>(steps[m], stage + p.at.keyStepsAt, 16 * m);
    }
    for (int pair = 0; pair < p.at.pairs; pair += kPairs)
    {
        float made[MT][8][4];
        rebuildPairs<T, FORM, MT>(made, p, stage, map, steps, pair);
#pragma unroll
        for (int m = 0; m < MT; ++m)
        {
            uint32_t a[2][4][2];
            turnPairs<T>(a, made[m], p, map, 16 * m, pair);
#pragma unroll
            for (int i = 0; i < 4; ++i)
            {
                int const half = i / 2;
                int const j = i % 2 * 2;
                uint32_t const both[4] = {a[half][j][0], a[half][j][1], a[half][j + 1][0], a[half][j + 1][1]};
                multiplyQueries<T, NT>(
                    scores[m], both, turned, p.at.queryStride, half * p.at.pairs + pair + 8 * j);
            }
        }
    }
}

} // namespace skipcat::latent

#endif
