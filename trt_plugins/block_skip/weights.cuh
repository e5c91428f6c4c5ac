// Weights on their way to the matrix unit: four rows of one thread's columns, loaded and decoded.
//
// A thread takes rows 4t ... 4t + 3 of a step of 16 and kColumns neighbouring columns. The matrix unit
// wants neighbours in the reduction, which lie in different rows of memory, so `pair` joins the same
// column of two rows into one register (`codes` as they are, before their scale). Which of the 16 rows is called which does not matter to a sum:
// rows 4t, 4t + 1 play the part of 2t, 2t + 1, and rows 4t + 2, 4t + 3 that of 2t + 8, 2t + 9.

#ifndef SKIPCAT_WEIGHTS_CUH
#define SKIPCAT_WEIGHTS_CUH

#include "block_skip.h"
#include "device.cuh"

namespace skipcat
{

// Two 16-bit numbers in a register; arithmetic of pairs, exact for codes and offsets used here.
__device__ __forceinline__ uint32_t subtract(__half, uint32_t x, uint32_t y)
{
    __half2 const result = __hsub2(reinterpret_cast<__half2&>(x), reinterpret_cast<__half2&>(y));
    return reinterpret_cast<uint32_t const&>(result);
}

__device__ __forceinline__ uint32_t subtract(__nv_bfloat16, uint32_t x, uint32_t y)
{
    __nv_bfloat162 const result = __hsub2(reinterpret_cast<__nv_bfloat162&>(x), reinterpret_cast<__nv_bfloat162&>(y));
    return reinterpret_cast<uint32_t const&>(result);
}

__device__ __forceinline__ uint32_t scaled(__half, uint32_t x, uint32_t y)
{
    __half2 const result = __hmul2(reinterpret_cast<__half2&>(x), reinterpret_cast<__half2&>(y));
    return reinterpret_cast<uint32_t const&>(result);
}

__device__ __forceinline__ uint32_t scaled(__nv_bfloat16, uint32_t x, uint32_t y)
{
    __nv_bfloat162 const result = __hmul2(reinterpret_cast<__nv_bfloat162&>(x), reinterpret_cast<__nv_bfloat162&>(y));
    return reinterpret_cast<uint32_t const&>(result);
}

// Bytes 2H and 2H + 1 of `bytes`, unsigned with offset 128, as two numbers.
// fp16: 0x6400 + u is 1024 + u. bf16 has no room for 8 bits there: through float, 0x4b0000uu is 2^23 + u.
template <int H>
__device__ __forceinline__ uint32_t fromBytes(__half tag, uint32_t bytes)
{
    uint32_t const shifted = permute<H == 0 ? 0x4140 : 0x4342>(bytes, 0x64646464u);
    return subtract(tag, shifted, 0x64806480u);
}

template <int H>
__device__ __forceinline__ uint32_t fromBytes(__nv_bfloat16, uint32_t bytes)
{
    uint32_t const low = permute<H == 0 ? 0x7440 : 0x7442>(bytes, 0x4b000000u);
    uint32_t const high = permute<H == 0 ? 0x7441 : 0x7443>(bytes, 0x4b000000u);
    float const first = reinterpret_cast<float const&>(low) - 8388736.0f;
    float const second = reinterpret_cast<float const&>(high) - 8388736.0f;
    __nv_bfloat162 const result = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<uint32_t const&>(result);
}

// Nibble J of both halves, signed: with its upper bit flipped it is u = number + 8. fp16: 0x6400 + u is
// 1024 + u; where the nibble is not shifted down u is 16 times as much, and (1024 + 16 u) / 16 - 72 is exact
// in one operation.
template <int J>
__device__ __forceinline__ uint32_t fromNibbles(__half tag, uint32_t halves)
{
    uint32_t const shifted = J < 2 ? halves : halves >> 8;
    if constexpr (J % 2 == 0)
    {
        return subtract(tag, maskFlip(shifted, 0x000f000fu, 0x64086408u), 0x64086408u);
    }
    uint32_t number = maskFlip(shifted, 0x00f000f0u, 0x64806480u);
    uint32_t sixteenth = 0x2c002c00u;
    uint32_t offset = 0xd480d480u;
    __half2 const result = __hfma2(reinterpret_cast<__half2&>(number), reinterpret_cast<__half2&>(sixteenth),
        reinterpret_cast<__half2&>(offset));
    return reinterpret_cast<uint32_t const&>(result);
}

// bf16: 0x4300 + u is 128 + u.
template <int J>
__device__ __forceinline__ uint32_t fromNibbles(__nv_bfloat16 tag, uint32_t halves)
{
    return subtract(tag, maskFlip(halves >> (4 * J), 0x000f000fu, 0x43084308u), 0x43084308u);
}

// The lower and the upper number of a register.
template <typename T>
__device__ __forceinline__ float firstOf(T, uint32_t both)
{
    uint16_t const half = static_cast<uint16_t>(both);
    return toFloat(reinterpret_cast<T const&>(half));
}

template <typename T>
__device__ __forceinline__ float secondOf(T tag, uint32_t both)
{
    return firstOf(tag, both >> 16);
}

// Where a matrix of weights lies; `rows` is its reduction.
struct Matrix
{
    void const* codes;
    void const* scale;
    int rows;
    int columns;
    int groupSize;
};

template <typename T, WeightType W>
struct Weights;

template <typename T>
struct Weights<T, WeightType::kFloat>
{
    static constexpr int kColumns = 8;
    uint32_t word[4][4];

