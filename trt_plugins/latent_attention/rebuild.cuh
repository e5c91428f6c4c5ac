// Keys out of latents: a product on the matrix unit, a piece of the rank at a time, turned while it is in registers.

#ifndef SKIPCAT_LATENT_REBUILD_CUH
#define SKIPCAT_LATENT_REBUILD_CUH

#include "stage.cuh"

namespace skipcat::latent
{

// Four matrices of 8 x 8, beside and below one another, from a row-major table whose rows begin on 16 bytes.
__device__ __forceinline__ __half const* matrixRow(__half const* table, int stride, int row, int column)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    return table + (row + lane % 16) * stride + column + lane / 16 * 8;
}

// sums[16 x 16] += a[16 x 16] b, b given by rows of its transpose: [16 columns][16].
__device__ __forceinline__ void multiplyByRows(
    float (&left)[4], float (&right)[4], uint32_t const (&a)[4], __half const* table, int stride, int row, int column)
{
    uint32_t b[4];
    loadMatrices(b, matrixRow(table, stride, row, column));
    multiply(__half{}, left, a[0], a[1], a[2], a[3], b[0], b[2]);
    multiply(__half{}, right, a[0], a[1], a[2], a[3], b[1], b[3]);
}

// The same of b as it is: [16][16 columns].
__device__ __forceinline__ void multiplyByColumns(
    float (&left)[4], float (&right)[4], uint32_t const (&a)[4], __half const* table, int stride, int row, int column)
{
    uint32_t b[4];
    loadTransposed(b, matrixRow(table, stride, row, column));
    multiply(__half{}, left, a[0], a[1], a[2], a[3], b[0], b[1]);
    multiply(__half{}, right, a[0], a[1], a[2], a[3], b[2], b[3]);
}

// A fragment of 16 x 16 for the first operand.
__device__ __forceinline__ void loadRows(uint32_t (&a)[4], __half const* table, int stride, int row, int column)
{
    loadMatrices(a, matrixRow(table, stride, row, column));
}

// Both halves of a key, turned by its slot: numbers [row][column, column + 1] and those half a width on.
__device__ __forceinline__ void storeTurned(
    Arguments const& p, __half* made, int row, int64_t slot, int column, float const (&x)[2], float const (&y)[2])
{
    int const half = p.problem.width / 2;
    float const* const cos = p.pointers.cos + slot * half + column;
    float const* const sin = p.pointers.sin + slot * half + column;
    __half* const to = made + row * (p.problem.width + 8) + column;
    storeWord(to, pairOf(x[0] * cos[0] - y[0] * sin[0], x[1] * cos[1] - y[1] * sin[1]));
    storeWord(to + half, pairOf(y[0] * cos[0] + x[0] * sin[0], y[1] * cos[1] + x[1] * sin[1]));
}

// Keys [64 tokens][width] of one head: each warp 16 tokens, 64 columns of both halves at a time, which a thread
// holds together, so that they are turned before they are rounded. Rows behind the last token mean nothing.
__device__ __forceinline__ void rebuildKeys(
    Arguments const& p, unsigned char* shared, Layout const& at, Cached const& keys, int head, int token, int tokens)
{
    constexpr int kOther = kColumns / 16; // tiles of 8 columns in one half
    __half* const piece = reinterpret_cast<__half*>(shared + at.piece);
    __half* const up = reinterpret_cast<__half*>(shared + at.up);
    __half* const made = reinterpret_cast<__half*>(shared + at.keys);
    int const half = p.problem.width / 2;
    __half const* const mean
        = static_cast<__half const*>(p.pointers.mean) + static_cast<int64_t>(head) * p.problem.width;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const first = static_cast<int>(threadIdx.x) / 32 * 16;
    for (int left = 0; left < half; left += kColumns / 2)
    {
        int const columns = half - left < kColumns / 2 ? half - left : kColumns / 2;
        float sums[kColumns / 8][4] = {};
        for (int n = 0; n < keys.pieces; ++n)
        {
            __syncthreads();
            stagePiece(piece, keys, n, token, tokens);
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
                storeTurned(p, made, row, token + (row < tokens ? row : tokens - 1), column, x, y);
            }
        }
    }
    __syncthreads();
}

} // namespace skipcat::latent

#endif
