// One stretch of the cache against 16 rows of queries that share it: flash attention, split over the context.
//
// A block walks its stretch in tiles of 64 tokens. Rebuilt keys are made for a tile and multiplied with the queries;
// keys that are taken as cached are multiplied piece by piece without being kept. Values are multiplied as cached.

#ifndef SKIPCAT_LATENT_ATTEND_CUH
#define SKIPCAT_LATENT_ATTEND_CUH

#include <cmath>

#include "rebuild.cuh"

namespace skipcat::latent
{

// Scores [16][64] of the tile: each warp 16 tokens.
template <typename T>
__device__ __forceinline__ void scoreTile(
    Arguments const& p, unsigned char* shared, Layout const& at, Cached const& keys, int head, int token,
    int const* open)
{
    T* const query = reinterpret_cast<T*>(shared + at.query);
    int const stride = queryStride(p.problem);
    int const first = static_cast<int>(threadIdx.x) / 32 * 16;
    float sums[2][4] = {};
    uint32_t a[4];
    if (p.problem.headsPerGroup > 0)
    {
        T* const made = reinterpret_cast<T*>(shared + at.keys);
        rebuildKeys<T>(p, shared, at, keys, head, token, open);
        for (int k = 0; k < p.problem.width; k += 16)
        {
            loadRows(a, query, stride, 0, k);
            multiplyByRows(sums[0], sums[1], a, made, p.problem.width + 8, first, k);
        }
    }
    else
    {
        T* const piece = reinterpret_cast<T*>(shared + at.piece);
        for (int n = 0; n < keys.pieces; ++n)
        {
            __syncthreads();
            stagePiece(piece, keys, n, token, open);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kPiece; k += 16)
            {
                loadRows(a, query, stride, 0, kPiece * n + k);
                multiplyByRows(sums[0], sums[1], a, piece, kStride, first, k);
            }
        }
    }
    float* const scores = reinterpret_cast<float*>(shared + at.scores);
    int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i)
    {
        int const row = lane / 4 + 8 * (i % 4 / 2);
        scores[row * kScoreStride + first + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = sums[i / 4][i % 4];
    }
    __syncthreads();
}

template <typename T>
__device__ __forceinline__ float maskAt(Arguments const& p, Place const& at, int row, int token)
{
    int const batch = p.problem.maskByRow ? at.batch : 0;
    int64_t const line = static_cast<int64_t>(batch) * p.problem.queries + queryOf(p.problem, at, kRows, row).y;
    return toFloat(static_cast<T const*>(p.pointers.mask)[line * p.problem.slots + token]);
}

// Which tokens of the tile any of its queries may look at: [64], and whether there are any, behind them.
template <typename T>
__device__ __forceinline__ bool findOpen(Arguments const& p, Place const& at, int* open, int token, int tokens)
{
    if (static_cast<int>(threadIdx.x) <= kTokens)
    {
        open[threadIdx.x] = 0;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < at.rows * kTokens; i += kThreads)
    {
        if (i % kTokens < tokens && maskAt<T>(p, at, i / kTokens, token + i % kTokens) > kClosed)
        {
            open[i % kTokens] = 1;
            open[kTokens] = 1;
        }
    }
    __syncthreads();
    bool const any = open[kTokens] != 0;
    __syncthreads();
    return any;
}

struct State
{
    float* maximum; // [16]
    float* total;
    float* factor; // of what was summed up before
    float* found;  // [16][8], by the threads of a row
};

