// Which kernels a problem runs as, and where they keep what is between them.
//
// Up to 8 rows: two decode products, the second waiting only for the first one's results; streamed, or, where rows
// of the weights are not aligned, number by number. More rows:
// tiles on the matrix unit, after x was put in order if it is not, or if its halves are not aligned.
// With rank == n the first product would copy x, and is left out.

#include "block_skip.h"

#include <algorithm>
#include <type_traits>

#include "cut.cuh"
#include "prefill.cuh"

namespace skipcat
{
namespace
{

constexpr size_t kAlignment = 256;
constexpr int32_t kMaxColumns = 1 << 24;

size_t aligned(size_t bytes)
{
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// A row length whose rows start at multiples of 16 bytes.
int32_t alignedStride(int32_t columns)
{
    return ceilDivide(columns, 8) * 8;
}

bool mixes(Problem const& problem)
{
    return problem.rank < problem.n;
}

Product firstOf(Problem const& problem, int32_t rows)
{
    return {problem.a, rows, problem.n - problem.rank, problem.rank};
}

Product secondOf(Problem const& problem, int32_t rows)
{
    return {problem.b, rows, problem.rank, problem.m};
}

size_t latentBytes(Problem const& problem)
{
    return aligned(static_cast<size_t>(problem.rows) * alignedStride(problem.rank) * 2);
}

size_t mostPartialBytes(Problem const& problem, Device const& device)
{
    size_t most = 0;
    for (int32_t tactic = 0; tactic < kTactics; ++tactic)
    {
        for (int32_t rows = 1; rows <= kDecodeRows && rows <= problem.rows; ++rows)
        {
            size_t const mixed = mixes(problem) ? partialBytes(firstOf(problem, rows), device, tactic) : 0;
            most = std::max({most, mixed, partialBytes(secondOf(problem, rows), device, tactic)});
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

// What a launch may assume of the one before it.
enum class After
{
    kAnything, // weights may have been written by it
    kProduct   // it is the first of the two products
};

template <typename T, WeightType W, int CHUNK>
cudaError_t launchStream(DecodeArguments<T> const& arguments, Product const& product, Device const& device,
    int32_t tactic, After after, cudaStream_t stream)
{
    Shares const shares = cutShares<W, CHUNK>(product, device, tactic);
    StreamArguments<T> p{arguments, shares.tileStages, shares.staged / stageRows<W, CHUNK>(), shares.perTile,
        shares.stages / shares.blocks, shares.stages % shares.blocks, after == After::kProduct};
    p.slice = shares.staged;
    size_t const shared = streamSharedBytes<W, CHUNK>(p.rows, p.slice);
    dim3 const grid(static_cast<unsigned>(shares.blocks));
    return launch(streamProduct<T, W, CHUNK>, grid, kDecodeThreads, shared, stream, device.capability >= 90, p);
}

template <typename T, WeightType W>
cudaError_t launchDecodeProduct(DecodeArguments<T> const& arguments, Product const& product, Device const& device,
    int32_t tactic, After after, cudaStream_t stream)
{
    if (readsInVectors(arguments.w, W) && hasShares(product))
    {
        if constexpr (W == WeightType::kInt4)
        {
            if (product.columns % 32 != 0 || product.format.groupSize % 32 != 0)
            {
                return launchStream<T, W, 8>(arguments, product, device, tactic, after, stream);
            }
        }
        return launchStream<T, W, 16>(arguments, product, device, tactic, after, stream);
    }
    Slices const cut = cutReduction(product, device, tactic);
    DecodeArguments<T> p = arguments;
    p.slice = cut.slice;
    dim3 const grid(static_cast<unsigned>(product.tiles()), static_cast<unsigned>(cut.slices));
    bool const early = after == After::kProduct && device.capability >= 90;
    return launch(decodeProduct<T, W>, grid, kDecodeThreads, decodeSharedBytes<W>(p.rows, p.slice), stream, early, p);
}

template <typename T>
cudaError_t runDecodeProduct(DecodeArguments<T> const& arguments, Product const& product, Device const& device,
    int32_t tactic, After after, cudaStream_t stream)
{
    return withWeights(product.format.type,
        [&](auto type)
        { return launchDecodeProduct<T, decltype(type)::value>(arguments, product, device, tactic, after, stream); });
}

template <typename T>
cudaError_t decode(Problem const& problem, Pointers const& pointers, Device const& device, unsigned char* workspace,
    uint32_t* counters, cudaStream_t stream)
{
    Product const second = secondOf(problem, problem.rows);
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
    if (!mixes(problem))
    {
        return runDecodeProduct(product, second, device, problem.tactic, After::kAnything, stream);
    }
    DecodeArguments<T> mix = product;
    mix.init = mix.in;
    mix.out = reinterpret_cast<T*>(workspace);
    mix.w = matrixA(problem, pointers);
    mix.outStride = problem.rank;
    cudaError_t const status = runDecodeProduct(
        mix, firstOf(problem, problem.rows), device, problem.tactic, After::kAnything, stream);
    if (status != cudaSuccess)
    {
        return status;
    }
    product.in = mix.out;
    product.index = nullptr;
    product.inStride = problem.rank;
    return runDecodeProduct(product, second, device, problem.tactic, After::kProduct, stream);
}

template <typename T, WeightType W, bool VECTOR, int TILE_ROWS>
cudaError_t launchPrefill(PrefillArguments<T> const& arguments, cudaStream_t stream)
{
    dim3 const grid(static_cast<unsigned>(ceilDivide(arguments.rows, TILE_ROWS)),
        static_cast<unsigned>(ceilDivide(arguments.w.columns, kTileColumns)));
    return launch(prefillProduct<T, W, VECTOR, TILE_ROWS>, grid, kTileThreads, prefillSharedBytes(TILE_ROWS), stream,
        false, arguments);
}

template <typename T, WeightType W, bool VECTOR>
cudaError_t runPrefillTiles(PrefillArguments<T> const& arguments, cudaStream_t stream)
{
    if (arguments.rows <= 64)
    {
        return launchPrefill<T, W, VECTOR, 32>(arguments, stream);
    }
    return launchPrefill<T, W, VECTOR, 128>(arguments, stream);
}

template <typename T>
cudaError_t runPrefillProduct(PrefillArguments<T> const& arguments, WeightType weights, cudaStream_t stream)
{
    return withWeights(weights,
        [&](auto type)
        {
            constexpr WeightType kWeights = decltype(type)::value;
            if (readsInVectors(arguments.w, kWeights))
            {
                return runPrefillTiles<T, kWeights, true>(arguments, stream);
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
    size_t const partial = mostPartialBytes(problem, device);
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
