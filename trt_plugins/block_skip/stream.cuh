// Few rows (up to 8) against weights whose rows are aligned: out = init + in w, bound by reading w once.
//
// All blocks are on the chip at once, each with an equal share of w (feed.cuh), whose next stages are on their way
// while the sums of one segment are added. Blocks that share a tile meet in `partial`: the one that comes last, by a
// counter, adds what they have in order, so that the sum does not depend on who that was.
//
// Sums of codes are kept for each group of rows, and multiplied by its scale where the group ends.

#ifndef SKIPCAT_STREAM_CUH
#define SKIPCAT_STREAM_CUH

#include "feed.cuh"

namespace skipcat
{

constexpr int kPassRows = 2; // of `in`, whose sums the warps put together at once

__host__ __device__ constexpr size_t stagedBytes(int rows, int slice)
{
    return (static_cast<size_t>(rows) * stagedStride(slice) * 2 + 15) / 16 * 16;
}

// The rings, the staged inputs, the warps' sums, and the ticket.
template <WeightType W, int CHUNK>
__host__ __device__ constexpr size_t streamSharedBytes(int rows, int slice)
{
    return static_cast<size_t>(kDecodeWarps) * kDepth * stageBytes<W, CHUNK>() + stagedBytes(rows, slice)
        + static_cast<size_t>(kQuarters) * kPassRows * streamTile<W>() * 4 + 16;
}

// The lane's four of 16 rows of a stage, from the ring.
template <typename T, WeightType W>
__device__ __forceinline__ void takeRows(Weights<T, W>& weights, unsigned char const* from)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const group = lane / 4;
    int const turn = lane % 4;
    if constexpr (W == WeightType::kInt4)
    {
        int const start = turn * 256 + (group * 8 ^ turn * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            uint2 const value = *reinterpret_cast<uint2 const*>(from + (start ^ i % 2 * 64) + i / 2 * 128);
            weights.word[i][0] = value.x, weights.word[i][1] = value.y;
        }
    }
    else
    {
        int const start = turn * 512 + (group * 16 ^ turn * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            uint4 const value = *reinterpret_cast<uint4 const*>(from + start + i * 128);
            weights.word[i][0] = value.x, weights.word[i][1] = value.y;
            weights.word[i][2] = value.z, weights.word[i][3] = value.w;
        }
    }
}

// Sums of a thread's columns; of codes also those of the group that is under way, and its scales.
template <typename T, WeightType W>
struct Sums
{
    static constexpr int kPairs = Weights<T, W>::kColumns / 2;
    float total[kPairs][4];
    float group[W == WeightType::kFloat ? 1 : kPairs][4];
    Scales<T> scales;

    __device__ __forceinline__ void add(Weights<T, W> const& weights, uint2 in)
    {
        if constexpr (W == WeightType::kFloat)
        {
            multiplyStep<T>(total, weights, in);
        }
        else
        {
            multiplyCodes<T>(group, weights, in);
        }
    }

    // The group that begins here has these scales.
    __device__ __forceinline__ void open(unsigned char const* ofGroup)
    {
        int const lane = static_cast<int>(threadIdx.x) % 32;
        uint4 const low = reinterpret_cast<uint4 const*>(ofGroup + lane / 4 * 32)[0];
        uint4 const high = reinterpret_cast<uint4 const*>(ofGroup + lane / 4 * 32)[1];
        scales.word[0] = low.x, scales.word[1] = low.y, scales.word[2] = low.z, scales.word[3] = low.w;
        scales.word[4] = high.x, scales.word[5] = high.y, scales.word[6] = high.z, scales.word[7] = high.w;
    }

    // The group's sums times its scales are part of the total.
    __device__ __forceinline__ void close()
    {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
        {
            float const left = firstOf(T{}, scales.word[i]);
            float const right = secondOf(T{}, scales.word[i]);
#pragma unroll
            for (int e = 0; e < 4; ++e)
            {
                total[i][e] += group[i][e] * (e < 2 ? left : right);
                group[i][e] = 0.0f;
            }
        }
    }
};

// One end of a warp's ring.
template <int BYTES>
struct RingEnd
{
    unsigned char* first;
    int at{0};

    __device__ __forceinline__ unsigned char* next()
    {
        unsigned char* const stage = first + at * BYTES;
        at = (at + 1) % kDepth;
        return stage;
    }
};

