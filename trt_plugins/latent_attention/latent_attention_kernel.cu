// How a call is cut into blocks, and what they leave between the two launches.

#include "latent_attention.h"

#include "attend.cuh"
#include "walk_launch.cuh"

namespace skipcat::latent
{
namespace
{

constexpr int32_t kMaxWidth = 256;
constexpr int32_t kMaxHeld = 8192;
constexpr int32_t kMaxSharedBytes = 96 * 1024; // what an Orin's or an RTX 30's block may have
constexpr int32_t kMaxGrid = 65535;
constexpr int32_t kWaves = 2; // blocks wanted on each multiprocessor
constexpr size_t kAlignment = 256;

int64_t ceilDivide(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

size_t aligned(size_t bytes)
{
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int32_t keyHeads(Problem const& p)
{
    return p.keys.groups * (p.headsPerGroup > 0 ? p.headsPerGroup : 1);
}

// Groups of heads that share a head of keys and a group of values: the least common multiple.
int32_t unitsOf(Problem const& p)
{
    int32_t a = keyHeads(p);
    int32_t b = p.values.groups;
    while (b != 0)
    {
        int32_t const rest = a % b;
        a = b;
        b = rest;
    }
    return keyHeads(p) / a * p.values.groups;
}

struct Cut
{
    int32_t units, rowTiles, rows, stretch, splits, slices;
};

Cut cut(Problem const& p, int32_t multiprocessors)
{
    Cut out{};
    out.units = unitsOf(p);
    out.rowTiles = static_cast<int32_t>(ceilDivide(static_cast<int64_t>(p.heads / out.units) * p.queries, kRows));
    out.rows = p.batch * out.rowTiles * out.units;
    out.slices = static_cast<int32_t>(ceilDivide(piecesOf(p.values), kPieces));
    int64_t const tiles = ceilDivide(p.slots, kTokens);
    int64_t const wanted = ceilDivide(static_cast<int64_t>(kWaves) * multiprocessors, out.rows * out.slices);
    int64_t const most = kMaxGrid / out.slices;
    int64_t const splits = wanted < tiles ? wanted : tiles;
    out.stretch = static_cast<int32_t>(kTokens * ceilDivide(tiles, splits < most ? splits : most));
    out.splits = static_cast<int32_t>(ceilDivide(p.slots, out.stretch));
    return out;
}

size_t shareBytes(Problem const& p, Cut const& c)
{
    return aligned(static_cast<size_t>(c.rows) * c.splits * kRows * kPiece * piecesOf(p.values) * sizeof(float));
}

size_t stateBytes(Cut const& c)
{
    return aligned(static_cast<size_t>(c.rows) * c.splits * kRows * sizeof(float));
}

char const* whySideRefused(Side const& side, int32_t heads)
{
    if (side.form != Form::kNumbers && side.form != Form::kNibbles && side.form != Form::kBytes)
    {
        return "the cache must hold fp16 numbers, or codes of one or two to a byte";
    }
    if (side.groups < 1 || heads % side.groups != 0)
    {
        return "the groups of keys and of values must divide the heads";
    }
    return side.held < 1 || side.held > kMaxHeld ? "a latent must have 1 to 8192 numbers or bytes" : nullptr;
}

char const* whyPointersRefused(Problem const& p, Pointers const& of)
{
    if (of.query == nullptr || of.mask == nullptr || of.keys == nullptr || of.values == nullptr || of.mixed == nullptr)
    {
        return "query, mask, keys, values and mixed must be given";
    }
    if ((p.keys.form != Form::kNumbers && of.keySteps == nullptr)
        || (p.values.form != Form::kNumbers && of.valueSteps == nullptr))
    {
        return "codes need steps";
    }
    bool const tables = of.up != nullptr && of.mean != nullptr && of.cos != nullptr && of.sin != nullptr;
    return p.headsPerGroup > 0 && !tables ? "keys that are rebuilt need up, mean, cos and sin" : nullptr;
}

template <typename T>
cudaError_t attend(Problem const& p, Pointers const& pointers, Cut const& c, void* workspace, cudaStream_t stream)
{
    auto* const scratch = static_cast<unsigned char*>(workspace);
    Arguments arguments{};
    arguments.problem = p;
    arguments.pointers = pointers;
    arguments.shares = reinterpret_cast<float*>(scratch);
    arguments.maximum = reinterpret_cast<float*>(scratch + shareBytes(p, c));
    arguments.total = reinterpret_cast<float*>(scratch + shareBytes(p, c) + stateBytes(c));
    arguments.units = c.units;
    arguments.rowTiles = c.rowTiles;
    arguments.stretch = c.stretch;
    arguments.splits = c.splits;
    arguments.slices = c.slices;
    unsigned const rows = static_cast<unsigned>(c.rows);
    dim3 const grid(rows, static_cast<unsigned>(c.splits * c.slices));
    cudaError_t const status = launch(attendStretch<T>, grid, kThreads, static_cast<size_t>(layoutOf(p).bytes), stream,
        false, arguments);
    if (status != cudaSuccess)
    {
        return status;
    }
    return launch(joinStretches<T>, dim3(rows, kRows), kThreads, 0, stream, false, arguments);
}

} // namespace

char const* whyRefused(Problem const& p) noexcept
{
    if (p.batch < 1 || p.heads < 1 || p.queries < 1 || p.slots < 1 || p.headsPerGroup < 0)
    {
        return "batch, heads, queries and slots must be at least 1";
    }
    for (Side const& side : {p.keys, p.values})
    {
        if (char const* const reason = whySideRefused(side, p.heads))
        {
            return reason;
        }
    }
    bool const rebuilt = p.headsPerGroup > 0;
    if (p.heads % keyHeads(p) != 0 || p.heads % unitsOf(p) != 0)
    {
        return "the heads of keys and the groups of values must divide the heads together";
    }
    if (rebuilt && (p.width < 16 || p.width > kMaxWidth || p.width % 16 != 0))
    {
        return "keys that are rebuilt must be 16 to 256 wide, a multiple of 16";
    }
    if (!rebuilt && p.width != p.keys.rank())
    {
        return "a query must be as wide as keys that are taken as they are cached";
    }
    return layoutOf(p).bytes > kMaxSharedBytes ? "the keys are too wide for a block's shared memory" : nullptr;
}

// rows * splits is at most rows + kWaves * multiprocessors / slices, whatever the shapes below these.
size_t workspaceBytes(Problem const& p, int32_t multiprocessors) noexcept
{
    Cut c = cut(p, multiprocessors);
    c.rows += static_cast<int32_t>(ceilDivide(static_cast<int64_t>(kWaves) * multiprocessors, c.slices));
    c.splits = 1;
    return std::max(shareBytes(p, c) + 2 * stateBytes(c), walkWorkspaceBytes(p, c.units, multiprocessors));
}

cudaError_t latentAttention(Problem const& p, Pointers const& pointers, int32_t multiprocessors, void* workspace,
    cudaStream_t stream) noexcept
{
    if (whyRefused(p) != nullptr || whyPointersRefused(p, pointers) != nullptr || workspace == nullptr
        || multiprocessors < 1)
    {
        return cudaErrorInvalidValue;
    }
    Cut const c = cut(p, multiprocessors);
    WalkShape const shape = walkShapeOf(p, walkRowsOf(p, c.units), sharedBytesAtMost());
    if (shape.tiles > 0 && canWalk(p, pointers))
    {
        return p.bf16 ? walk<__nv_bfloat16>(p, pointers, c.units, shape, multiprocessors, workspace, stream)
                      : walk<__half>(p, pointers, c.units, shape, multiprocessors, workspace, stream);
    }
    return p.bf16 ? attend<__nv_bfloat16>(p, pointers, c, workspace, stream)
                  : attend<__half>(p, pointers, c, workspace, stream);
}

} // namespace skipcat::latent
