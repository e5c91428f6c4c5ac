// The kernel: every warp walks its tokens of the cache, and a block joins what its warps found.

#ifndef SKIPCAT_LATENT_WALK_ATTEND_CUH
#define SKIPCAT_LATENT_WALK_ATTEND_CUH

#include "walk_values.cuh"

namespace skipcat::latent
{

// A warp's way through the context: stage i begins at token first + i * step, and there are `count`.
struct Way
{
    int first, step, count;
};

template <int MT>
__device__ __forceinline__ Way wayOf(WalkArguments const& p, Place const& at)
{
    Way way{};
    way.first = (kWarps * at.split + static_cast<int>(threadIdx.x) / 32) * 16 * MT;
    way.step = kWarps * p.splits * 16 * MT;
    way.count = way.first < p.problem.slots ? (p.problem.slots - way.first - 1) / way.step + 1 : 0;
    return way;
}

// The stages before the first and behind the last with a token that is open to some row of the block.
template <int MT>
__device__ __forceinline__ int2 openStages(
    WalkArguments const& p, Place const& at, Way const& way, uint16_t const* mask)
{
    constexpr int kTokens = 16 * MT;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const last = p.rows * at.rowTile + at.rows - 1;
    int const queries = p.problem.queries;
    // Rows are the queries of one head after another: all of them, unless there are fewer rows.
    int const many = at.rows < queries ? at.rows : queries;
    float low = static_cast<float>(way.count);
    float high = -1.0f;
    for (int q = 0; q < many; ++q)
    {
        uint16_t const* const line = mask + static_cast<int64_t>((last - q) % queries) * p.problem.slots;
#pragma unroll 8
        for (int i = lane / kTokens; i < way.count; i += 32 / kTokens)
        {
            int const token = way.first + i * way.step + lane % kTokens;
            // Below -16384, in both types: a sign, and more than its exponent.
            uint16_t const bits = token < p.problem.slots ? line[token] : 0xffffu;
            bool const open = p.problem.bf16 ? bits < 0xc680u : bits < 0xf400u;
            low = open ? fminf(low, static_cast<float>(i)) : low;
            high = open ? fmaxf(high, static_cast<float>(i)) : high;
        }
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
    {
        low = fminf(low, shuffleXor(low, distance));
        high = fmaxf(high, shuffleXor(high, distance));
    }
    return {static_cast<int>(low), static_cast<int>(high) + 1};
}

template <typename T, int NT, int MT, bool REBUILT>
__device__ __forceinline__ void scoreStage(Scores<NT, MT>& scores, WalkArguments const& p, unsigned char const* stage,
    T const* query, Map<T> const& map)
{
    auto const score = [&](auto form)
    {
        constexpr Form kForm = decltype(form)::value;
        if constexpr (REBUILT)
        {
            scoreRebuilt<T, kForm, NT, MT>(scores, p, stage, query, map);
        }
        else
        {
            scoreCached<T, kForm, NT, MT>(scores, p, stage, query);
        }
    };
    withForm(p.problem.keys.form, score);
}

// Stages of the ring from `begin` on, each a group of copies, be it empty; the ring begins with stage `from` of the
// way.
__device__ __forceinline__ void fillRing(WalkArguments const& p, unsigned char* ring, Stream const& keys,
    Stream const& values, Way const& way, int from, int begin, int tokens)
{
    for (int i = begin; i < p.stages - 1; ++i)
    {
        if (from + i < way.count)
        {
            copyStage(p.at, ring + i * p.at.stageBytes, keys, values, way.first + (from + i) * way.step, tokens,
                p.problem.slots);
        }
        closeCopies();
    }
}

// What the warps of a block found, by rows: [warps][rows][columns], and of each row the largest score and the total.
template <int NT, int FRAGMENTS>
struct FoundByRows
{
    static constexpr int kRows = 8 * NT;
    static constexpr int kColumns = 16 * FRAGMENTS;

    __device__ __forceinline__ explicit FoundByRows(float* shared)
        : sums(shared)
        , maxima(shared + kWarps * kRows * kColumns)
        , totals(maxima + kWarps * kRows)
    {
    }

    float *sums, *maxima, *totals;
};

template <int NT, int FRAGMENTS>
__device__ __forceinline__ void layFound(FoundByRows<NT, FRAGMENTS> const& to, Found<NT, FRAGMENTS>& found)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const first = static_cast<int>(threadIdx.x) / 32 * to.kRows;
#pragma unroll
    for (int i = 0; i < 2 * NT; ++i)
    {
        float total = found.total[i / 2][i % 2];
        for (int distance = 4; distance < 32; distance *= 2)
        {
            total += shuffleXor(total, distance);
        }
        int const row = first + i / 2 * 8 + 2 * (lane % 4) + i % 2;
        if (lane < 4)
        {
            to.maxima[row] = found.maximum[i / 2][i % 2];
            to.totals[row] = total;
        }
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f)
        {
            float* const column = to.sums + row * to.kColumns + 16 * f + lane / 4;
            column[0] = found.sums[f][i / 2][i % 2];
            column[8] = found.sums[f][i / 2][i % 2 + 2];
        }
    }
    __syncthreads();
}

