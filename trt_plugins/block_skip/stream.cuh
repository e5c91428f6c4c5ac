// Few rows (up to 8) against weights whose rows are aligned: out = init + in w, bound by reading w once.
//
// All blocks are on the chip at once, each with an equal share of w (feed.cuh), whose next stages are on their way
// while the sums of one segment are added. Blocks that share a tile meet in `partial`: the one that comes last, by a
// counter, adds what they have in order, so that the sum does not depend on who that was.

#ifndef SKIPCAT_STREAM_CUH
#define SKIPCAT_STREAM_CUH

#include "feed.cuh"
#include "sums.cuh"

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

// One end of a warp's ring.
template <int BYTES>
struct RingEnd
{
    unsigned char* first;
    unsigned at{0};

    __device__ __forceinline__ unsigned char* next()
    {
        unsigned char* const stage = first + at * BYTES;
        at = (at + 1) % kDepth;
        return stage;
    }
};

// One more stage on its way, or an empty group of copies in its place. `more`: there are stages to feed.
template <typename T, WeightType W, int CHUNK>
__device__ __forceinline__ void feedRing(
    Feed<T, W, CHUNK>& feed, bool& more, RingEnd<stageBytes<W, CHUNK>()>& filled)
{
    if (more)
    {
        feed.copy(filled.next());
        more = feed.advance();
    }
    closeCopies();
}

// The blocks that share a tile.
struct Sharers
{
    int first;
    int last;
    bool firstIsLater; // this is the second of two tiles that the first of them shares

    __device__ __forceinline__ bool many() const
    {
        return first < last;
    }
};

template <typename T>
__device__ __forceinline__ Sharers sharersOf(StreamArguments<T> const& p, int tile)
{
    if (p.perTile > 0)
    {
        return {tile * p.perTile, tile * p.perTile + p.perTile - 1, false};
    }
    int const start = tile * p.tileStages;
    int const first = p.ownerOf(start);
    return {first, p.ownerOf(start + p.tileStages - 1), p.shareStart(first) < start};
}

