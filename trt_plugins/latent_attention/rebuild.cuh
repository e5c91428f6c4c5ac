// Keys out of latents: a product on the matrix unit, a piece of the rank at a time, turned while it is in registers.

#ifndef SKIPCAT_LATENT_REBUILD_CUH
#define SKIPCAT_LATENT_REBUILD_CUH

#include "stage.cuh"

namespace skipcat::latent
{

// Four matrices of 8 x 8, beside and below one another, from a row-major table whose rows begin on 16 bytes.
template <typename T>
__device__ __forceinline__ T const* matrixRow(T const* table, int stride, int row, int column)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    return table + (row + lane % 16) * stride + column + lane / 16 * 8;
}

// sums[16 x 16] += a[16 x 16] b, b given by rows of its transpose: [16 columns][16].
template <typename T>
__device__ __forceinline__ void multiplyByRows(
    float (&left)[4], float (&right)[4], uint32_t const (&a)[4], T const* table, int stride, int row, int column)
{
    uint32_t b[4];
    loadMatrices(b, matrixRow(table, stride, row, column));
    multiply(T{}, left, a[0], a[1], a[2], a[3], b[0], b[2]);
    multiply(T{}, right, a[0], a[1], a[2], a[3], b[1], b[3]);
}

// The same of b as it is: [16][16 columns].
template <typename T>
__device__ __forceinline__ void multiplyByColumns(
    float (&left)[4], float (&right)[4], uint32_t const (&a)[4], T const* table, int stride, int row, int column)
{
    uint32_t b[4];
    loadTransposed(b, matrixRow(table, stride, row, column));
    multiply(T{}, left, a[0], a[1], a[2], a[3], b[0], b[1]);
    multiply(T{}, right, a[0], a[1], a[2], a[3], b[2], b[3]);
}

// A fragment of 16 x 16 for the first operand.
template <typename T>
__device__ __forceinline__ void loadRows(uint32_t (&a)[4], T const* table, int stride, int row, int column)
{
    loadMatrices(a, matrixRow(table, stride, row, column));
}

// Both halves of a key, turned by its slot: numbers [row][column, column + 1] and those half a width on.
template <typename T>
__device__ __forceinline__ void storeTurned(
    Arguments const& p, T* made, int row, int64_t slot, int column, float const (&x)[2], float const (&y)[2])
{
    int const half = p.problem.width / 2;
    float const* const cos = p.pointers.cos + slot * half + column;
    float const* const sin = p.pointers.sin + slot * half + column;
    T* const to = made + row * (p.problem.width + 8) + column;
    storeWord(to, packed(T{}, x[0] * cos[0] - y[0] * sin[0], x[1] * cos[1] - y[1] * sin[1]));
    storeWord(to + half, packed(T{}, y[0] * cos[0] + x[0] * sin[0], y[1] * cos[1] + x[1] * sin[1]));
}

// Keys [64 tokens][width] of one head: each warp 16 tokens, 64 columns of both halves at a time, which a thread
// holds together, so that they are turned before they are rounded. Rows of tokens that are not open mean nothing.
template <typename T>
__device__ __forceinline__ void rebuildKeys(Arguments const& p, unsigned char* shared, Layout const& at,
    Cached const& keys, int head, int token, int const* open)
{
    constexpr int kOther = kColumns / 16; // tiles of 8 columns in one half
    T* const piece = reinterpret_cast<T*>(shared + at.piece);
    T* const up = reinterpret_cast<T*>(shared + at.up);
    T* const made = reinterpret_cast<T*>(shared + at.keys);
    int const half = p.problem.width / 2;
    T const* const mean
        = static_cast<T const*>(p.pointers.mean) + static_cast<int64_t>(head) * p.problem.width;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const first = static_cast<int>(threadIdx.x) / 32 * 16;
    for (int left = 0; left < half; left += kColumns / 2)
    {
        int const columns = half - left < kColumns / 2 ? half - left : kColumns / 2;
        float sums[kColumns / 8][4] = {};
        for (int n = 0; n < keys.pieces; ++n)
        {
            __syncthreads();
            stagePiece(piece, keys, n, token, open);
            stageUp(p, up, keys, head, n, left, columns);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kPiece; k += 16)
            {
                uint32_t a[4];
                loadRows(a, piece, kStride, first, k);
#pragma unroll
                for (int c = 0; c < kColumns; c += 16)
                {
                    if (c % (kColumns / 2) < columns)
                    {
                        multiplyByColumns(sums[c / 8], sums[c / 8 + 1], a, up, kColumnStride, k, c);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * kOther; ++i)
        {
            int const c = i / 2;
            int const column = left + 8 * c + 2 * (lane % 4);
            int const row = first + lane / 4 + 8 * (i % 2);
            if (8 * c < columns)
            {
                float const x[2] = {sums[c][2 * (i % 2)] + toFloat(mean[column]),
                    sums[c][2 * (i % 2) + 1] + toFloat(mean[column + 1])};
                float const y[2] = {sums[c + kOther][2 * (i % 2)] + toFloat(mean[column + half]),
                    sums[c + kOther][2 * (i % 2) + 1] + toFloat(mean[column + half + 1])};
                storeTurned(p, made, row, token + row < p.problem.slots ? token + row : token, column, x, y);
            }
        }
    }
    __syncthreads();
}

} // namespace skipcat::latent

#endif