// The warps joined in their order, and left for the second launch.
template <int NT, int FRAGMENTS>
__device__ __forceinline__ void leaveShare(
    WalkArguments const& p, Place const& at, FoundByRows<NT, FRAGMENTS> const& found)
{
    constexpr int kColumnsOf = 16 * FRAGMENTS;
    Side const& side = p.problem.values;
    int64_t const first = (static_cast<int64_t>(at.row) * p.splits + at.split) * p.rows;
    for (int i = static_cast<int>(threadIdx.x); i < at.rows * kColumnsOf; i += kWalkThreads)
    {
        int const row = i / kColumnsOf;
        int const column = i % kColumnsOf;
        float largest = kNothing;
        for (int w = 0; w < kWarps; ++w)
        {
            largest = fmaxf(largest, found.maxima[w * found.kRows + row]);
        }
        float sum = 0.0f;
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w)
        {
            // A warp that found nothing has sums of zero.
            int const of = w * found.kRows + row;
            float const factor = powerOf2((found.maxima[of] - largest) * kLog2e);
            sum += factor * found.sums[of * kColumnsOf + column];
            total += factor * found.totals[of];
        }
        int const number
            = numberOfFragment(at.slice * FRAGMENTS + column / 16, column % 16, side.held, side.form);
        if (number >= 0)
        {
            p.shares[(first + row) * rankOf(side) + number] = sum;
        }
        if (column == 0 && at.slice == 0)
        {
            p.maximum[first + row] = largest;
            p.total[first + row] = total;
        }
    }
}

// What a warp walks with; its block's part of shared memory, but for turned queries and the ring, which are its own.
template <typename T>
struct Walk
{
    Stream keys, values;
    Way way;
    int head;  // of the keys
    int units; // of the values, that the block sums up
    T const* mask;
    T *query, *turned, *up;
    __half2* turns;
    float* mean;
    unsigned char* ring;
};

template <typename T, int MT, int FRAGMENTS, bool REBUILT>
__device__ __forceinline__ Walk<T> walkOf(WalkArguments const& p, Place const& at)
{
    unsigned char* const shared = sharedMemory();
    Problem const& problem = p.problem;
    int const warp = static_cast<int>(threadIdx.x) / 32;
    int const perGroup = REBUILT ? problem.headsPerGroup : 1;
    int const sliceUnits = FRAGMENTS / stepsPerUnit(problem.values.form);
    int const ahead = at.slice * sliceUnits;
    int const left = unitsIn(problem.values) - ahead;
    Walk<T> walk{};
    walk.head = at.unit / (p.units / (problem.keys.groups * perGroup));
    walk.units = left < sliceUnits ? left : sliceUnits;
    walk.keys = streamOf(problem.keys, p.pointers.keys, p.pointers.keySteps, problem.slots, at.batch,
        walk.head / perGroup, 0, bytesOf(problem.keys), p.at.keyStride);
    walk.values = streamOf(problem.values, p.pointers.values, p.pointers.valueSteps, problem.slots, at.batch,
        at.unit / (p.units / problem.values.groups), kUnit * ahead, kUnit * sliceUnits, p.at.valueStride);
    walk.way = wayOf<MT>(p, at);
    walk.mask = static_cast<T const*>(p.pointers.mask)
        + static_cast<int64_t>(problem.maskByRow ? at.batch : 0) * problem.queries * problem.slots;
    walk.query = reinterpret_cast<T*>(shared + p.at.query);
    walk.turned = reinterpret_cast<T*>(shared + p.at.turned) + warp * p.rows * p.at.queryStride;
    walk.up = reinterpret_cast<T*>(shared + p.at.up);
    walk.turns = reinterpret_cast<__half2*>(shared + p.at.turns);
    walk.mean = reinterpret_cast<float*>(shared + p.at.mean);
    walk.ring = shared + p.at.ring + warp * p.stages * p.at.stageBytes;
    return walk;
}

