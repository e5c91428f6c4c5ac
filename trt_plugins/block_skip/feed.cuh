// Stages of w on their way through a warp's ring in shared memory, ahead of their use.
//
// w is cut into tiles of columns, a tile into stages of 16 rows (32 of 4 bits). Each block takes an equal share of all
// stages, in order; of its share in one tile, a segment, two warps side by side take a quarter, each a half of the
// columns, so that memory is read in lines as long as its pages like. Chunks of 16 bytes lie in the ring so that what
// the lanes read at once is in banks apart.

#ifndef SKIPCAT_FEED_CUH
#define SKIPCAT_FEED_CUH

#include "decode.cuh"

namespace skipcat
{

constexpr int kHalves = 2;
constexpr int kQuarters = kDecodeWarps / kHalves;
constexpr int kDepth = 4; // stages of a ring

template <typename T>
struct StreamArguments : DecodeArguments<T> // `slice`: rows of `in` that are staged at once
{
    int tileStages;
    int most;     // stages of a segment, for which inputs are staged
    int perTile;  // blocks of each tile, or 0: shares go on from tile to tile
    int share;    // stages of a block, where they do
    int longer;   // blocks that have one more, the first ones
    bool settled; // w was written before the previous kernel began

    __device__ __forceinline__ int shareStart(int block) const
    {
        if (perTile > 0)
        {
            int const tile = block / perTile;
            return tile * tileStages + (block - tile * perTile) * tileStages / perTile;
        }
        return block * share + (block < longer ? block : longer);
    }

    // Whose share a stage is in, where they go on.
    __device__ __forceinline__ int ownerOf(int stage) const
    {
        int const before = longer * (share + 1);
        return stage < before ? stage / (share + 1) : longer + (stage - before) / share;
    }
};

template <WeightType W>
__host__ __device__ constexpr int streamTile()
{
    return kHalves * decodeTile<W>();
}

// Bytes of a row that a warp reads.
template <WeightType W>
__host__ __device__ constexpr int stageRowBytes()
{
    return W == WeightType::kInt4 ? 64 : 128;
}

// Rows of a stage, which share their scales. CHUNK: bytes of a copy; 8 for 4 bits in rows or groups of odd 16s.
template <WeightType W, int CHUNK>
__host__ __device__ constexpr int stageRows()
{
    return W == WeightType::kInt4 && CHUNK == 16 ? 2 * kStep : kStep;
}

// Bytes of the weights of a warp's stage.
template <WeightType W, int CHUNK>
__host__ __device__ constexpr int stageWeightBytes()
{
    return stageRows<W, CHUNK>() * stageRowBytes<W>();
}

// The same with the scales of its columns behind them.
template <WeightType W, int CHUNK>
__host__ __device__ constexpr int stageBytes()
{
    return stageWeightBytes<W, CHUNK>() + (W == WeightType::kFloat ? 0 : 2 * decodeTile<W>());
}

// Stages [begin, end) of one tile; the `last` of them that this block has.
struct Segment
{
    int tile;
    int begin;
    int end;
    bool last;

    __device__ __forceinline__ int start(int quarter) const
    {
        return begin + static_cast<int>(static_cast<unsigned>(end - begin) * static_cast<unsigned>(quarter) / kQuarters);
    }
};

// Goes through the segments of a block.
struct Walk
{
    int tile;
    int begin;
    int left;

    template <typename T>
    __device__ __forceinline__ explicit Walk(StreamArguments<T> const& p)
    {
        int const block = static_cast<int>(blockIdx.x);
        int const start = p.shareStart(block);
        tile = start / p.tileStages;
        begin = start - tile * p.tileStages;
        left = p.shareStart(block + 1) - start;
    }

    template <typename T>
    __device__ __forceinline__ bool next(StreamArguments<T> const& p, Segment& segment)
    {
        if (left == 0)
        {
            return false;
        }
        int const whole = left < p.tileStages - begin ? left : p.tileStages - begin;
        int const taken = whole < p.most ? whole : p.most;
        segment = {tile, begin, begin + taken, taken == whole};
        left -= taken;
        begin += taken;
        if (begin == p.tileStages)
        {
            begin = 0;
            ++tile;
        }
        return true;
    }
};

// Brings a warp's stages into its ring. CHUNK: bytes of a copy.
template <typename T, WeightType W, int CHUNK>
struct Feed
{
    static constexpr int kRowBytes = stageRowBytes<W>();
    static constexpr int kRows = stageRows<W, CHUNK>();
    static constexpr int kRound = 32 * CHUNK;                  // bytes that the lanes copy at once
    static constexpr int kRounds = kRows * kRowBytes / kRound; // of a stage
    static constexpr int kLines = kRound / kRowBytes;          // rows of a round

