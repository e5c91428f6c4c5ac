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

// stream.cuh: blocks with equal shares, rows of `in` that each stages at once, and stages of a warp's ring.
struct Shares
{
    int32_t blocks;
    int32_t staged;
    int32_t depth;
};

// Shared memory of a multiprocessor, less what the system takes of each of two blocks.
inline int32_t sharedBytesOf(int32_t capability)
{
    bool const small = capability == 86 || capability == 89 || capability >= 120;
    return (small ? 100 : capability < 90 ? 164 : 228) * 1024 - 2 * 1024;
}

inline bool hasShares(Product const& product)
{
    int64_t const stages = static_cast<int64_t>(ceilDivide(product.reduction, kStep)) * product.tiles();
    return stages > 0 && stages < INT32_MAX;
}

template <WeightType W, int CHUNK>
Shares cutShares(Product const& product, Device const& device, int32_t tactic)
{
    constexpr int32_t kStagedBytes = 16 * 1024;
    constexpr int32_t kRows = stageRows<W, CHUNK>();
    int32_t const tileStages = ceilDivide(product.reduction, kRows);
    int32_t const stages = tileStages * product.tiles();
    int32_t const least = kTactic[tactic].stages * kDecodeWarps;
    int32_t const blocks
        = std::min(device.multiprocessors * std::min(kTactic[tactic].blocks, 2), std::max(stages / least, 1));
    int32_t const fits = kStagedBytes / (2 * product.rows) / kRows * kRows;
    int32_t const share = (ceilDivide(stages, blocks) + 1) * kRows;
    int32_t const staged = std::min({fits, share, tileStages * kRows});
    // As many stages as leave room for a block of the next launch.
    size_t const room = static_cast<size_t>(sharedBytesOf(device.capability)) / 2;
    int32_t depth = 2;
    while (depth < kMostStages && streamSharedBytes<W, CHUNK>(product.rows, staged, depth + 1) <= room)
    {
        ++depth;
    }
    return {blocks, staged, depth};
}

// Bytes of partial sums, whichever kernel it is.
inline size_t partialBytes(Product const& product, Device const& device, int32_t tactic)
{
    size_t const slices = static_cast<size_t>(cutReduction(product, device, tactic).slices) * product.columns;
    size_t const shares = hasShares(product)
        ? static_cast<size_t>(2 * cutShares<WeightType::kFloat, 16>(product, device, tactic).blocks) * product.tile()
        : 0;
    return std::max(slices, shares) * product.rows * 4;
}

} // namespace skipcat

#endif
