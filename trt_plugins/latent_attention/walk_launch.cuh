// Which calls warps can walk on their own, how they are cut, and the two launches.

#ifndef SKIPCAT_LATENT_WALK_LAUNCH_CUH
#define SKIPCAT_LATENT_WALK_LAUNCH_CUH

#include <algorithm>

#include "walk_attend.cuh"
#include "walk_join.cuh"

namespace skipcat::latent
{

constexpr int32_t kMostResident = 4; // blocks wanted on a multiprocessor at a time
constexpr int32_t kSharedReserved = 1024; // of each block, by the device
constexpr int64_t kMostMaskNumbers = int64_t{1} << 31;

using WalkKernel = void (*)(WalkArguments);

struct WalkShape
{
    int32_t rows{0};    // of a block
    int32_t tiles{0};   // of 16 tokens, that a warp takes at a time; 0 where no stages fit
    int32_t stages{0};
};

template <typename T>
WalkKernel walkKernelOf(WalkShape const& shape, bool rebuilt)
{
    if (shape.tiles == 2)
    {
        return shape.rows == 8 ? (rebuilt ? walkContext<T, 1, 2, true> : walkContext<T, 1, 2, false>)
                               : (rebuilt ? walkContext<T, 2, 2, true> : walkContext<T, 2, 2, false>);
    }
    switch (shape.rows)
    {
    case 8: return rebuilt ? walkContext<T, 1, 1, true> : walkContext<T, 1, 1, false>;
    case 16: return rebuilt ? walkContext<T, 2, 1, true> : walkContext<T, 2, 1, false>;
    default: return rebuilt ? walkContext<T, 4, 1, true> : walkContext<T, 4, 1, false>;
    }
}

inline int32_t walkRowsOf(Problem const& p, int32_t units)
{
    int64_t const all = static_cast<int64_t>(p.heads / units) * p.queries;
    return all <= 8 ? 8 : all <= 16 ? 16 : 32;
}

// Two blocks on a multiprocessor where that is possible; then more tokens at a time, for which maps are read once;
// then deeper rings.
inline WalkShape walkShapeOf(Problem const& p, int32_t rows, int32_t sharedBytes)
{
    int32_t const half = (sharedBytes + kSharedReserved) / 2 - kSharedReserved;
    for (int32_t const room : {half, sharedBytes})
    {
        for (int32_t tiles = rows <= 16 ? 2 : 1; tiles > 0; --tiles)
        {
            for (int32_t stages = kMostStages; stages >= 2; --stages)
            {
                if (walkLayoutOf(p, rows, 16 * tiles, stages).bytes <= room)
                {
                    return {rows, tiles, stages};
                }
            }
        }
    }
    return {rows, 0, 0};
}

inline bool isAligned(void const* pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether tokens can be copied 16 bytes at a time, from where they lie.
inline bool canWalk(Problem const& p, Pointers const& of)
{
    return bytesOf(p.keys) % 16 == 0 && bytesOf(p.values) % 16 == 0
        && static_cast<int64_t>(p.queries) * p.slots < kMostMaskNumbers && isAligned(of.query) && isAligned(of.keys)
        && isAligned(of.values) && isAligned(of.up) && isAligned(of.cos) && isAligned(of.sin);
}

inline int32_t walkSlicesOf(Problem const& p, int32_t rows)
{
    int32_t const each = unitsPerSlice(p.values, rows, p.headsPerGroup > 0);
    return (unitsIn(p.values) + each - 1) / each;
}

inline int64_t walkBlocksOf(Problem const& p, int32_t units, int32_t rows)
{
    int64_t const all = static_cast<int64_t>(p.heads / units) * p.queries;
    return p.batch * units * ((all + rows - 1) / rows);
}

// Numbers that blocks leave for the second launch, and largest scores, and sums, of so many shares.
struct WalkScratch
{
    WalkScratch(Problem const& p, int32_t rows, int64_t count)
        : state((static_cast<size_t>(count) * rows * sizeof(float) + 255) / 256 * 256)
        , shares((static_cast<size_t>(count) * rows * p.values.rank() * sizeof(float) + 255) / 256 * 256)
    {
    }

    size_t bytes() const { return shares + 2 * state; }

    size_t state, shares;
};

inline size_t walkWorkspaceBytes(Problem const& p, int32_t units, int32_t multiprocessors)
{
    size_t most = 0;
    for (int32_t rows = 8; rows <= walkRowsOf(p, units); rows *= 2)
    {
        int64_t const resident = kMostResident * multiprocessors / walkSlicesOf(p, rows);
        most = std::max(most, WalkScratch(p, rows, std::max(walkBlocksOf(p, units, rows), resident)).bytes());
    }
    return most;
}

template <typename T>
cudaError_t walk(Problem const& p, Pointers const& pointers, int32_t units, WalkShape const& shape,
    int32_t multiprocessors, void* workspace, cudaStream_t stream)
{
    WalkArguments arguments{};
    arguments.problem = p;
    arguments.pointers = pointers;
    arguments.units = units;
    arguments.rows = shape.rows;
    arguments.stages = shape.stages;
    arguments.slices = walkSlicesOf(p, shape.rows);
    arguments.at = walkLayoutOf(p, shape.rows, 16 * shape.tiles, shape.stages);
    size_t const sharedBytes = static_cast<size_t>(arguments.at.bytes);
    WalkKernel const kernel = walkKernelOf<T>(shape, p.headsPerGroup > 0);
    int64_t const blocks = walkBlocksOf(p, units, shape.rows);
    int64_t const resident = std::min(residentBlocks(kernel, kWalkThreads, sharedBytes), kMostResident);
    int64_t const wanted = resident * multiprocessors / (blocks * arguments.slices);
    int64_t const tiles = (p.slots + kWarps * 16 * shape.tiles - 1) / (kWarps * 16 * shape.tiles);
    arguments.rowTiles = static_cast<int>(blocks / units / p.batch);
    arguments.splits = static_cast<int>(std::max<int64_t>(1, std::min(tiles, wanted)));
    WalkScratch const scratch(p, shape.rows, blocks * arguments.splits);
    auto* const memory = static_cast<unsigned char*>(workspace);
    arguments.shares = reinterpret_cast<float*>(memory);
    arguments.maximum = reinterpret_cast<float*>(memory + scratch.shares);
    arguments.total = reinterpret_cast<float*>(memory + scratch.shares + scratch.state);
    dim3 const grid(static_cast<unsigned>(blocks), static_cast<unsigned>(arguments.splits * arguments.slices));
    cudaError_t const status = launch(kernel, grid, kWalkThreads, sharedBytes, stream, true, arguments);
    if (status != cudaSuccess)
    {
        return status;
    }
    dim3 const rows(
        static_cast<unsigned>(p.batch) * p.heads * p.queries, static_cast<unsigned>((p.values.rank() + 31) / 32));
    return launch(joinWalks<T>, rows, 32 * kJoinWarps, 64 * kJoinWarps * sizeof(float), stream, true, arguments);
}

} // namespace skipcat::latent

#endif