    StreamArguments<T> const& p;
    Matrix const& w{p.w};
    Walk walk;
    int stage{0};
    int end{0};
    int untilGroup{0}; // rows between this stage and the next group of scales
    bool opens{false}; // its scales are not those of the stage before
    bool inside{false};
    bool scalesInside{false};
    unsigned char const* from{nullptr}; // this lane's part of the stage's first round
    unsigned char const* scales{nullptr};

    __device__ __forceinline__ Feed(StreamArguments<T> const& arguments, Walk const& whole)
        : p(arguments)
        , walk(whole)
    {
    }

    // Bytes of a row.
    __device__ __forceinline__ int stride() const
    {
        return W == WeightType::kFloat ? 2 * w.columns : W == WeightType::kInt8 ? w.columns : w.columns >> 1;
    }

    // To the warp's next segment with stages; false if it has none.
    __device__ __forceinline__ bool enter()
    {
        int const lane = static_cast<int>(threadIdx.x % 32);
        int const warp = static_cast<int>(threadIdx.x / 32);
        Segment segment{};
        do
        {
            if (!walk.next(p, segment))
            {
                return false;
            }
            stage = segment.start(warp / kHalves);
            end = segment.start(warp / kHalves + 1);
        } while (stage == end);
        int const part = kHalves * segment.tile + warp % kHalves;
        int const byte = part * kRowBytes + lane * CHUNK % kRowBytes;
        int const row = stage * kRows;
        inside = byte < stride();
        from = static_cast<unsigned char const*>(w.codes) + static_cast<int64_t>(row + lane * CHUNK / kRowBytes) * stride() + byte;
        if constexpr (W != WeightType::kFloat)
        {
            int const group = row / w.groupSize;
            int const column = part * decodeTile<W>() + 8 * lane;
            untilGroup = (group + 1) * w.groupSize - row - kRows;
            opens = true;
            scalesInside = lane < decodeTile<W>() / 8 && column < w.columns;
            scales = static_cast<unsigned char const*>(w.scale) + (static_cast<int64_t>(group) * w.columns + column) * 2;
        }
        return true;
    }

    // On to the next stage; false after the last one.
    __device__ __forceinline__ bool advance()
    {
        ++stage;
        from += static_cast<int64_t>(kRows) * stride();
        if constexpr (W != WeightType::kFloat)
        {
            opens = untilGroup == 0;
            untilGroup -= kRows;
            if (opens)
            {
                untilGroup += w.groupSize;
                scales += static_cast<int64_t>(w.columns) * 2;
            }
        }
        return stage < end || enter();
    }

    // Starts copying the stage to where the ring has room for it.
    __device__ __forceinline__ void copy(unsigned char* to) const
    {
        int const lane = static_cast<int>(threadIdx.x % 32);
        int const row = stage * kRows + lane * CHUNK / kRowBytes;
        // A line of 128 bytes is turned by its rows' place among 16, two chunks for each four.
        constexpr int kLinesOfFour = 4 * kRowBytes / 128;
        int const line = lane * CHUNK / 128;
        int const start = line * 128 + (lane * CHUNK % 128 ^ line / kLinesOfFour * 32);
#pragma unroll
        for (int j = 0; j < kRounds; ++j)
        {
            int const turn = j * (kRound / 128) / kLinesOfFour % 4 * 32;
            unsigned char* const place = to + (start ^ turn) + j * kRound;
            int const bytes = inside && row + j * kLines < w.rows ? CHUNK : 0; // else `from` may be anything
            if constexpr (CHUNK == 16)
            {
                copyAsync16(place, from + j * kLines * static_cast<int64_t>(stride()), bytes);
            }
            else
            {
                copyAsync8(place, from + j * kLines * static_cast<int64_t>(stride()), bytes);
            }
        }
        if (W != WeightType::kFloat && opens && lane < decodeTile<W>() / 8)
        {
            copyAsync16(to + kRows * kRowBytes + lane * 16, scales, scalesInside ? 16 : 0);
        }
    }

    // Brings the stage as far as the second cache: of what it holds then, nothing can be old.
    __device__ __forceinline__ void prefetch() const
    {
        int const lane = static_cast<int>(threadIdx.x % 32);
        int const row = stage * kRows + lane * CHUNK / kRowBytes;
        if (inside && lane * CHUNK % kRowBytes == 0)
        {
#pragma unroll
            for (int j = 0; j < kRounds; ++j)
            {
                if (row + j * kLines < w.rows)
                {
                    prefetchSecondCache(from + j * kLines * static_cast<int64_t>(stride()));
                }
            }
        }
    }
};

} // namespace skipcat

#endif
