// What a block lays into shared memory once, and what its warps let come in the background.

#ifndef SKIPCAT_LATENT_WALK_COPIES_CUH
#define SKIPCAT_LATENT_WALK_COPIES_CUH

#include "walk_fragments.cuh"

namespace skipcat::latent
{

// One side of the cache as a warp reads it, of its batch, group and slice: chunks of 16 bytes, one lane after another.
struct Stream
{
    unsigned char const* held; // where the lane begins
    uint32_t const* steps;     // null of numbers
    int pitch;                 // bytes of a token
    int chunks;                // that are read of it
    int chunk, to;             // the lane's first, and where it goes in a stage
    int rest;                  // chunks that 32 lanes are beyond whole tokens
    int step, toStep;          // to the lane's next chunk, and beyond that where it is of one more token
    int carry, toCarry;
};

__device__ __forceinline__ Stream streamOf(Side const& side, void const* held, void const* steps, int slots, int batch,
    int group, int offset, int most, int stride)
{
    Cached const whole = cachedOf(side, held, steps, slots, batch, group);
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const left = whole.bytes - offset;
    Stream stream{};
    stream.steps = side.form == Form::kNumbers ? nullptr : reinterpret_cast<uint32_t const*>(whole.steps);
    stream.pitch = whole.bytes;
    stream.chunks = (left < most ? left : most) / 16;
    int const rows = 32 / stream.chunks;
    int const row = lane / stream.chunks;
    stream.rest = 32 - rows * stream.chunks;
    stream.chunk = lane - row * stream.chunks;
    stream.held = whole.held + offset + row * stream.pitch + 16 * stream.chunk;
    stream.to = row * stride + 16 * stream.chunk;
    stream.step = rows * stream.pitch + 16 * stream.rest;
    stream.toStep = rows * stride + 16 * stream.rest;
    stream.carry = stream.pitch - 16 * stream.chunks;
    stream.toCarry = stride - 16 * stream.chunks;
    return stream;
}

// `tokens` rows, of which `there` exist; the others are the last one again, and closed.
__device__ __forceinline__ void copyRows(unsigned char* to, Stream const& of, int64_t token, int tokens, int there)
{
    unsigned char const* from = of.held + token * of.pitch;
    to += of.to;
    int chunk = of.chunk;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    if (there == tokens)
    {
        for (int i = lane; i < tokens * of.chunks; i += 32)
        {
            copyWhole16(to, from);
            to += of.toStep;
            from += of.step;
            chunk += of.rest;
            if (chunk >= of.chunks)
            {
                chunk -= of.chunks;
                to += of.toCarry;
                from += of.carry;
            }
        }
        return;
    }
    int row = lane / of.chunks;
    for (int i = lane; i < tokens * of.chunks; i += 32)
    {
        int const beyond = row < there ? 0 : row - there + 1;
        copyWhole16(to, from - beyond * of.pitch);
        to += of.toStep;
        from += of.step;
        chunk += of.rest;
        row += 32 / of.chunks;
        if (chunk >= of.chunks)
        {
            chunk -= of.chunks;
            to += of.toCarry;
            from += of.carry;
            ++row;
        }
    }
}

__device__ __forceinline__ void copySteps(unsigned char* to, Stream const& from, int64_t token, int tokens, int there)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    if (from.steps != nullptr && lane < tokens)
    {
        copyAsync4(to + 4 * lane, from.steps + token + (lane < there ? lane : there - 1));
    }
}

// Zeros behind the keys of a warp's stages, where they end within a unit: copies do not reach there.
__device__ __forceinline__ void fillUnits(WalkArguments const& p, unsigned char* ring, int tokens)
{
    int const bytes = bytesOf(p.problem.keys);
    if (bytes % kUnit == 0)
    {
        return;
    }
    for (int i = static_cast<int>(threadIdx.x) % 32; i < p.stages * tokens; i += 32)
    {
        unsigned char* const row = ring + i / tokens * p.at.stageBytes + i % tokens * p.at.keyStride;
        *reinterpret_cast<uint4*>(row + bytes) = uint4{0, 0, 0, 0};
    }
}

// A stage: keys and values of `tokens` tokens from `token` on, and their steps.
__device__ __forceinline__ void copyStage(WalkLayout const& at, unsigned char* stage, Stream const& keys,
    Stream const& values, int token, int tokens, int slots)
{
    int const there = slots - token < tokens ? slots - token : tokens;
    copyRows(stage, keys, token, tokens, there);
    copyRows(stage + at.valuesAt, values, token, tokens, there);
    copySteps(stage + at.keyStepsAt, keys, token, tokens, there);
    copySteps(stage + at.valueStepsAt, values, token, tokens, there);
}

__device__ __forceinline__ void awaitStages(int open)
{
    switch (open)
    {
    case 0: return awaitCopies<0>();
    case 1: return awaitCopies<1>();
    case 2: return awaitCopies<2>();
    default: return awaitCopies<3>();
    }
}