// Scores to weights exp(score - largest so far), as halves; moves the row's largest score and sum on.
template <typename T>
__device__ __forceinline__ void weighTile(
    Arguments const& p, Place const& at, unsigned char* shared, Layout const& layout, State const& state, int token,
    int tokens)
{
    float* const scores = reinterpret_cast<float*>(shared + layout.scores);
    T* const weights = reinterpret_cast<T*>(shared + layout.shares);
    int const row = static_cast<int>(threadIdx.x) / kPartners;
    int const part = static_cast<int>(threadIdx.x) % kPartners;
    float own[kTokens / kPartners];
    float largest = kNothing;
#pragma unroll
    for (int i = 0; i < kTokens / kPartners; ++i)
    {
        int const place = part + kPartners * i;
        bool const there = row < at.rows && place < tokens;
        float const added = there ? maskAt<T>(p, at, row, token + place) : kNothing;
        own[i] = added > kClosed ? scores[row * kScoreStride + place] + added : kNothing;
        largest = own[i] > largest ? own[i] : largest;
    }
    state.found[row * kPartners + part] = largest;
    __syncthreads();
    float const before = state.maximum[row];
    largest = before;
    for (int i = 0; i < kPartners; ++i)
    {
        float const other = state.found[row * kPartners + i];
        largest = other > largest ? other : largest;
    }
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTokens / kPartners; ++i)
    {
        float const weight = own[i] > kNothing ? expf(own[i] - largest) : 0.0f;
        T rounded;
        fromFloat(weight, rounded);
        weights[row * kStride + part + kPartners * i] = rounded;
        sum += toFloat(rounded);
    }
    state.found[row * kPartners + part] = sum;
    __syncthreads();
    if (part == 0)
    {
        float const factor = before > kNothing ? expf(before - largest) : 0.0f;
        sum = state.total[row] * factor;
        for (int i = 0; i < kPartners; ++i)
        {
            sum += state.found[row * kPartners + i];
        }
        state.total[row] = sum;
        state.factor[row] = factor;
        state.maximum[row] = largest;
    }
    __syncthreads();
}

// sums [16][64 of each piece] = factor * sums + weights * values: each warp 16 columns of a piece.
template <typename T>
__device__ __forceinline__ void mixTile(float (&sums)[kPieces][2][4], unsigned char* shared, Layout const& at,
    State const& state, Cached const& values, int slice, int token, int const* open)
{
    T* const piece = reinterpret_cast<T*>(shared + at.piece);
    T* const weights = reinterpret_cast<T*>(shared + at.shares);
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const column = static_cast<int>(threadIdx.x) / 32 * 16;
    float const factors[2] = {state.factor[lane / 4], state.factor[lane / 4 + 8]};
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
    {
        if (slice * kPieces + n < values.pieces)
        {
            stagePiece(piece, values, slice * kPieces + n, token, open);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                sums[n][i / 4][i % 4] *= factors[i % 4 / 2];
            }
#pragma unroll
            for (int k = 0; k < kTokens; k += 16)
            {
                uint32_t a[4];
                loadRows(a, weights, kStride, 0, k);
                multiplyByColumns(sums[n][0], sums[n][1], a, piece, kStride, k, column);
            }
            __syncthreads();
        }
    }
}

