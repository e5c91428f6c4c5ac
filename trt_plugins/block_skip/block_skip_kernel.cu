// Which kernels a problem runs as, and where they keep what is between them.
//
// Up to 8 rows: two decode products, the second waiting only for the first one's results. More rows:
// tiles on the matrix unit, after x was put in order if it is not, or if its halves are not aligned.
// With rank == n the first product would copy x, and is left out.

#include "block_skip.h"

#include <algorithm>
#include <type_traits>

#include "decode.cuh"
#include "prefill.cuh"

namespace skipcat
{
namespace
{

constexpr size_t kAlignment = 256;
constexpr int32_t kMaxDecodeSharedBytes = 32 * 1024;
constexpr int32_t kMaxColumns = 1 << 24;

int32_t ceilDivide(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

size_t aligned(size_t bytes)
{
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// A row length whose rows start at multiples of 16 bytes.
int32_t alignedStride(int32_t columns)
{
    return ceilDivide(columns, 8) * 8;
}

int32_t tileOf(WeightType weights)
{
    return weights == WeightType::kFloat ? decodeTile<WeightType::kFloat>() : decodeTile<WeightType::kInt8>();
}

// How the reduction of one product is cut over blocks.
struct Cut
{
    int32_t slice;
    int32_t slices;
};

Cut cutReduction(
    WeightType weights, int32_t blocksWanted, int32_t decodeRows, int32_t reduction, int32_t columns)
{
    int32_t const tiles = ceilDivide(columns, tileOf(weights));
    // At least two steps for each warp: less would be all start and end.
    int32_t const most = reduction / (2 * kRound) > 1 ? reduction / (2 * kRound) : 1;
    int32_t const slices = ceilDivide(blocksWanted, tiles) < most ? ceilDivide(blocksWanted, tiles) : most;
    int32_t slice = ceilDivide(ceilDivide(reduction, slices), kRound) * kRound;
    int32_t const fits = kMaxDecodeSharedBytes / (2 * decodeRows) / kRound * kRound - kRound;
    slice = slice < fits ? slice : fits;
    slice = slice < kRound ? kRound : slice;
    int32_t const used = ceilDivide(reduction, slice);
    return {slice, used < 1 ? 1 : used};
}

// The two products, as they are cut at so many rows; the first is none where rank == n.
struct Cuts
{
    Cut mix;
    Cut product;
};

bool mixes(Problem const& problem)
{
    return problem.rank < problem.n;
}

Cuts cutProducts(Problem const& problem, Device const& device, int32_t tactic, int32_t decodeRows)
{
    int32_t const wanted = device.multiprocessors * kTacticBlocks[tactic];
    return {cutReduction(problem.a.type, wanted, decodeRows, problem.n - problem.rank, problem.rank),
        cutReduction(problem.b.type, wanted, decodeRows, problem.rank, problem.m)};
}

size_t latentBytes(Problem const& problem)
{
    return aligned(static_cast<size_t>(problem.rows) * alignedStride(problem.rank) * 2);
}

size_t partialBytes(Problem const& problem, Device const& device)
{
    size_t most = 0;
    for (int32_t tactic = 0; tactic < kTactics; ++tactic)
    {
        for (int32_t rows = 1; rows <= kDecodeRows && rows <= problem.rows; ++rows)
        {
            Cuts const cuts = cutProducts(problem, device, tactic, rows);
            size_t const mixed = static_cast<size_t>(cuts.mix.slices) * rows * problem.rank * 4;
            size_t const last = static_cast<size_t>(cuts.product.slices) * rows * problem.m * 4;
            most = std::max({most, mixes(problem) ? mixed : 0, last});
        }
    }
    return aligned(most);
}

size_t orderedBytes(Problem const& problem)
{
    if (problem.rows <= kDecodeRows || !mixes(problem))
    {
        return 0; // an ordered x of a dense layer takes the place of z
    }
    size_t const numbers = alignedStride(problem.rank) + alignedStride(problem.n - problem.rank);
    return aligned(static_cast<size_t>(problem.rows) * numbers * 2);
}

bool isAligned(void const* pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether every row of w can be read 16 bytes at a time (8 for int4).
bool readsInVectors(Matrix const& w, WeightType type)
{
    int32_t const numbers = type == WeightType::kFloat ? 8 : 16;
    return w.columns % numbers == 0 && isAligned(w.codes) && (w.scale == nullptr || isAligned(w.scale));
}

// Calls run(std::integral_constant<WeightType, type>): a kernel is made for each type of weights.
template <typename Run>
cudaError_t withWeights(WeightType type, Run run)
{
    switch (type)
    {
    case WeightType::kFloat: return run(std::integral_constant<WeightType, WeightType::kFloat>{});
    case WeightType::kInt8: return run(std::integral_constant<WeightType, WeightType::kInt8>{});
    case WeightType::kInt4: return run(std::integral_constant<WeightType, WeightType::kInt4>{});
    }
    return cudaErrorInvalidValue;
}

Matrix matrixA(Problem const& problem, Pointers const& pointers)
{
    return {pointers.a, pointers.aScale, problem.n - problem.rank, problem.rank, problem.a.groupSize};
}

Matrix matrixB(Problem const& problem, Pointers const& pointers)
{
    return {pointers.b, pointers.bScale, problem.rank, problem.m, problem.b.groupSize};
}

template <typename T, WeightType W>
cudaError_t launchDecodeProduct(
    DecodeArguments<T> const& arguments, int32_t slices, bool early, cudaStream_t stream)
{
    dim3 const grid(static_cast<unsigned>(ceilDivide(arguments.w.columns, decodeTile<W>())), static_cast<unsigned>(slices));
    size_t const shared = decodeSharedBytes<W>(arguments.rows, arguments.slice);
    if (readsInVectors(arguments.w, W))
    {
        return launch(decodeProduct<T, W, true>, grid, kDecodeThreads, shared, stream, early, arguments);
    }
    return launch(decodeProduct<T, W, false>, grid, kDecodeThreads, shared, stream, early, arguments);
}

template <typename T>
cudaError_t runDecodeProduct(
    DecodeArguments<T> const& arguments, WeightType weights, int32_t slices, bool early, cudaStream_t stream)
{
    return withWeights(weights,
        [&](auto type) { return launchDecodeProduct<T, decltype(type)::value>(arguments, slices, early, stream); });
}

template <typename T>
cudaError_t decode(Problem const& problem, Pointers const& pointers, Device const& device, unsigned char* workspace,
    uint32_t* counters, cudaStream_t stream)
{
    Cuts const cuts = cutProducts(problem, device, problem.tactic, problem.rows);
    DecodeArguments<T> product{};
    product.in = static_cast<T const*>(pointers.x);
    product.index = pointers.index;
    product.out = static_cast<T*>(pointers.y);
    product.partial = reinterpret_cast<float*>(workspace + latentBytes(problem));
    product.counters = counters;
    product.w = matrixB(problem, pointers);
    product.rows = problem.rows;
    product.inStride = problem.n;
    product.outStride = problem.m;
    product.slice = cuts.product.slice;
    if (!mixes(problem))
    {
        return runDecodeProduct(product, problem.b.type, cuts.product.slices, false, stream);
    }
    DecodeArguments<T> mix = product;
    mix.init = mix.in;
    mix.out = reinterpret_cast<T*>(workspace);
    mix.w = matrixA(problem, pointers);
    mix.outStride = problem.rank;
    mix.slice = cuts.mix.slice;
    cudaError_t const status = runDecodeProduct(mix, problem.a.type, cuts.mix.slices, false, stream);
    if (status != cudaSuccess)
    {
        return status;
    }
    product.in = mix.out;
    product.index = nullptr;
    product.inStride = problem.rank;
    return runDecodeProduct(product, problem.b.type, cuts.product.slices, device.capability >= 90, stream);
}

template <typename T, WeightType W, bool VECTOR>
cudaError_t runPrefillTiles(PrefillArguments<T> const& arguments, cudaStream_t stream)
{
    unsigned const across = static_cast<unsigned>(ceilDivide(arguments.w.columns, kTileColumns));
    if (arguments.rows <= 64)
    {
        dim3 const grid(static_cast<unsigned>(ceilDivide(arguments.rows, 32)), across);
        return launch(
            prefillProduct<T, W, VECTOR, 32>, grid, kTileThreads, prefillSharedBytes(32), stream, false, arguments);
    }
    dim3 const grid(static_cast<unsigned>(ceilDivide(arguments.rows, 128)), across);
    return launch(
        prefillProduct<T, W, VECTOR, 128>, grid, kTileThreads, prefillSharedBytes(128), stream, false, arguments);
}

template <typename T>
cudaError_t runPrefillProduct(PrefillArguments<T> const& arguments, WeightType weights, cudaStream_t stream)
{
    return withWeights(weights,
        [&](auto type)
        {
            constexpr WeightType kWeights = decltype(type)::value;
            if constexpr (kWeights == WeightType::kFloat)
            {
                if (readsInVectors(arguments.w, kWeights))
                {
                    return runPrefillTiles<T, kWeights, true>(arguments, stream);
                }
            }
            return runPrefillTiles<T, kWeights, false>(arguments, stream);
        });
}

// Puts x in order, its halves where tiles can be copied from, and lets `first` read them there.
template <typename T>
cudaError_t gatherHalves(
    Problem const& problem, Pointers const& pointers, T* ordered, PrefillArguments<T>& first, cudaStream_t stream)
{
    int32_t const rest = problem.n - problem.rank;
    int32_t const firstStride = alignedStride(problem.rank);
    T* const second = ordered + static_cast<size_t>(problem.rows) * firstStride;
    GatherArguments<T> const halves{static_cast<T const*>(pointers.x), pointers.index, ordered, second, problem.n,
        problem.rank, firstStride, alignedStride(rest)};
    first.in = mixes(problem) ? second : ordered;
    first.inStride = mixes(problem) ? alignedStride(rest) : firstStride;
    first.init = mixes(problem) ? ordered : nullptr;
    first.initStride = firstStride;
    return launch(gather<T>, dim3(static_cast<unsigned>(problem.rows)), kTileThreads, 0, stream, false, halves);
}

template <typename T>
cudaError_t prefill(
    Problem const& problem, Pointers const& pointers, unsigned char* workspace, cudaStream_t stream)
{
    T const* const x = static_cast<T const*>(pointers.x);
    T* const latent = reinterpret_cast<T*>(workspace);
    PrefillArguments<T> product{
        x, nullptr, static_cast<T*>(pointers.y), matrixB(problem, pointers), problem.rows, problem.n, 0, problem.m};
    PrefillArguments<T> const mix{x + problem.rank, x, latent, matrixA(problem, pointers), problem.rows, problem.n,
        problem.n, alignedStride(problem.rank)};
    PrefillArguments<T> first = mixes(problem) ? mix : product;
    if (problem.indexed || problem.n % 8 != 0 || problem.rank % 8 != 0 || !isAligned(x))
    {
        T* const ordered = mixes(problem) ? reinterpret_cast<T*>(workspace + latentBytes(problem)) : latent;
        cudaError_t const status = gatherHalves(problem, pointers, ordered, first, stream);
        if (status != cudaSuccess)
        {
            return status;
        }
    }
    cudaError_t const status
        = runPrefillProduct(first, mixes(problem) ? problem.a.type : problem.b.type, stream);
    if (status != cudaSuccess || !mixes(problem))
    {
        return status;
    }
    product.in = latent;
    product.inStride = alignedStride(problem.rank);
    return runPrefillProduct(product, problem.b.type, stream);
}

template <typename T>
cudaError_t run(Problem const& problem, Pointers const& pointers, Device const& device, void* workspace,
    uint32_t* counters, cudaStream_t stream)
{
    unsigned char* const scratch = static_cast<unsigned char*>(workspace);
    if (problem.rows <= kDecodeRows)
    {
        return decode<T>(problem, pointers, device, scratch, counters, stream);
    }
    return prefill<T>(problem, pointers, scratch, stream);
}

bool isQuantised(WeightFormat const& format)
{
    return format.type != WeightType::kFloat;
}

char const* whyPointersRefused(Problem const& problem, Pointers const& p)
{
    bool const readsA = mixes(problem);
    if (p.x == nullptr || p.b == nullptr || p.y == nullptr || (readsA && p.a == nullptr))
    {
        return "x, a, b and y must be given";
    }
    if (problem.indexed != (p.index != nullptr))
    {
        return "index must be given if and only if the problem is indexed";
    }
    if ((isQuantised(problem.b) && p.bScale == nullptr) || (readsA && isQuantised(problem.a) && p.aScale == nullptr))
    {
        return "int8 and int4 weights need scales";
    }
    return nullptr;
}

char const* whyFormatRefused(WeightFormat const& format)
{
    if (isQuantised(format) && format.type != WeightType::kInt8 && format.type != WeightType::kInt4)
    {
        return "weights must be of the type of x, int8 or int4";
    }
    if (isQuantised(format) ? format.groupSize < 16 || format.groupSize % 16 != 0 : format.groupSize != 0)
    {
        return "the group size must be a multiple of 16 with int8 and int4, and 0 without";
    }
    return nullptr;
}

} // namespace

char const* whyRefused(Problem const& problem) noexcept
{
    if (problem.rows < 1 || problem.rows > kMaxRows)
    {
        return "rows must be 1 to 4096";
    }
    if (problem.rank < 1 || problem.rank > problem.n)
    {
        return "rank must be 1 to n";
    }
    if (problem.m < 1 || problem.m > kMaxColumns || problem.n > kMaxColumns)
    {
        return "n and m must be 1 to 16777216";
    }
    if (problem.type != Float::kFP16 && problem.type != Float::kBF16)
    {
        return "x must be fp16 or bf16";
    }
    char const* const ofA = whyFormatRefused(problem.a);
    char const* const refusal = ofA != nullptr ? ofA : whyFormatRefused(problem.b);
    if (refusal != nullptr)
    {
        return refusal;
    }
    if (problem.tactic < 0 || problem.tactic >= kTactics)
    {
        return "there is no such tactic";
    }
    return nullptr;
}

size_t workspaceBytes(Problem const& problem, Device const& device) noexcept
{
    size_t const partial = partialBytes(problem, device);
    size_t const ordered = orderedBytes(problem);
    return latentBytes(problem) + (partial > ordered ? partial : ordered);
}

size_t counterBytes(Problem const& problem) noexcept
{
    int32_t const columns = problem.m > problem.rank ? problem.m : problem.rank;
    return aligned(static_cast<size_t>(ceilDivide(columns, decodeTile<WeightType::kFloat>())) * sizeof(uint32_t));
}

cudaError_t blockSkipLinear(Problem const& problem, Pointers const& pointers, Device const& device, void* workspace,
    uint32_t* counters, cudaStream_t stream) noexcept
{
    if (whyRefused(problem) != nullptr || whyPointersRefused(problem, pointers) != nullptr || workspace == nullptr
        || counters == nullptr || device.multiprocessors < 1)
    {
        return cudaErrorInvalidValue;
    }
    if (problem.type == Float::kFP16)
    {
        return run<__half>(problem, pointers, device, workspace, counters, stream);
    }
    return run<__nv_bfloat16>(problem, pointers, device, workspace, counters, stream);
}

} // namespace skipcat
