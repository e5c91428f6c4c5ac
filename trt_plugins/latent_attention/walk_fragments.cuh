// Latents out of shared memory as operands of the matrix unit: numbers as they are, codes decoded in registers.
//
// Codes come out of their words two at a time, as halves 1024 + code, and become code * step + low, rounded once. That
// puts numbers out of order: numberOfColumn says how queries are laid out for it, numberOfFragment what comes out.

#ifndef SKIPCAT_LATENT_WALK_FRAGMENTS_CUH
#define SKIPCAT_LATENT_WALK_FRAGMENTS_CUH

#include "walk_layout.cuh"

namespace skipcat::latent
{

__device__ __forceinline__ __half2 halvesOf(uint32_t word)
{
    __half2 value;
    memcpy(static_cast<void*>(&value), &word, 4);
    return value;
}

__device__ __forceinline__ uint32_t ofType(__half, __half2 value)
{
    return wordOf(value);
}

__device__ __forceinline__ uint32_t ofType(__nv_bfloat16, __half2 value)
{
    return packed(__nv_bfloat16{}, __low2float(value), __high2float(value));
}

// Steps and lows of two tokens, whose codes lie in the halves of a word.
struct Steps
{
    __half2 step, low;
};

__device__ __forceinline__ Steps stepsOf(uint32_t first, uint32_t second)
{
    return {halvesOf(permute<0x5410>(first, second)), halvesOf(permute<0x7632>(first, second))};
}

// The codes that lie SHIFT bits up in both halves of a word; stored bytes are 128 less than they mean.
template <typename T, Form FORM, int SHIFT>
__device__ __forceinline__ uint32_t decoded(uint32_t word, Steps const& of)
{
    constexpr uint32_t kMask = FORM == Form::kBytes ? 0x00ff00ffu : 0x000f000fu;
    constexpr uint32_t kFlip = FORM == Form::kBytes ? 0x00800080u : SHIFT % 8 == 4 ? 0x00080008u : 0u;
    uint32_t const raised = maskFlip(word >> SHIFT, kMask, 0x64006400u ^ kFlip);
    __half2 const code = __hfma2(halvesOf(raised), halvesOf(0x3c003c00u), halvesOf(0xe400e400u));
    return ofType(T{}, __hfma2(code, of.step, of.low));
}

// The fragments [16 tokens][16 columns] of a unit of keys; `steps` are those of tokens g and g + 8 of lane 4g + t.
template <typename T, Form FORM>
__device__ __forceinline__ void keyFragments(
    uint32_t (&a)[stepsPerUnit(FORM)][4], uint32_t const (&unit)[4], Steps const (&steps)[2])
{
    if constexpr (FORM == Form::kNumbers)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            a[0][i] = unit[i];
        }
    }
    else
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            // Word i has 16 bytes of tokens g (even i) or g + 8.
            Steps const& of = steps[i % 2];
            if constexpr (FORM == Form::kBytes)
            {
                a[i / 2][i % 2] = decoded<T, FORM, 0>(unit[i], of);
                a[i / 2][i % 2 + 2] = decoded<T, FORM, 8>(unit[i], of);
            }
            else
            {
                a[i / 2 * 2][i % 2] = decoded<T, FORM, 0>(unit[i], of);
                a[i / 2 * 2][i % 2 + 2] = decoded<T, FORM, 4>(unit[i], of);
                a[i / 2 * 2 + 1][i % 2] = decoded<T, FORM, 8>(unit[i], of);
                a[i / 2 * 2 + 1][i % 2 + 2] = decoded<T, FORM, 12>(unit[i], of);
            }
        }
    }
}

// The fragments [16 values][16 tokens] of a unit of values, loaded transposed; `steps` are those of tokens 2t and
// 2t + 1, and of those 8 on.
template <typename T, Form FORM>
__device__ __forceinline__ void valueFragments(
    uint32_t (&a)[stepsPerUnit(FORM)][4], uint32_t const (&unit)[4], Steps const (&steps)[2])
{
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        // Word i has tokens 8 (i % 2) on, and values 8 (i / 2) on.
        int const to = i % 2 * 2 + i / 2;
        if constexpr (FORM == Form::kNumbers)
        {
            a[0][to] = unit[i];
        }
        else if constexpr (FORM == Form::kBytes)
        {
            a[0][to] = decoded<T, FORM, 0>(unit[i], steps[i % 2]);
            a[1][to] = decoded<T, FORM, 8>(unit[i], steps[i % 2]);
        }
        else
        {
            a[0][to] = decoded<T, FORM, 0>(unit[i], steps[i % 2]);
            a[1][to] = decoded<T, FORM, 4>(unit[i], steps[i % 2]);
            a[2][to] = decoded<T, FORM, 8>(unit[i], steps[i % 2]);
            a[3][to] = decoded<T, FORM, 12>(unit[i], steps[i % 2]);
        }
    }
}

// The number that row `row` of fragment `fragment` of the values is; -1 where there is none.
__device__ __forceinline__ int numberOfFragment(int fragment, int row, int held, Form form)
{
    if (form == Form::kNumbers)
    {
        int const number = 16 * fragment + row;
        return number < held ? number : -1;
    }
    if (form == Form::kBytes)
    {
        int const byte = fragment / 2 * kUnit + 2 * row + fragment % 2;
        return byte < held ? byte : -1;
    }
    int const byte = fragment / 4 * kUnit + 2 * row + fragment % 4 / 2;
    return byte < held ? byte + fragment % 2 * held : -1;
}

} // namespace skipcat::latent

#endif
