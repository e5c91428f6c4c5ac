// The product with 16 numbers to a register and four products of bytes to an instruction.

#include "products.h"
#include "weight_memory.h"

#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <iterator>
#include <limits>

namespace skipcat
{
namespace
{

struct Lanes
{
    static constexpr int64_t kCount = 16;
    using Ints = __m512i;
    using Floats = __m512;

    // What the products of codes of so many bits count them from.
    template <int kBits>
    static constexpr int32_t kCounted = 0;

    // Four codes to a lane in each, as bytes.
    template <int kBits>
    struct Codes
    {
        __m512i parts[8 / kBits];
    };

    template <int kBits>
    static Codes<kBits> load(uint8_t const* at)
    {
        __m512i const all = _mm512_loadu_si512(at);
        Codes<kBits> codes;
        if constexpr (kBits == 8)
        {
            codes.parts[0] = all;
        }
        else
        {
            __m512i const mask = _mm512_set1_epi8((1 << kBits) - 1);
            for (int part = 0; part < 8 / kBits; ++part)
            {
                codes.parts[part] = _mm512_and_si512(_mm512_srli_epi16(all, part * kBits), mask);
            }
        }
        return codes;
    }

    // sum + codes x, four numbers of x at a time, so many bytes from one four to the next.
    template <int kBits, int kStride>
    static Ints dot(Ints sum, Codes<kBits> const& codes, int8_t const* x)
    {
        for (int part = 0; part < 8 / kBits; ++part)
        {
            int32_t four;
            std::memcpy(&four, x + part * kStride, 4);
            sum = _mm512_dpbusd_epi32(sum, codes.parts[part], _mm512_set1_epi32(four));
        }
        return sum;
    }

    template <bool kHalves>
    static Floats loadNumbers(uint8_t const* at)
    {
        if constexpr (kHalves)
        {
            return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(at)));
        }
        else
        {
            return _mm512_loadu_ps(at);
        }
    }

    static Ints splat(int32_t number)
    {
        return _mm512_set1_epi32(number);
    }

    static Floats splatFloat(float number)
    {
        return _mm512_set1_ps(number);
    }

    static Floats zero()
    {
        return _mm512_setzero_ps();
    }

    static Floats toFloats(Ints numbers)
    {
        return _mm512_cvtepi32_ps(numbers);
    }

    // a b + c
    static Floats multiplyAdd(Floats a, Floats b, Floats c)
    {
        return _mm512_fmadd_ps(a, b, c);
    }

    // c - a b
    static Floats multiplySubtract(Floats a, Floats b, Floats c)
    {
        return _mm512_fnmadd_ps(a, b, c);
    }

    static Floats loadSome(float const* at, int64_t count)
    {
        return _mm512_maskz_loadu_ps(first(count), at);
    }

    static void storeSome(Floats numbers, float* at, int64_t count)
    {
        _mm512_mask_storeu_ps(at, first(count), numbers);
    }

private:
    static __mmask16 first(int64_t count)
    {
        return static_cast<__mmask16>((1U << count) - 1);
    }
};

constexpr int kMostRows = 12;

#include "tile.h"

bool available()
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}

} // namespace

Instructions const kAvx512{"avx512", available, kMostRows, pack};

} // namespace skipcat