    template <bool VECTOR>
    __device__ __forceinline__ void load(Matrix const& w, int row, int rowEnd, int column)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            T const* const from = static_cast<T const*>(w.codes) + static_cast<int64_t>(row + i) * w.columns + column;
            bool const inside = row + i < rowEnd;
            if constexpr (VECTOR)
            {
                uint4 const value = inside && column < w.columns ? loadOnce16(from) : uint4{0, 0, 0, 0};
                word[i][0] = value.x, word[i][1] = value.y, word[i][2] = value.z, word[i][3] = value.w;
            }
            else
            {
                uint16_t const* const numbers = reinterpret_cast<uint16_t const*>(from);
#pragma unroll
                for (int c = 0; c < 4; ++c)
                {
                    uint32_t const low = inside && column + 2 * c < w.columns ? numbers[2 * c] : 0;
                    uint32_t const high = inside && column + 2 * c + 1 < w.columns ? numbers[2 * c + 1] : 0;
                    word[i][c] = low | high << 16;
                }
            }
        }
    }

    // Column C of rows 2P and 2P + 1.
    template <int P, int C>
    __device__ __forceinline__ uint32_t pair() const
    {
        return permute<C % 2 == 0 ? 0x5410 : 0x7632>(word[2 * P][C / 2], word[2 * P + 1][C / 2]);
    }
};

// The scales of a thread's 16 columns in the group of its rows.
template <typename T>
struct Scales
{
    uint32_t word[8];

    template <bool VECTOR>
    __device__ __forceinline__ void load(Matrix const& w, int row, int rowEnd, int column)
    {
        int const group = (row < rowEnd ? row : rowEnd - 1) / w.groupSize;
        T const* const from = static_cast<T const*>(w.scale) + static_cast<int64_t>(group) * w.columns + column;
        if constexpr (VECTOR)
        {
            bool const inside = column < w.columns;
            uint4 const low = inside ? *reinterpret_cast<uint4 const*>(from) : uint4{0, 0, 0, 0};
            uint4 const high = inside ? *(reinterpret_cast<uint4 const*>(from) + 1) : uint4{0, 0, 0, 0};
            word[0] = low.x, word[1] = low.y, word[2] = low.z, word[3] = low.w;
            word[4] = high.x, word[5] = high.y, word[6] = high.z, word[7] = high.w;
        }
        else
        {
            uint16_t const* const numbers = reinterpret_cast<uint16_t const*>(from);
#pragma unroll
            for (int c = 0; c < 8; ++c)
            {
                uint32_t const low = column + 2 * c < w.columns ? numbers[2 * c] : 0;
                uint32_t const high = column + 2 * c + 1 < w.columns ? numbers[2 * c + 1] : 0;
                word[c] = low | high << 16;
            }
        }
    }

