// Stages of w on their way through a warp's ring in shared memory, ahead of their use.
//
// w is cut into tiles of columns, a tile into stages of 16 rows (32 of 4 bits). Each block takes an equal share of all stages, in
// order: of its share in one tile, a segment, each of its 8 warps takes an eighth. Chunks of 16 bytes lie in the ring
// so that what the lanes read at once is in banks apart.

#ifndef SKIPCAT_FEED_CUH
#define SKIPCAT_FEED_CUH

#include "decode.cuh"

namespace skipcat
{

constexpr int kMostStages = 8;

template <typename T>
struct StreamArguments : DecodeArguments<T> // `slice`: rows of `in` that are staged at once
{
    int depth;   // stages of a warp's ring, 2 to kMostStages
    bool settled; // w was written before the previous kernel began
};

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

// Bytes of the weights of a stage.
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

// Numbers of the staged inputs, whose end is aligned.
__host__ __device__ constexpr size_t stagedBytes(int rows, int slice)
{
    return (static_cast<size_t>(rows) * stagedStride(slice) * 2 + 15) / 16 * 16;
}

// The rings, the staged inputs, the warps' sums, and the ticket.
template <WeightType W, int CHUNK>
__host__ __device__ constexpr size_t streamSharedBytes(int rows, int slice, int depth)
{
    return static_cast<size_t>(kDecodeWarps) * depth * stageBytes<W, CHUNK>() + stagedBytes(rows, slice)
        + static_cast<size_t>(kDecodeWarps) * rows * decodeTile<W>() * 4 + 16;
}

// Stages [begin, end) of one tile; `last` of them that this block has.
struct Segment
{
    int tile;
    int begin;
    int end;
    bool last;

    // The eighth of a warp.
    __device__ __forceinline__ int start(int warp) const
    {
        return begin + (end - begin) * warp / kDecodeWarps;
    }
};

// Where the share of block `b` of so many begins.
__device__ __forceinline__ int shareStart(int stages, int b, int blocks)
{
    return static_cast<int>(static_cast<int64_t>(stages) * b / blocks);
}

// Whose share a stage is in.
__device__ __forceinline__ int ownerOf(int stages, int stage, int blocks)
{
    return static_cast<int>(((static_cast<int64_t>(stage) + 1) * blocks - 1) / stages);
}

// Goes through the segments of a block.
struct Walk
{
    int at;
    int end;
    int tileStages;
    int most; // stages of a segment, for which inputs are staged

    __device__ __forceinline__ bool next(Segment& segment)
    {
        if (at >= end)
        {
            return false;
        }
        segment.tile = at / tileStages;
        segment.begin = at - segment.tile * tileStages;
        int const left = end - at < tileStages - segment.begin ? end - at : tileStages - segment.begin;
        int const taken = left < most ? left : most;
        segment.end = segment.begin + taken;
        segment.last = taken == left;
        at += taken;
        return true;
    }
};

template <typename T, WeightType W, int CHUNK>
__device__ __forceinline__ Walk walkOf(StreamArguments<T> const& p)
{
    constexpr int kRows = stageRows<W, CHUNK>();
    int const tileStages = (p.w.rows + kRows - 1) / kRows;
    int const stages = tileStages * ((p.w.columns + decodeTile<W>() - 1) / decodeTile<W>());
    int const block = static_cast<int>(blockIdx.x);
    int const blocks = static_cast<int>(gridDim.x);
    return {shareStart(stages, block, blocks), shareStart(stages, block + 1, blocks), tileStages, p.slice / kRows};
}

// Brings a warp's stages into its ring, ahead of their use. CHUNK: bytes of a copy.
template <typename T, WeightType W, int CHUNK>
struct Feed
{
    static constexpr int kRowBytes = stageRowBytes<W>();
    static constexpr int kRows = stageRows<W, CHUNK>();
    static constexpr int kChunks = kRows * kRowBytes / CHUNK / 32; // of each lane
    static constexpr int kLines = 32 * CHUNK / kRowBytes;          // rows that one round of chunks covers

    Matrix const& w;
    Walk walk;
    int stage{0};
    int end{0};
    int row{0};       // of w, the stage's first
    int untilGroup{0}; // rows until the next group of scales
    int64_t stride{0};
    unsigned char const* from{nullptr}; // this lane's part of the stage's first rows
    unsigned char const* scales{nullptr};
    bool inside{false};
    bool scalesInside{false};

    __device__ __forceinline__ Feed(Matrix const& matrix, Walk const& whole)
        : w(matrix)
        , walk(whole)
    {
        stride = W == WeightType::kFloat ? static_cast<int64_t>(w.columns) * 2
            : W == WeightType::kInt8    ? w.columns
                                        : (w.columns + 1) / 2;
    }

