// The product with 8 numbers to a register.
//
// Products of bytes are summed in 16 bits first; with SKIPCAT_AVX_VNNI defined, four to an instruction, by
// processors without AVX-512 that have it. SKIPCAT_BY_AVX512 takes that of AVX-512 in its place, which is
// the same: for tests.

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
    static constexpr int64_t kCount = 8;
    using Ints = __m256i;
    using Floats = __m256;

#ifdef SKIPCAT_AVX_VNNI
    static constexpr bool kFours = true;
#else
    static constexpr bool kFours = false;
#endif

    // Two products of bytes up to 255 do not fit into 16 bits: codes of 8 bits are counted from the
    // middle, as signed bytes.
    template <int kBits>
    static constexpr int32_t kCounted = kBits == 8 && !kFours ? 128 : 0;

    template <int kBits>
    struct Codes
    {
        __m256i parts[8 / kBits];
        __m256i sizes; // of signed bytes
    };

    template <int kBits>
    static Codes<kBits> load(uint8_t const* at)
    {
        __m256i const all = _mm256_loadu_si256(reinterpret_cast<__m256i const*>(at));
        Codes<kBits> codes;
        if constexpr (kBits == 8 && kFours)
        {
            codes.parts[0] = all;
        }
        else if constexpr (kBits == 8)
        {
            codes.parts[0] = _mm256_xor_si256(all, _mm256_set1_epi8(-128));
            codes.sizes = _mm256_abs_epi8(codes.parts[0]);
        }
        else
        {
            __m256i const mask = _mm256_set1_epi8((1 << kBits) - 1);
            for (int part = 0; part < 8 / kBits; ++part)
            {
                codes.parts[part] = _mm256_and_si256(_mm256_srli_epi16(all, part * kBits), mask);
            }
        }
        return codes;
    }

    // sum + codes x, four numbers of x at a time, so many bytes from one four to the next.
    template <int kBits, int kStride>
    static Ints dot(Ints sum, Codes<kBits> const& codes, int8_t const* x)
    {
#ifdef SKIPCAT_AVX_VNNI
        for (int part = 0; part < 8 / kBits; ++part)
        {
            sum = addFours(sum, codes.parts[part], four(x + part * kStride));
        }
        return sum;
#else
        __m256i pairs;
        if constexpr (kBits == 8)
        {
            // |w| sign(w) x: a size of 128 is one as an unsigned byte, and x is never -128.
            pairs = _mm256_maddubs_epi16(codes.sizes, _mm256_sign_epi8(four(x), codes.parts[0]));
        }
        else
        {
            pairs = _mm256_maddubs_epi16(codes.parts[0], four(x));
            for (int part = 1; part < 8 / kBits; ++part) // 4 * 2 * 3 * 127 and 2 * 2 * 15 * 127 fit
            {
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes.parts[part], four(x + part * kStride)));
            }
        }
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
    }

    template <bool kHalves>
    static Floats loadNumbers(uint8_t const* at)
    {
        if constexpr (kHalves)
        {
            return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(at)));
        }
        else
        {
            return _mm256_loadu_ps(reinterpret_cast<float const*>(at));
        }
    }

    static Ints splat(int32_t number)
    {
        return _mm256_set1_epi32(number);
    }

    static Floats splatFloat(float number)
    {
        return _mm256_set1_ps(number);
    }

    static Floats zero()
    {
        return _mm256_setzero_ps();
    }

    static Floats toFloats(Ints numbers)
    {
        return _mm256_cvtepi32_ps(numbers);
    }

    // a b + c
    static Floats multiplyAdd(Floats a, Floats b, Floats c)
    {
        return _mm256_fmadd_ps(a, b, c);
    }

    // c - a b
    static Floats multiplySubtract(Floats a, Floats b, Floats c)
    {
        return _mm256_fnmadd_ps(a, b, c);
    }

    static Floats loadSome(float const* at, int64_t count)
    {
        return _mm256_maskload_ps(at, first(count));
    }

    static void storeSome(Floats numbers, float* at, int64_t count)
    {
        if (count == kCount)
        {
            _mm256_storeu_ps(at, numbers); // a masked store is slow on AMD
        }
        else
        {
            _mm256_maskstore_ps(at, first(count), numbers);
        }
    }

private:
#ifdef SKIPCAT_AVX_VNNI
    static Ints addFours(Ints sum, __m256i codes, __m256i x)
    {
#ifdef SKIPCAT_BY_AVX512
        return _mm256_dpbusd_epi32(sum, codes, x);
#else
        return _mm256_dpbusd_avx_epi32(sum, codes, x);
#endif
    }
#endif

    static __m256i four(int8_t const* x)
    {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm256_set1_epi32(four);
    }

    static __m256i first(int64_t count)
    {
        return _mm256_cmpgt_epi32(
            _mm256_set1_epi32(static_cast<int32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
};

constexpr int kMostRows = 4;

#include "tile.h"

bool available()
{
    bool const narrow
        = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(SKIPCAT_AVX_VNNI) && defined(SKIPCAT_BY_AVX512)
    return narrow && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#elif defined(SKIPCAT_AVX_VNNI)
    return narrow && __builtin_cpu_supports("avxvnni");
#else
    return narrow;
#endif
}

} // namespace

#ifdef SKIPCAT_AVX_VNNI
Instructions const kAvxVnni{"avx-vnni", available, kMostRows, pack};
#else
Instructions const kAvx2{"avx2", available, kMostRows, pack};
#endif

} // namespace skipcat