    template <int C>
    __device__ __forceinline__ uint32_t twice() const
    {
        return permute<C % 2 == 0 ? 0x1010 : 0x3232>(word[C / 2], 0);
    }
};

template <typename T>
struct Weights<T, WeightType::kInt8>
{
    static constexpr int kColumns = 16;
    uint32_t word[4][4];
    Scales<T> scales;

    template <bool VECTOR>
    __device__ __forceinline__ void load(Matrix const& w, int row, int rowEnd, int column)
    {
        static_assert(!VECTOR, "aligned codes come through the ring of stream.cuh");
        scales.template load<false>(w, row, rowEnd, column);
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            uint8_t const* const from
                = static_cast<uint8_t const*>(w.codes) + static_cast<int64_t>(row + i) * w.columns + column;
            bool const inside = row + i < rowEnd;
#pragma unroll
            for (int c = 0; c < 4; ++c)
            {
                word[i][c] = 0;
#pragma unroll
                for (int b = 0; b < 4; ++b)
                {
                    uint32_t const code = inside && column + 4 * c + b < w.columns ? from[4 * c + b] : 0;
                    word[i][c] |= code << (8 * b);
                }
            }
        }
    }

    template <int P, int C>
    __device__ __forceinline__ uint32_t codes() const
    {
        // Bytes: column C of both rows, then column C + 1 of both (for even C).
        constexpr uint32_t kSelector = C % 4 < 2 ? 0x5140 : 0x7362;
        uint32_t const bytes = permute<kSelector>(word[2 * P][C / 4], word[2 * P + 1][C / 4]) ^ 0x80808080u;
        return fromBytes<C % 2>(T{}, bytes);
    }

    template <int P, int C>
    __device__ __forceinline__ uint32_t pair() const
    {
        return scaled(T{}, codes<P, C>(), scales.template twice<C>());
    }
};

template <typename T>
struct Weights<T, WeightType::kInt4>
{
    static constexpr int kColumns = 16;
    uint32_t word[4][2];
    Scales<T> scales;

    template <bool VECTOR>
    __device__ __forceinline__ void load(Matrix const& w, int row, int rowEnd, int column)
    {
        static_assert(!VECTOR, "aligned codes come through the ring of stream.cuh");
        scales.template load<false>(w, row, rowEnd, column);
        int const stride = (w.columns + 1) / 2;
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            uint8_t const* const from
                = static_cast<uint8_t const*>(w.codes) + static_cast<int64_t>(row + i) * stride + column / 2;
            bool const inside = row + i < rowEnd;
#pragma unroll
            for (int c = 0; c < 2; ++c)
            {
                word[i][c] = 0;
#pragma unroll
                for (int b = 0; b < 4; ++b)
                {
                    uint32_t const code = inside && column + 8 * c + 2 * b < w.columns ? from[4 * c + b] : 0;
                    word[i][c] |= code << (8 * b);
                }
            }
        }
    }

    template <int P, int C>
    __device__ __forceinline__ uint32_t codes() const
    {
        constexpr uint32_t kSelector = C % 8 < 4 ? 0x5410 : 0x7632;
        uint32_t const halves = permute<kSelector>(word[2 * P][C / 8], word[2 * P + 1][C / 8]);
        return fromNibbles<C % 4>(T{}, halves);
    }

    template <int P, int C>
    __device__ __forceinline__ uint32_t pair() const
    {
        return scaled(T{}, codes<P, C>(), scales.template twice<C>());
    }
};

} // namespace skipcat

#endif