    // To the warp's first stage; false if it has none.
    __device__ __forceinline__ bool start()
    {
        return enter();
    }

    // On to the next one; false after the last.
    __device__ __forceinline__ bool advance()
    {
        ++stage;
        row += kRows;
        from += kRows * stride;
        if constexpr (W != WeightType::kFloat)
        {
            untilGroup -= kRows;
            if (untilGroup < 0)
            {
                untilGroup += w.groupSize;
                scales += static_cast<int64_t>(w.columns) * 2;
            }
        }
        return stage < end || enter();
    }

    // The scales of this stage are not those of the one before.
    __device__ __forceinline__ bool opensGroup() const
    {
        return untilGroup == w.groupSize - kRows;
    }

    // Starts copying the stage to where the ring has room for it.
    __device__ __forceinline__ void copy(unsigned char* to)
    {
        int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
        {
            int const chunk = 32 * j + lane;
            int const at = chunk * CHUNK;
            int const line = at / 128;
            int const place = (at % 128 / 16) ^ ((W == WeightType::kInt4 ? line / 2 : line / 4) % 4 * 2);
            int const bytes = inside && row + kLines * j + at % (32 * CHUNK) / kRowBytes < w.rows ? CHUNK : 0;
            void const* const source = from + j * kLines * stride; // of no matter where no byte is copied
            if constexpr (CHUNK == 16)
            {
                copyAsync16(to + line * 128 + place * 16, source, bytes);
            }
            else
            {
                copyAsync8(to + line * 128 + place * 16 + at % 16, source, bytes);
            }
        }
        if constexpr (W != WeightType::kFloat)
        {
            if (opensGroup() || fresh)
            {
                fresh = false;
                if (lane < 2 * decodeTile<W>() / 16)
                {
                    copyAsync16(to + kRows * kRowBytes + lane * 16, scales, scalesInside ? 16 : 0);
                }
            }
        }
    }

    // Brings the stage as far as the second cache: of what it holds then, nothing can be old.
    __device__ __forceinline__ void prefetch() const
    {
        int const lane = static_cast<int>(threadIdx.x) % 32;
        int const each = kRowBytes / CHUNK;
        if (inside && lane % each == 0)
        {
#pragma unroll
            for (int j = 0; j < kChunks; ++j)
            {
                if (row + kLines * j + lane / each < w.rows)
                {
                    prefetchSecondCache(from + j * kLines * stride);
                }
            }
        }
    }

private:
    bool fresh{false};

    __device__ __forceinline__ bool enter()
    {
        int const lane = static_cast<int>(threadIdx.x) % 32;
        int const warp = static_cast<int>(threadIdx.x) / 32;
        Segment segment{};
        do
        {
            if (!walk.next(segment))
            {
                stage = end;
                return false;
            }
            stage = segment.start(warp);
            end = segment.start(warp + 1);
        } while (stage == end);
        row = stage * kRows;
        int const byte = segment.tile * kRowBytes + lane * CHUNK % kRowBytes;
        inside = byte < stride;
        from = static_cast<unsigned char const*>(w.codes) + static_cast<int64_t>(row + lane * CHUNK / kRowBytes) * stride + byte;
        if constexpr (W != WeightType::kFloat)
        {
            int const group = row / w.groupSize;
            int const column = segment.tile * decodeTile<W>() + 8 * lane;
            untilGroup = w.groupSize - kRows - (row - group * w.groupSize);
            scales = static_cast<unsigned char const*>(w.scale) + (static_cast<int64_t>(group) * w.columns + column) * 2;
            scalesInside = column < w.columns;
            fresh = true;
        }
        return true;
    }
};

// A warp's ring as both of its ends see it.
struct Ring
{
    unsigned char* memory;
    int stageBytes;
    int depth;
    int filled{0}; // places, not numbers of stages
    int used{0};

    __device__ __forceinline__ unsigned char* next(int& place) const
    {
        unsigned char* const stage = memory + place * stageBytes;
        place = place + 1 == depth ? 0 : place + 1;
        return stage;
    }
};

// One more stage on its way, or an empty group of copies in its place.
template <typename T, WeightType W, int CHUNK>
__device__ __forceinline__ void feedRing(Feed<T, W, CHUNK>& feed, bool& more, Ring& ring)
{
    if (more)
    {
        feed.copy(ring.next(ring.filled));
        more = feed.advance();
    }
    closeCopies();
}

} // namespace skipcat

#endif
