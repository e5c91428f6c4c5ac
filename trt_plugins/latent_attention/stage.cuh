// The cache on its way to shared memory: pieces of 64 tokens and 64 numbers, decoded.
//
// A piece of nibbles is 32 bytes of a token: the numbers in their low halves, then those in their high halves.

#ifndef SKIPCAT_LATENT_STAGE_CUH
#define SKIPCAT_LATENT_STAGE_CUH

#include <cstring>

#include "blocks.cuh"

namespace skipcat::latent
{

struct Cached
{
    unsigned char const* held; // of the block's batch and group
    __half const* steps;
    int bytes; // of a token
    int width; // numbers or bytes of a token
    int pieces;
    Form form;
    bool vector; // every token begins on 16 bytes
};

__device__ __forceinline__ Cached cachedOf(
    Side const& side, void const* held, void const* steps, int slots, int batch, int group)
{
    Cached out{};
    out.form = side.form;
    out.width = side.held;
    out.bytes = side.form == Form::kNumbers ? 2 * side.held : side.held;
    out.pieces = piecesOf(side);
    int64_t const first = (static_cast<int64_t>(batch) * side.groups + group) * slots;
    out.held = static_cast<unsigned char const*>(held) + first * out.bytes;
    out.steps = static_cast<__half const*>(steps) + (steps == nullptr ? 0 : 2 * first);
    out.vector = out.bytes % 16 == 0 && reinterpret_cast<uintptr_t>(out.held) % 16 == 0;
    return out;
}

// The number that place j of a piece holds; -1 where there is none.
__device__ __forceinline__ int numberAt(int piece, int j, int held, Form form)
{
    if (form != Form::kNibbles)
    {
        int const number = kPiece * piece + j;
        return number < held ? number : -1;
    }
    int const byte = kPiece / 2 * piece + j % (kPiece / 2);
    return byte < held ? byte + (j < kPiece / 2 ? 0 : held) : -1;
}

// 16 bytes of a token, of which `left` and no more are its own; the others are zero. (`left` is compared as it is:
// of the same clamped to 0 and 16, nvcc 13.0 takes 16 for granted where it is 0, by the predicate of VIMNMX.RELU.)
__device__ __forceinline__ uint4 load16(unsigned char const* from, int left, bool vector)
{
    if (vector && left >= 16)
    {
        return loadOnce16(from);
    }
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i)
    {
        if (i < left)
        {
            words[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
        }
    }
    return {words[0], words[1], words[2], words[3]};
}

template <typename T>
__device__ __forceinline__ void storeWord(T* to, uint32_t word)
{
    *reinterpret_cast<uint32_t*>(to) = word;
}

template <typename V>
__device__ __forceinline__ uint32_t wordOf(V value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

__device__ __forceinline__ uint32_t packed(__half, float first, float second)
{
    return wordOf(__floats2half2_rn(first, second));
}

__device__ __forceinline__ uint32_t packed(__nv_bfloat16, float first, float second)
{
    return wordOf(__floats2bfloat162_rn(first, second));
}

// What 4 bytes of codes stand for, decoded next to one another: the whole bytes, or their halves.
template <typename T>
__device__ __forceinline__ void decodeWord(
    T* to, T* toUpper, uint32_t word, int valid, float step, float low, bool nibbles)
{
    float lower[4];
    float upper[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        uint32_t const byte = (word >> (8 * i) & 255u) ^ 128u;
        uint32_t const code = nibbles ? byte & 15u : byte;
        lower[i] = i < valid ? static_cast<float>(code) * step + low : 0.0f;
        upper[i] = i < valid ? static_cast<float>(byte >> 4) * step + low : 0.0f;
    }
    storeWord(to, packed(T{}, lower[0], lower[1]));
    storeWord(to + 2, packed(T{}, lower[2], lower[3]));
    if (nibbles)
    {
        storeWord(toUpper, packed(T{}, upper[0], upper[1]));
        storeWord(toUpper + 2, packed(T{}, upper[2], upper[3]));
    }
}

// A piece of 64 tokens, decoded: [64][64] numbers, zeros beyond the rank, and of tokens that are not open.
template <typename T>
__device__ __forceinline__ void stagePiece(T* staged, Cached const& side, int piece, int token, int const* open)
{
    int const pieceBytes = side.form == Form::kNumbers ? 2 * kPiece : side.form == Form::kBytes ? kPiece : kPiece / 2;
    int const units = pieceBytes / 16;
    for (int i = static_cast<int>(threadIdx.x); i < kTokens * units; i += kThreads)
    {
        int const row = i / units;
        int const offset = piece * pieceBytes + i % units * 16;
        int const left = open[row] != 0 ? side.bytes - offset : 0;
        int const valid = left < 0 ? 0 : left < 16 ? left : 16;
        int64_t const at = static_cast<int64_t>(token + row);
        uint4 const loaded = load16(side.held + at * side.bytes + offset, left, side.vector);
        uint32_t const words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        T* const to = staged + row * kStride;
        if (side.form == Form::kNumbers)
        {
#pragma unroll
            for (int w = 0; w < 4; ++w)
            {
                storeWord(to + i % units * 8 + 2 * w, words[w]);
            }
            continue;
        }
        float const step = valid > 0 ? toFloat(side.steps[2 * at]) : 0.0f;
        float const low = valid > 0 ? toFloat(side.steps[2 * at + 1]) : 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w)
        {
            T* const first = to + i % units * 16 + 4 * w;
            decodeWord(first, first + kPiece / 2, words[w], valid - 4 * w, step, low, side.form == Form::kNibbles);
        }
    }
}

template <typename T>
__device__ __forceinline__ void stageQuery(Arguments const& p, Place const& at, T* staged, Cached const& keys)
{
    Problem const& problem = p.problem;
    bool const rebuilt = problem.headsPerGroup > 0;
    int const stride = queryStride(problem);
    int const width = stride - 8;
    T const* const from = static_cast<T const*>(p.pointers.query);
    for (int i = static_cast<int>(threadIdx.x); i < kRows * width; i += kThreads)
    {
        int const row = i / width;
        int const j = i % width;
        int const number = rebuilt ? j : numberAt(j / kPiece, j % kPiece, keys.width, keys.form);
        T value;
        fromFloat(0.0f, value);
        if (row < at.rows && number >= 0)
        {
            int2 const of = queryOf(p.problem, at, kRows, row);
            int64_t const vector
                = (static_cast<int64_t>(at.batch) * problem.heads + of.x) * problem.queries + of.y;
            value = from[vector * problem.width + number];
        }
        staged[row * stride + j] = value;
    }
}

// Numbers of the map of one head [64 of a piece][64 columns of the first half, 64 of the second], in the piece's
// order; `columns` of each half are there.
template <typename T>
__device__ __forceinline__ void stageUp(
    Arguments const& p, T* staged, Cached const& keys, int head, int piece, int left, int columns)
{
    int const width = p.problem.width;
    int const rank = rankOf(p.problem.keys);
    T const* const from = static_cast<T const*>(p.pointers.up) + static_cast<int64_t>(head) * rank * width;
    for (int i = static_cast<int>(threadIdx.x); i < kPiece * columns; i += kThreads)
    {
        int const j = i / columns;
        int const column = i % columns * 2 % columns;
        int const half = i % columns * 2 / columns;
        int const number = numberAt(piece, j, keys.width, keys.form);
        uint32_t word = 0;
        if (number >= 0)
        {
            memcpy(&word, from + static_cast<int64_t>(number) * width + half * (width / 2) + left + column, 4);
        }
        storeWord(staged + j * kColumnStride + half * (kColumns / 2) + column, word);
    }
}

} // namespace skipcat::latent

#endif