// Rows of queries in the order of the keys' fragments; of rebuilt keys the halves of a query, each filled up. Where
// that leaves 16 bytes together, they come in the background.
template <typename T>
__device__ __forceinline__ void layQuery(WalkArguments const& p, Place const& at, T* query)
{
    Problem const& problem = p.problem;
    bool const whole = p.at.pairs > 0 || problem.keys.form == Form::kNumbers;
    int const filled = p.at.pairs > 0 ? p.at.pairs : p.at.columns;
    int const there = p.at.pairs > 0 ? problem.width / 2 : problem.width;
    T const* const from = static_cast<T const*>(p.pointers.query);
    int const count = whole ? 8 : 1;
    int const each = p.at.columns / count;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < p.rows * each; i += kWalkThreads)
    {
        int const row = i / each;
        int const column = i % each * count;
        int2 const of = queryOf(p.problem, at, p.rows, row < at.rows ? row : 0);
        int64_t const vector = (static_cast<int64_t>(at.batch) * problem.heads + of.x) * problem.queries + of.y;
        T* const to = query + row * p.at.queryStride + column;
        int const within = column % filled;
        if (whole)
        {
            bool const is = row < at.rows && within < there;
            copyAsync16(to, is ? from + vector * problem.width + within + column / filled * there : from, is ? 16 : 0);
            continue;
        }
        int const number = numberOfColumn(column, problem.keys.held, problem.keys.form);
        fromFloat(row < at.rows && number >= 0 ? toFloat(from[vector * problem.width + number]) : 0.0f, *to);
    }
}

// The map of a head in the background, rows in the order of the keys' fragments, and the mean.
template <typename T>
__device__ __forceinline__ void layMap(WalkArguments const& p, int head, T* up, float* mean)
{
    Problem const& problem = p.problem;
    int const half = problem.width / 2;
    int const rows = 16 * stepsPerUnit(problem.keys.form) * unitsIn(problem.keys);
    int const each = 2 * p.at.pairs / 8;
    int64_t const matrix = static_cast<int64_t>(rankOf(problem.keys)) * problem.width;
    T const* const from = static_cast<T const*>(p.pointers.up) + head * matrix;
    for (int i = static_cast<int>(threadIdx.x); i < rows * each; i += kWalkThreads)
    {
        int const row = i / each;
        int const column = i % each * 8;
        int const pair = column % p.at.pairs;
        int const number = numberOfColumn(row, problem.keys.held, problem.keys.form);
        bool const is = number >= 0 && pair < half;
        int64_t const place = static_cast<int64_t>(number) * problem.width + pair + column / p.at.pairs * half;
        copyAsync16(up + row * p.at.upStride + column, is ? from + place : from, is ? 16 : 0);
    }
    T const* const means = static_cast<T const*>(p.pointers.mean) + static_cast<int64_t>(head) * problem.width;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * p.at.pairs; i += kWalkThreads)
    {
        int const pair = i % p.at.pairs;
        mean[i] = pair < half ? toFloat(means[pair + i / p.at.pairs * half]) : 0.0f;
    }
}

// How far the tokens of a stage are turned beyond its first: [tokens][pairs], the cosines of two pairs before their
// sines. Angles are proportional
// to the slot, so that it is the same in every stage: row j of the tables, without what row 0 turns and stretches.
__device__ __forceinline__ void layTurns(WalkArguments const& p, __half2* turns, int tokens)
{
    int const half = p.problem.width / 2;
    for (int pair = 2 * (static_cast<int>(threadIdx.x) % 32); pair < p.at.pairs; pair += 64)
    {
        bool const is = pair < half;
        float2 const one{1.0f, 1.0f};
        float2 const none{0.0f, 0.0f};
        auto const read = [&](float const* table, int row, float2 otherwise)
        { return is ? *reinterpret_cast<float2 const*>(table + row * half + pair) : otherwise; };
        float2 const c = read(p.pointers.cos, 0, one);
        float2 const s = read(p.pointers.sin, 0, none);
        float2 const scale{1.0f / (c.x * c.x + s.x * s.x), 1.0f / (c.y * c.y + s.y * s.y)};
#pragma unroll 8
        for (int token = static_cast<int>(threadIdx.x) / 32; token < tokens; token += kWarps)
        {
            int const row = token < p.problem.slots ? token : 0;
            float2 const cosine = read(p.pointers.cos, row, one);
            float2 const sine = read(p.pointers.sin, row, none);
            __half2* const to = turns + token * (p.at.pairs + 8) + pair;
            to[0] = __floats2half2_rn(
                (cosine.x * c.x + sine.x * s.x) * scale.x, (cosine.y * c.y + sine.y * s.y) * scale.y);
            to[1] = __floats2half2_rn(
                (sine.x * c.x - cosine.x * s.x) * scale.x, (sine.y * c.y - cosine.y * s.y) * scale.y);
        }
    }
}

} // namespace skipcat::latent

#endif