// A warp's part of a segment.
template <typename T, WeightType W, int CHUNK>
__device__ __forceinline__ void accumulateSegment(StreamArguments<T> const& p, Sums<T, W>& sums,
    Segment const& segment, T const* staged, Feed<T, W, CHUNK>& feed, bool& more,
    RingEnd<stageBytes<W, CHUNK>()>& filled, RingEnd<stageBytes<W, CHUNK>()>& used)
{
    constexpr int kRows = stageRows<W, CHUNK>();
    int const lane = static_cast<int>(threadIdx.x % 32);
    int const quarter = static_cast<int>(threadIdx.x / (32 * kHalves));
    int const begin = segment.start(quarter);
    int const end = segment.start(quarter + 1);
    T const* mine = staged + (lane / 4) * stagedStride(p.slice) + 4 * (lane % 4) + begin * kRows;
    int untilGroup = W == WeightType::kFloat ? 0 : p.w.groupSize - begin * kRows % p.w.groupSize;
    for (int s = begin; s < end; ++s)
    {
        awaitCopies<kDepth - 2>();
        __syncwarp();
        feedRing(feed, more, filled);
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

// Where block `b` keeps its sums of a tile that it shares: of the two it may have, the later one or the other.
template <typename T, WeightType W>
__device__ __forceinline__ float* partialOf(StreamArguments<T> const& p, int b, bool later)
{
    return p.partial + static_cast<int64_t>(2 * b + (later ? 1 : 0)) * p.rows * streamTile<W>();
}

// The last of the blocks that share a tile adds what they have, and leaves the counter at zero. `start`: startOf this
// thread's first result, read before it is known who is last.
template <typename T, WeightType W>
__device__ __forceinline__ void addShares(
    StreamArguments<T> const& p, int tile, Sharers const& sharers, float start, unsigned* ticket)
{
    constexpr int kTile = streamTile<W>();
    constexpr int kAtOnce = 8; // loads, one of which takes as long as all
    int const thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (thread == 0)
    {
        __threadfence(); // of all of the block's stores, which the barrier put before it
        *ticket = atomicAdd(p.counters + tile, 1u);
        __threadfence();
    }
    __syncthreads();
    if (*ticket != static_cast<unsigned>(sharers.last - sharers.first))
    {
        return;
    }
    for (int o = thread; o < p.rows * kTile; o += kDecodeThreads)
    {
        int const row = o / kTile;
        int const column = tile * kTile + o % kTile;
        float sum = o == thread ? start : column < p.w.columns ? startOf(p, row, column) : 0.0f;
        for (int b = sharers.first; b <= sharers.last; b += kAtOnce)
        {
            float shares[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
            {
                bool const later = b + i == sharers.first && sharers.firstIsLater;
                shares[i] = b + i <= sharers.last ? loadShared(partialOf<T, W>(p, b + i, later) + o) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
            {
                sum += shares[i];
            }
        }
        if (column < p.w.columns)
        {
            finish(p, row, column, sum);
        }
    }
    if (thread == 0)
    {
        p.counters[tile] = 0;
    }
}

// What the block's warps have of a tile: its results, or this block's share of them.
template <typename T, WeightType W>
__device__ __forceinline__ void reduceSegment(StreamArguments<T> const& p, Sums<T, W> const& sums, int tile,
    Sharers const& sharers, float start, float* warps)
{
    constexpr int kTile = streamTile<W>();
    constexpr int kColumns = Weights<T, W>::kColumns;
    int const thread = static_cast<int>(threadIdx.x);
    int const lane = static_cast<int>(threadIdx.x % 32);
    int const warp = static_cast<int>(threadIdx.x / 32);
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
            int const row = top + o / kTile;
            int const column = tile * kTile + o % kTile;
            float sum = 0.0f;
#pragma unroll
            for (int quarter = 0; quarter < kQuarters; ++quarter)
            {
                sum += warps[quarter * kPassRows * kTile + o];
            }
            if (sharers.many())
            {
                share[top * kTile + o] = sum;
            }
            else if (column < p.w.columns)
            {
                finish(p, row, column, sum + (top == 0 && o == thread ? start : startOf(p, row, column)));
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
    int const warp = static_cast<int>(threadIdx.x / 32);
    RingEnd<kBytes> filled{shared + warp * kDepth * kBytes};
    RingEnd<kBytes> used = filled;
    unsigned char* const after = shared + kDecodeWarps * kDepth * kBytes;
    T* const staged = reinterpret_cast<T*>(after);
    float* const warps = reinterpret_cast<float*>(after + stagedBytes(p.rows, p.slice));
    unsigned* const ticket = reinterpret_cast<unsigned*>(warps + kQuarters * kPassRows * streamTile<W>());
    releaseNext();
    Walk walk(p);
    // With a whole tile and more all inputs are staged at once, if there is room for them.
    bool const whole = walk.left >= p.tileStages && p.tileStages <= p.most;
    Feed<T, W, CHUNK> feed(p, walk);
    bool more = feed.enter();
    if (!p.settled)
    {
        Feed<T, W, CHUNK> ahead = feed;
        bool further = more;
        for (int i = 1; i < kDepth && further; ++i)
        {
            ahead.prefetch();
            further = ahead.advance();
        }
        awaitPrevious();
    }
    for (int i = 1; i < kDepth; ++i)
    {
        feedRing(feed, more, filled);
    }
    if (p.settled)
    {
        awaitPrevious();
    }
    Sums<T, W> sums{};
    Segment segment{};
    bool begun = false;
    while (walk.next(p, segment))
    {
        int const from = whole ? 0 : segment.begin * kRows;
        if (!whole || !begun)
        {
            if (begun)
            {
                __syncthreads(); // what was staged before is read
            }
            int const to = whole ? p.w.rows : segment.end * kRows;
            // Codes leave fewer registers: their sums are more.
            stageInputs<kRows, W == WeightType::kFloat ? 8 : 4>(p, staged, from, to < p.w.rows ? to : p.w.rows);
        }
        begun = true;
        int const result = static_cast<int>(threadIdx.x); // this thread's first of the tile
        int const column = segment.tile * streamTile<W>() + result % streamTile<W>();
        bool const has = result < p.rows * streamTile<W>() && column < p.w.columns;
        float const start = has ? startOf(p, result / streamTile<W>(), column) : 0.0f;
        __syncthreads();
        accumulateSegment(p, sums, segment, staged - from, feed, more, filled, used);
        if (segment.last)
        {
            Sharers const sharers = sharersOf(p, segment.tile);
            reduceSegment(p, sums, segment.tile, sharers, start, warps);
            if (sharers.many())
            {
                addShares<T, W>(p, segment.tile, sharers, start, ticket);
            }
            sums = Sums<T, W>{};
        }
    }
}

} // namespace skipcat

#endif
