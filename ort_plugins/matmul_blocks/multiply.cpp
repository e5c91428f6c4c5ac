#include "multiply.h"

#include <algorithm>

namespace skipcat
{
namespace
{

// Below so many products of codes, threads cost more than they give.
constexpr int64_t kWorthThreads = 1 << 17;
constexpr int64_t kTasks = 16; // as evenly as most numbers of threads can have them

// A tile and the row of x that it begins with.
struct PlacedTile
{
    Tile tile;
    int64_t first;
};

// Rows of x, rounded, in memory that a thread keeps for its next call.
class RoundedRows
{
public:
    // Tiles of the sizes that there are products for, the largest first.
    std::vector<PlacedTile> const& resize(int64_t rows, int64_t blocks, int64_t block)
    {
        size_t const count = static_cast<size_t>(rows * blocks);
        mCodes.resize(count * static_cast<size_t>(block));
        mScales.resize(count);
        mSums.resize(count);
        mWholes.resize(count);
        mTiles.clear();
        int64_t first = 0;
        for (int64_t size : kTileRows)
        {
            for (; size <= instructions()->mostRows && first + size <= rows; first += size)
            {
                size_t const at = static_cast<size_t>(first * blocks);
                Tile const tile{
                    size, &mCodes[at * static_cast<size_t>(block)], &mScales[at], &mSums[at], &mWholes[at]};
                mTiles.push_back({tile, first});
            }
        }
        return mTiles;
    }

private:
    std::vector<int8_t> mCodes;
    std::vector<float> mScales;
    std::vector<int32_t> mSums;
    std::vector<float> mWholes;
    std::vector<PlacedTile> mTiles;
};

// One product, as its tasks see it.
struct Job
{
    StoredMatrix const& w;
    std::vector<PlacedTile> const& tiles;
    float* y;
    int64_t groupsATask;
};

// Group by group all tiles: the codes of a group stay near.
void productTask(void* user, size_t task)
{
    Job const& job = *static_cast<Job const*>(user);
    int64_t const first = static_cast<int64_t>(task) * job.groupsATask;
    int64_t const last = std::min(first + job.groupsATask, job.w.product->groups());
    float const* const bias = job.w.bias.empty() ? nullptr : job.w.bias.data();
    int64_t const step = job.tiles.size() == 1 ? last - first : 1;
    for (int64_t group = first; group < last; group += step)
    {
        for (PlacedTile const& placed : job.tiles)
        {
            job.w.product->compute(placed.tile, group, group + step, bias, job.y + placed.first * job.w.rows);
        }
    }
}

} // namespace

Status* multiply(Api const& api, KernelContext const* context, StoredMatrix const& w, float const* x, int64_t rows,
    float* y)
{
    thread_local RoundedRows kept;
    auto const& tiles = kept.resize(rows, w.blocks(), w.block);
    auto const round = [&tiles, &w, x](int64_t row)
    {
        auto const behind = std::upper_bound(tiles.begin(), tiles.end(), row,
            [](int64_t wanted, PlacedTile const& placed) { return wanted < placed.first; });
        PlacedTile const& placed = *(behind - 1);
        roundRow(x + row * w.columns, w.columns, w.block, placed.tile, row - placed.first);
    };
    if (Status* const status = forRows(api, context, rows, round))
    {
        return status;
    }
    int64_t const groups = w.product->groups();
    bool const alone = rows * w.rows * w.columns < kWorthThreads;
    Job job{w, tiles, y, alone ? groups : (groups + kTasks - 1) / kTasks};
    if (alone)
    {
        productTask(&job, 0);
        return nullptr;
    }
    int64_t const tasks = (groups + job.groupsATask - 1) / job.groupsATask;
    return api.parallelFor(context, productTask, static_cast<size_t>(tasks), &job);
}

} // namespace skipcat