// A warp's part of a segment. `more`: there are stages to feed.
template <typename T, WeightType W, int CHUNK>
__device__ __forceinline__ void accumulateSegment(StreamArguments<T> const& p, Sums<T, W>& sums, Segment const& segment,
    T const* staged, Feed<T, W, CHUNK>& feed, bool& more, RingEnd<stageBytes<W, CHUNK>()>& filled,
    RingEnd<stageBytes<W, CHUNK>()>& used)
{
    constexpr int kRows = stageRows<W, CHUNK>();
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const quarter = static_cast<int>(threadIdx.x) / 32 / kHalves;
    int const begin = segment.start(quarter);
    int const end = segment.start(quarter + 1);
    T const* mine = staged + (lane / 4) * stagedStride(p.slice) + 4 * (lane % 4) + begin * kRows;
    int untilGroup = W == WeightType::kFloat ? 0 : p.w.groupSize - begin * kRows % p.w.groupSize;
    for (int s = begin; s < end; ++s)
    {
        awaitCopies<kDepth - 2>();
        __syncwarp();
        if (more)
        {
            feed.copy(filled.next());
            more = feed.advance();
        }
        closeCopies();
        unsigned char const* const stage = used.next();
        if constexpr (W != WeightType::kFloat)
        {
            if (untilGroup == 0)
            {
                sums.close();
                untilGroup = p.w.groupSize;
            }
            if (s == begin || untilGroup == p.w.groupSize)
            {
                sums.open(stage + stageWeightBytes<W, CHUNK>());
            }
            untilGroup -= kRows;
        }
#pragma unroll
        for (int k = 0; k < kRows; k += kStep)
        {
            Weights<T, W> weights;
            takeRows(weights, stage + k * stageRowBytes<W>());
            uint2 const in = lane / 4 < p.rows ? *reinterpret_cast<uint2 const*>(mine + k) : uint2{0, 0};
            sums.add(weights, in);
        }
        mine += kRows;
    }
    if (W != WeightType::kFloat && begin < end)
    {
        sums.close();
    }
}

// The blocks that share a tile.
struct Sharers
{
    int first;
    int last;
    bool firstIsLater; // this is the second of two tiles that the first of them shares
};

template <typename T>
__device__ __forceinline__ Sharers sharersOf(StreamArguments<T> const& p, int tile)
{
    int const start = tile * p.tileStages;
    int const first = p.ownerOf(start);
    return {first, p.ownerOf(start + p.tileStages - 1), p.shareStart(first) < start};
}

// Where block `b` keeps its sums of a tile that it shares: of the two it may have, the later one or the other.
template <typename T, WeightType W>
__device__ __forceinline__ float* partialOf(StreamArguments<T> const& p, int b, bool later)
{
    return p.partial + static_cast<int64_t>(2 * b + (later ? 1 : 0)) * p.rows * streamTile<W>();
}

// The last of the blocks that share a tile adds what they have, and leaves the counter at zero.
template <typename T, WeightType W>
__device__ __forceinline__ void addShares(
    StreamArguments<T> const& p, int tile, Sharers const& sharers, unsigned* ticket)
{
    constexpr int kTile = streamTile<W>();
    int const thread = static_cast<int>(threadIdx.x);
    __threadfence();
    __syncthreads();
    if (thread == 0)
    {
        *ticket = atomicAdd(p.counters + tile, 1u);
    }
    __syncthreads();
    if (*ticket != static_cast<unsigned>(sharers.last - sharers.first))
    {
        return;
    }
    __threadfence();
    for (int o = thread; o < p.rows * kTile; o += kDecodeThreads)
    {
        int const column = tile * kTile + o % kTile;
        if (column < p.w.columns)
        {
            float sum = loadShared(partialOf<T, W>(p, sharers.first, sharers.firstIsLater) + o);
#pragma unroll 4
            for (int b = sharers.first + 1; b <= sharers.last; ++b)
            {
                sum += loadShared(partialOf<T, W>(p, b, false) + o);
            }
            finish(p, o / kTile, column, sum);
        }
    }
    if (thread == 0)
    {
        p.counters[tile] = 0;
    }
}

