// How one product of few rows is cut over the chip, by either of its kernels; host code.

#ifndef SKIPCAT_CUT_CUH
#define SKIPCAT_CUT_CUH

#include <algorithm>

#include "block_skip.h"
#include "stream.cuh"

namespace skipcat
{

inline int32_t ceilDivide(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

// One matrix, and who multiplies with it.
struct Product
{
    WeightFormat format;
    int32_t rows; // of `in`, up to 8
    int32_t reduction;
    int32_t columns;

    int32_t tile() const
    {
        return format.type == WeightType::kFloat ? decodeTile<WeightType::kFloat>() : decodeTile<WeightType::kInt8>();
    }

    int32_t tiles() const
    {
        return ceilDivide(columns, tile());
    }
};

// decode.cuh: slices of the reduction.
struct Slices
{
    int32_t slice;
    int32_t slices;
};

inline Slices cutReduction(Product const& product, Device const& device, int32_t tactic)
{
    constexpr int32_t kMaxSharedBytes = 32 * 1024;
    int32_t const wanted = ceilDivide(device.multiprocessors * kTactic[tactic].blocks, product.tiles());
    // At least two steps for each warp: less would be all start and end.
    int32_t const most = std::max(product.reduction / (2 * kRound), 1);
    int32_t const slices = std::min(wanted, most);
    int32_t const fits = kMaxSharedBytes / (2 * product.rows) / kRound * kRound - kRound;
    int32_t const slice = std::min(ceilDivide(ceilDivide(product.reduction, slices), kRound) * kRound, fits);
    int32_t const used = std::max(slice, kRound);
    return {used, std::max(ceilDivide(product.reduction, used), 1)};
}

// stream.cuh: shares of all stages of its tiles, and the rows of `in` that a block stages at once.
struct Shares
{
    int32_t blocks;
    int32_t tileStages;
    int32_t stages;
    int32_t perTile; // blocks of each tile, or 0: all shares are equal and go on from tile to tile
    int32_t staged;
};

// Shared memory that a block can have.
inline size_t sharedBytesOf(int32_t capability)
{
    bool const small = capability == 86 || capability == 89 || capability >= 120;
    return (small ? 99 : capability < 90 ? 163 : 227) * size_t{1024};
}

// Blocks of each tile, where that is better than shares that go on: a block with parts of two tiles ends each by
// itself, which takes as long as some stages do; whole numbers of blocks leave some multiprocessors idle.
inline int32_t blocksPerTile(int32_t blocks, int32_t tiles, int32_t tileStages, int32_t least)
{
    constexpr int32_t kEndStages = 12; // of a block; 2.5 us on an H100
    int32_t const each = std::min(blocks / tiles, std::max(tileStages / least, 1));
    if (each < 1)
    {
        return 0;
    }
    int32_t const aligned = ceilDivide(tileStages, each);
    int32_t const going = ceilDivide(tileStages * tiles, std::min(blocks, std::max(tileStages * tiles / least, 1)));
    return aligned <= going + kEndStages ? each : 0;
}

template <WeightType W, int CHUNK>
Shares cutShares(Product const& product, Device const& device, int32_t tactic)
{
    int32_t const stagedBytes = sharedBytesOf(device.capability) < 128 * 1024 ? 8 * 1024 : 16 * 1024;
    constexpr int32_t kRows = stageRows<W, CHUNK>();
    int32_t const tileStages = ceilDivide(product.reduction, kRows);
    int32_t const tiles = ceilDivide(product.columns, streamTile<W>());
    int32_t const stages = tileStages * tiles;
    int32_t const least = kTactic[tactic].stages * kQuarters;
    int32_t const wanted = device.multiprocessors * kTactic[tactic].blocks;
    int32_t const perTile = blocksPerTile(wanted, tiles, tileStages, least);
    int32_t const blocks = perTile > 0 ? tiles * perTile : std::min(wanted, std::max(stages / least, 1));
    int32_t const fits = stagedBytes / (2 * product.rows) / kRows * kRows;
    int32_t const share = (ceilDivide(stages, blocks) + 1) * kRows;
    return {blocks, tileStages, stages, perTile, std::min({fits, share, tileStages * kRows})};
}

// Whether stages can be counted.
inline bool hasShares(Product const& product)
{
    int64_t const stages = static_cast<int64_t>(ceilDivide(product.reduction, kStep)) * product.tiles();
    return stages > 0 && stages < INT32_MAX / kQuarters;
}

// Bytes of partial sums, whichever kernel it is.
inline size_t partialBytes(Product const& product, Device const& device, int32_t tactic)
{
    size_t const slices = static_cast<size_t>(cutReduction(product, device, tactic).slices) * product.columns;
    size_t const blocks = static_cast<size_t>(device.multiprocessors) * kTactic[tactic].blocks;
    return std::max(slices, 2 * blocks * kHalves * product.tile()) * product.rows * 4;
}

} // namespace skipcat

#endif
