// The product with 8 numbers to two registers, by the dot products of ARMv8.2: four bytes to an instruction.

#include "products.h"
#include "weight_memory.h"

#include <arm_neon.h>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <sys/auxv.h>

namespace skipcat
{
namespace
{

// Two registers: what is read of x for a step meets twice as many codes.
struct Floats
{
    float32x4_t low;
    float32x4_t high;
};

inline Floats operator+(Floats a, Floats b)
{
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}

inline Floats operator*(Floats a, Floats b)
{
    return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
}

struct Ints
{
    int32x4_t low;
    int32x4_t high;
};

struct Lanes
{
    static constexpr int64_t kCount = 8;
    using Ints = skipcat::Ints;
    using Floats = skipcat::Floats;

    // The instruction takes signed bytes: codes of 8 bits are counted from the middle.
    template <int kBits>
    static constexpr int32_t kCounted = kBits == 8 ? 128 : 0;

    template <int kBits>
    struct Codes
    {
        int8x16_t low[8 / kBits];
        int8x16_t high[8 / kBits];
    };

    template <int kBits>
    static Codes<kBits> load(uint8_t const* at)
    {
        Codes<kBits> codes;
        separate<kBits>(vld1q_u8(at), codes.low);
        separate<kBits>(vld1q_u8(at + 16), codes.high);
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
            int8x16_t const fours = vreinterpretq_s8_s32(vdupq_n_s32(four));
            sum = {vdotq_s32(sum.low, codes.low[part], fours), vdotq_s32(sum.high, codes.high[part], fours)};
        }
        return sum;
    }

    template <bool kHalves>
    static Floats loadNumbers(uint8_t const* at)
    {
        if constexpr (kHalves)
        {
            float16x8_t const halves = vreinterpretq_f16_u8(vld1q_u8(at));
            return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
        }
        else
        {
            return {vreinterpretq_f32_u8(vld1q_u8(at)), vreinterpretq_f32_u8(vld1q_u8(at + 16))};
        }
    }

    static Ints splat(int32_t number)
    {
        return {vdupq_n_s32(number), vdupq_n_s32(number)};
    }

    static Floats splatFloat(float number)
    {
        return {vdupq_n_f32(number), vdupq_n_f32(number)};
    }

    static Floats zero()
    {
        return splatFloat(0);
    }

    static Floats toFloats(Ints numbers)
    {
        return {vcvtq_f32_s32(numbers.low), vcvtq_f32_s32(numbers.high)};
    }

    // a b + c
    static Floats multiplyAdd(Floats a, Floats b, Floats c)
    {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }

    // c - a b
    static Floats multiplySubtract(Floats a, Floats b, Floats c)
    {
        return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
    }

    static Floats loadSome(float const* at, int64_t count)
    {
        float numbers[kCount]{};
        std::memcpy(numbers, at, static_cast<size_t>(count) * sizeof(float));
        return {vld1q_f32(numbers), vld1q_f32(numbers + 4)};
    }

    static void storeSome(Floats numbers, float* at, int64_t count)
    {
        if (count == kCount)
        {
            vst1q_f32(at, numbers.low);
            vst1q_f32(at + 4, numbers.high);
            return;
        }
        float all[kCount];
        vst1q_f32(all, numbers.low);
        vst1q_f32(all + 4, numbers.high);
        std::memcpy(at, all, static_cast<size_t>(count) * sizeof(float));
    }

private:
    // The codes of each byte, the lowest bits first.
    template <int kBits>
    static void separate(uint8x16_t bytes, int8x16_t* parts)
    {
        if constexpr (kBits == 8)
        {
            parts[0] = vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
        }
        else
        {
            uint8x16_t const mask = vdupq_n_u8((1 << kBits) - 1);
            for (int part = 0; part < 8 / kBits; ++part)
            {
                uint8x16_t const moved = vshlq_u8(bytes, vdupq_n_s8(static_cast<int8_t>(-part * kBits)));
                parts[part] = vreinterpretq_s8_u8(vandq_u8(moved, mask));
            }
        }
    }
};

// Of 32 registers, four for each row are sums.
constexpr int kMostRows = 6;

#include "tile.h"

bool available()
{
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}

} // namespace

Instructions const kNeon{"neon", available, kMostRows, pack};

} // namespace skipcat