// What the block found, for the second launch: sums that are not divided yet, and what they are to be held against.
__device__ __forceinline__ void writeShare(
    Arguments const& p, Place const& at, float const (&sums)[kPieces][2][4], State const& state, int pieces)
{
    int64_t const row = static_cast<int64_t>(at.row) * p.splits + at.split;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const warp = static_cast<int>(threadIdx.x) / 32;
    int const width = kPiece * pieces;
#pragma unroll
    for (int n = 0; n < kPieces; ++n)
    {
        int const piece = at.slice * kPieces + n;
        if (piece < pieces)
        {
#pragma unroll
            for (int i = 0; i < 8; ++i)
            {
                int const own = lane / 4 + 8 * (i % 4 / 2);
                int const column = kPiece * piece + 16 * warp + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
                p.shares[(row * kRows + own) * width + column] = sums[n][i / 4][i % 4];
            }
        }
    }
    if (at.slice == 0 && static_cast<int>(threadIdx.x) < kRows)
    {
        p.maximum[row * kRows + threadIdx.x] = state.maximum[threadIdx.x];
        p.total[row * kRows + threadIdx.x] = state.total[threadIdx.x];
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) attendStretch(Arguments p)
{
    unsigned char* const shared = sharedMemory();
    Layout const layout = layoutOf(p.problem);
    Place const at = placeOf(p, kRows);
    Problem const& problem = p.problem;
    int const keyHeads = problem.keys.groups * (problem.headsPerGroup > 0 ? problem.headsPerGroup : 1);
    int const head = at.unit / (p.units / keyHeads);
    int const keyGroup = problem.headsPerGroup > 0 ? head / problem.headsPerGroup : head;
    int const valueGroup = at.unit / (p.units / problem.values.groups);
    Cached const keys
        = cachedOf(problem.keys, p.pointers.keys, p.pointers.keySteps, problem.slots, at.batch, keyGroup);
    Cached const values
        = cachedOf(problem.values, p.pointers.values, p.pointers.valueSteps, problem.slots, at.batch, valueGroup);
    float* const numbers = reinterpret_cast<float*>(shared + layout.state);
    State const state{numbers, numbers + kRows, numbers + 2 * kRows, numbers + 3 * kRows};
    int* const open = reinterpret_cast<int*>(numbers + (3 + kPartners) * kRows);
    if (static_cast<int>(threadIdx.x) < kRows)
    {
        state.maximum[threadIdx.x] = kNothing;
        state.total[threadIdx.x] = 0.0f;
    }
    stageQuery(p, at, reinterpret_cast<T*>(shared + layout.query), keys);
    __syncthreads();
    float sums[kPieces][2][4] = {};
    int const begin = at.split * p.stretch;
    int const end = begin + p.stretch < problem.slots ? begin + p.stretch : problem.slots;
    for (int token = begin; token < end; token += kTokens)
    {
        int const tokens = end - token < kTokens ? end - token : kTokens;
        if (findOpen<T>(p, at, open, token, tokens))
        {
            scoreTile<T>(p, shared, layout, keys, head, token, open);
            weighTile<T>(p, at, shared, layout, state, token, tokens);
            mixTile<T>(sums, shared, layout, state, values, at.slice, token, open);
        }
    }
    writeShare(p, at, sums, state, values.pieces);
}

// One row of the result: the stretches' shares, in order.
template <typename T>
__global__ void __launch_bounds__(kThreads) joinStretches(Arguments p)
{
    Place const at = placeOf(p, kRows);
    Problem const& problem = p.problem;
    int const row = static_cast<int>(blockIdx.y);
    if (row >= at.rows)
    {
        return;
    }
    int const pieces = piecesOf(problem.values);
    int const width = kPiece * pieces;
    int64_t const first = static_cast<int64_t>(at.row) * p.splits;
    float largest = kNothing;
    for (int s = 0; s < p.splits; ++s)
    {
        float const other = p.maximum[(first + s) * kRows + row];
        largest = other > largest ? other : largest;
    }
    float total = 0.0f;
    for (int s = 0; s < p.splits; ++s)
    {
        int64_t const share = (first + s) * kRows + row;
        total += p.total[share] > 0.0f ? p.total[share] * expf(p.maximum[share] - largest) : 0.0f;
    }
    int2 const of = queryOf(p.problem, at, kRows, row);
    int64_t const vector = (static_cast<int64_t>(at.batch) * problem.heads + of.x) * problem.queries + of.y;
    T* const out = static_cast<T*>(p.pointers.mixed) + vector * rankOf(problem.values);
    for (int column = static_cast<int>(threadIdx.x); column < width; column += kThreads)
    {
        int const number = numberAt(column / kPiece, column % kPiece, problem.values.held, problem.values.form);
        float sum = 0.0f;
        for (int s = 0; s < p.splits; ++s)
        {
            int64_t const share = (first + s) * kRows + row;
            if (p.total[share] > 0.0f)
            {
                sum += p.shares[share * width + column] * expf(p.maximum[share] - largest);
            }
        }
        if (number >= 0)
        {
            fromFloat(total > 0.0f ? sum / total : 0.0f, out[number]);
        }
    }
}

} // namespace skipcat::latent

#endif