// What the block's warps have of a tile: its results, or this block's share of them.
template <typename T, WeightType W>
__device__ __forceinline__ void reduceSegment(
    StreamArguments<T> const& p, Sums<T, W> const& sums, int tile, Sharers const& sharers, float* warps)
{
    constexpr int kTile = streamTile<W>();
    constexpr int kColumns = Weights<T, W>::kColumns;
    int const thread = static_cast<int>(threadIdx.x);
    int const lane = thread % 32;
    int const warp = thread / 32;
    int const block = static_cast<int>(blockIdx.x);
    float* const share = partialOf<T, W>(p, block, block == sharers.first && sharers.firstIsLater);
    float* const mine = warps + warp / kHalves * kPassRows * kTile + warp % kHalves * decodeTile<W>() + kColumns * (lane / 4);
    for (int top = 0; top < p.rows; top += kPassRows)
    {
        if (lane % 4 == top / kPassRows)
        {
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
            {
                mine[i] = sums.total[i / 2][i % 2 * 2];
                mine[kTile + i] = sums.total[i / 2][i % 2 * 2 + 1];
            }
        }
        __syncthreads();
        for (int o = thread; o < kPassRows * kTile && top + o / kTile < p.rows; o += kDecodeThreads)
        {
            int const column = tile * kTile + o % kTile;
            float sum = 0.0f;
#pragma unroll
            for (int quarter = 0; quarter < kQuarters; ++quarter)
            {
                sum += warps[quarter * kPassRows * kTile + o];
            }
            if (sharers.first < sharers.last)
            {
                share[top * kTile + o] = sum;
            }
            else if (column < p.w.columns)
            {
                finish(p, top + o / kTile, column, sum);
            }
        }
        if (top + kPassRows < p.rows)
        {
            __syncthreads();
        }
    }
}

template <typename T, WeightType W, int CHUNK>
__global__ void __launch_bounds__(kDecodeThreads, 2) streamProduct(StreamArguments<T> p)
{
    constexpr int kRows = stageRows<W, CHUNK>();
    constexpr int kBytes = stageBytes<W, CHUNK>();
    unsigned char* const shared = sharedMemory();
    int const warp = static_cast<int>(threadIdx.x) / 32;
    RingEnd<kBytes> filled{shared + warp * kDepth * kBytes};
    RingEnd<kBytes> used = filled;
    unsigned char* const after = shared + kDecodeWarps * kDepth * kBytes;
    T* const staged = reinterpret_cast<T*>(after);
    float* const warps = reinterpret_cast<float*>(after + stagedBytes(p.rows, p.slice));
    unsigned* const ticket = reinterpret_cast<unsigned*>(warps + kQuarters * kPassRows * streamTile<W>());
    releaseNext();
    Walk walk = walkOf<kRows>(p);
    // With a whole tile and more all inputs are staged at once, if there is room for them.
    bool const whole = walk.left >= walk.tileStages && walk.tileStages <= walk.most;
    Feed<T, W, CHUNK> feed(p.w, walk);
    bool more = feed.enter();
    if (!p.settled)
    {
        Feed<T, W, CHUNK> ahead = feed;
        bool left = more;
        for (int i = 1; i < kDepth && left; ++i)
        {
            ahead.prefetch();
            left = ahead.advance();
        }
        awaitPrevious();
    }
    for (int i = 1; i < kDepth; ++i)
    {
        if (more)
        {
            feed.copy(filled.next());
            more = feed.advance();
        }
        closeCopies();
    }
    if (p.settled)
    {
        awaitPrevious();
    }
    Sums<T, W> sums{};
    Segment segment{};
    bool begun = false;
    while (walk.next(segment))
    {
        int const from = whole ? 0 : segment.begin * kRows;
        if (!whole || !begun)
        {
            if (begun)
            {
                __syncthreads(); // what was staged before is read
            }
            int const to = whole ? p.w.rows : segment.end * kRows;
            stageInputs<kRows>(p, staged, from, to < p.w.rows ? to : p.w.rows);
        }
        begun = true;
        __syncthreads();
        Sharers const sharers = sharersOf(p, segment.tile);
        accumulateSegment(p, sums, segment, staged - from, feed, more, filled, used);
        if (segment.last)
        {
            reduceSegment(p, sums, segment.tile, sharers, warps);
            if (sharers.first < sharers.last)
            {
                addShares<T, W>(p, segment.tile, sharers, ticket);
            }
            sums = Sums<T, W>{};
        }
    }
}

} // namespace skipcat

#endif