// Lets the first stages come, lays out what the block keeps, and finds the stages that are open: [first, last).
template <typename T, int MT, bool REBUILT>
__device__ __forceinline__ int2 beginWalk(WalkArguments const& p, Place const& at, Walk<T> const& walk)
{
    constexpr int kTokensOf = 16 * MT;
    if (walk.way.count > 0)
    {
        copyStage(p.at, walk.ring, walk.keys, walk.values, walk.way.first, kTokensOf, p.problem.slots);
    }
    layQuery(p, at, walk.query);
    if constexpr (REBUILT)
    {
        layMap(p, walk.head, walk.up, walk.mean);
    }
    closeCopies();
    fillRing(p, walk.ring, walk.keys, walk.values, walk.way, 0, 1, kTokensOf);
    fillUnits(p, walk.ring, kTokensOf);
    int2 const open = openStages<MT>(p, at, walk.way, reinterpret_cast<uint16_t const*>(walk.mask));
    if constexpr (REBUILT)
    {
        layTurns(p, walk.turns, kTokensOf);
    }
    awaitStages(p.stages - 2);
    __syncthreads();
    if (open.x > 0 && open.x < open.y)
    {
        awaitStages(0); // what was begun with is closed
        __syncwarp();
        fillRing(p, walk.ring, walk.keys, walk.values, walk.way, open.x, 0, kTokensOf);
    }
    return open;
}

// Stage i of the way, which lies in place `slot` of the ring; lets the last of the ring come.
template <typename T, int NT, int MT, int FRAGMENTS, bool REBUILT>
__device__ __forceinline__ void takeStage(WalkArguments const& p, Place const& at, Walk<T> const& walk,
    int const (&lines)[NT][2], Found<NT, FRAGMENTS>& found, int i, int slot, int end)
{
    int const token = walk.way.first + i * walk.way.step;
    int const next = i + p.stages - 1;
    if (next < end)
    {
        int const to = slot == 0 ? p.stages - 1 : slot - 1;
        copyStage(p.at, walk.ring + to * p.at.stageBytes, walk.keys, walk.values,
            walk.way.first + next * walk.way.step, 16 * MT, p.problem.slots);
    }
    closeCopies();
    Scores<NT, MT> added;
    bool const closed = readMask<T, NT, MT>(added, lines, walk.mask, token, p.problem.slots);
    if constexpr (REBUILT)
    {
        turnQueries(p, walk.query, walk.turned, at.rows, token);
    }
    awaitStages(p.stages - 1);
    __syncwarp();
    unsigned char* const stage = walk.ring + slot * p.at.stageBytes;
    Scores<NT, MT> scores{};
    Map<T> const map{walk.up, walk.turns, walk.mean};
    scoreStage<T, NT, MT, REBUILT>(scores, p, stage, REBUILT ? walk.turned : walk.query, map);
    if (anyLane(closed))
    {
        clearClosed<NT, MT>(added, p.at, stage, walk.values.chunks, walk.values.steps != nullptr);
    }
    uint32_t weights[MT][NT][2];
    weigh<T, NT, MT, FRAGMENTS>(weights, scores, added, found);
    withForm(p.problem.values.form, [&](auto form)
        { mixValues<T, decltype(form)::value, NT, MT, FRAGMENTS>(found, p.at, stage, weights, walk.units); });
    __syncwarp();
}

template <typename T, int NT, int MT, bool REBUILT>
__global__ void __launch_bounds__(kWalkThreads, NT == 1 && !REBUILT ? 3 : 2) walkContext(WalkArguments p)
{
    constexpr int kFragments = fragmentsOf(8 * NT, REBUILT);
    Place const at = placeOf(p, p.rows);
    Walk<T> const walk = walkOf<T, MT, kFragments, REBUILT>(p, at);
    awaitPrevious();
    releaseNext();
    int2 const open = beginWalk<T, MT, REBUILT>(p, at, walk);
    Found<NT, kFragments> found{};
    int lines[NT][2];
    findLines<NT>(lines, p, at);
#pragma unroll
    for (int i = 0; i < 2 * NT; ++i)
    {
        found.maximum[i / 2][i % 2] = kNothing;
    }
    for (int i = open.x, slot = 0; i < open.y; ++i)
    {
        takeStage<T, NT, MT, kFragments, REBUILT>(p, at, walk, lines, found, i, slot, open.y);
        slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    awaitStages(0);
    __syncthreads();
    FoundByRows<NT, kFragments> const byRows(reinterpret_cast<float*>(sharedMemory() + p.at.ring));
    layFound<NT, kFragments>(byRows, found);
    leaveShare<NT, kFragments>(p, at, byRows);
}

} // namespace skipcat::latent

#endif
