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

// The lane's four of 16 rows of a stage, from the ring.
template <typename T, WeightType W>
__device__ __forceinline__ void takeRows(Weights<T, W>& weights, unsigned char const* from)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const group = lane / 4;
    int const turn = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        if constexpr (W == WeightType::kInt4)
        {
            int const place = (i % 2 * 4 + group / 2) ^ (2 * turn);
            uint2 const value = *reinterpret_cast<uint2 const*>(
                from + (2 * turn + i / 2) * 128 + place * 16 + group % 2 * 8);
            weights.word[i][0] = value.x, weights.word[i][1] = value.y;
        }
        else
        {
            uint4 const value
                = *reinterpret_cast<uint4 const*>(from + (4 * turn + i) * 128 + (group ^ (2 * turn)) * 16);
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

// A warp's part of a segment.
template <typename T, WeightType W, int CHUNK>
__device__ __forceinline__ void accumulateSegment(StreamArguments<T> const& p, Sums<T, W>& sums, Segment const& segment,
    T const* staged, Feed<T, W, CHUNK>& feed, bool& more, Ring& ring)
{
    constexpr int kRows = stageRows<W, CHUNK>();
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const warp = static_cast<int>(threadIdx.x) / 32;
    T const* const mine = staged + (lane / 4) * stagedStride(p.slice) + 4 * (lane % 4);
    int const begin = segment.start(warp);
    int const end = segment.start(warp + 1);
    int untilGroup = 0;
    for (int s = begin; s < end; ++s)
    {
        awaitAllBut(ring.depth - 2);
        __syncwarp();
        feedRing(feed, more, ring);
        unsigned char const* const stage = ring.next(ring.used);
        if constexpr (W != WeightType::kFloat)
        {
            if (s == begin || untilGroup == 0)
            {
                if (s > begin)
                {
                    sums.close();
                }
                sums.open(stage + stageWeightBytes<W, CHUNK>());
                untilGroup = s == begin ? p.w.groupSize - s * kRows % p.w.groupSize : p.w.groupSize;
            }
            untilGroup -= kRows;
        }
#pragma unroll
        for (int k = 0; k < kRows; k += kStep)
        {
            Weights<T, W> weights;
            takeRows(weights, stage + k * stageRowBytes<W>());
            uint2 const in = lane / 4 < p.rows ? *reinterpret_cast<uint2 const*>(mine + s * kRows + k) : uint2{0, 0};
            sums.add(weights, in);
        }
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
    return p.partial + static_cast<int64_t>(2 * b + (later ? 1 : 0)) * p.rows * decodeTile<W>();
}

// The last of the blocks that share a tile adds what they have, and leaves the counter at zero.
template <typename T, WeightType W>
__device__ __forceinline__ void addShares(
    StreamArguments<T> const& p, int tile, int first, int last, bool firstIsLater, unsigned* ticket)
{
    constexpr int kTile = decodeTile<W>();
    int const thread = static_cast<int>(threadIdx.x);
    __threadfence();
    __syncthreads();
    if (thread == 0)
    {
        *ticket = atomicAdd(p.counters + tile, 1u);
    }
    __syncthreads();
    if (*ticket != static_cast<unsigned>(last - first))
    {
        return;
    }
    __threadfence();
    for (int o = thread; o < p.rows * kTile; o += kDecodeThreads)
    {
        int const row = o / kTile;
        int const column = tile * kTile + o % kTile;
        if (column < p.w.columns)
        {
            float sum = loadShared(partialOf<T, W>(p, first, firstIsLater) + o);
#pragma unroll 4
            for (int b = first + 1; b <= last; ++b)
            {
                sum += loadShared(partialOf<T, W>(p, b, false) + o);
            }
            finish(p, row, column, sum);
        }
    }
    if (thread == 0)
    {
        p.counters[tile] = 0;
    }
}

// Sums of the block's warps for a tile: its results, or this block's share of them.
template <typename T, WeightType W, int CHUNK>
__device__ __forceinline__ void reduceSegment(
    StreamArguments<T> const& p, Sums<T, W>& sums, Segment const& segment, float* warps, unsigned* ticket)
{
    constexpr int kTile = decodeTile<W>();
    Walk const walk = walkOf<T, W, CHUNK>(p);
    int const blocks = static_cast<int>(gridDim.x);
    int const stages = walk.tileStages * ((p.w.columns + kTile - 1) / kTile);
    int const tileStart = segment.tile * walk.tileStages;
    int const first = ownerOf(stages, tileStart, blocks);
    int const last = ownerOf(stages, tileStart + walk.tileStages - 1, blocks);
    bool const firstIsLater = shareStart(stages, first, blocks) < tileStart;
    int const block = static_cast<int>(blockIdx.x);
    float* const share = partialOf<T, W>(p, block, block == first && firstIsLater);
    storeSums<T, W>(p, sums.total, warps);
    __syncthreads();
    for (int o = static_cast<int>(threadIdx.x); o < p.rows * kTile; o += kDecodeThreads)
    {
        int const column = segment.tile * kTile + o % kTile;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kDecodeWarps; ++i)
        {
            sum += warps[i * p.rows * kTile + o];
        }
        if (first < last)
        {
            share[o] = sum;
        }
        else if (column < p.w.columns)
        {
            finish(p, o / kTile, column, sum);
        }
    }
    if (first < last)
    {
        addShares<T, W>(p, segment.tile, first, last, firstIsLater, ticket);
    }
}

template <typename T, WeightType W, int CHUNK>
__global__ void __launch_bounds__(kDecodeThreads, 2) streamProduct(StreamArguments<T> p)
{
    unsigned char* const shared = sharedMemory();
    int const warp = static_cast<int>(threadIdx.x) / 32;
    constexpr int kRows = stageRows<W, CHUNK>();
    constexpr int kBytes = stageBytes<W, CHUNK>();
    Ring ring{shared + warp * p.depth * kBytes, kBytes, p.depth};
    unsigned char* const after = shared + kDecodeWarps * p.depth * kBytes;
    T* const staged = reinterpret_cast<T*>(after);
    float* const warps = reinterpret_cast<float*>(after + stagedBytes(p.rows, p.slice));
    unsigned* const ticket = reinterpret_cast<unsigned*>(warps + kDecodeWarps * p.rows * decodeTile<W>());
    releaseNext();
    Walk walk = walkOf<T, W, CHUNK>(p);
    // With a whole tile and more all inputs are staged at once, if there is room for them.
    bool const whole = walk.end - walk.at >= walk.tileStages && walk.tileStages <= walk.most;
    Feed<T, W, CHUNK> feed(p.w, walk);
    bool more = feed.start();
    if (!p.settled)
    {
        Feed<T, W, CHUNK> ahead = feed;
        bool left = more;
        for (int i = 1; i < p.depth && left; ++i)
        {
            ahead.prefetch();
            left = ahead.advance();
        }
        awaitPrevious();
    }
    for (int i = 1; i < p.depth; ++i)
    {
        feedRing(feed, more, ring);
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
        if (!whole || !begun)
        {
            int const end = whole ? p.w.rows : segment.end * kRows;
            if (begun)
            {
                __syncthreads(); // what was staged before is read
            }
            stageInputs<kRows>(p, staged, whole ? 0 : segment.begin * kRows, end < p.w.rows ? end : p.w.rows);
        }
        begun = true;
        __syncthreads();
        accumulateSegment(p, sums, segment, staged - (whole ? 0 : segment.begin * kRows), feed, more, ring);
        if (segment.last)
        {
            reduceSegment<T, W, CHUNK>(p, sums, segment, warps, ticket);
            sums = Sums<T, W>{};
        }
    }
}

} // namespace skipcat

#endif
