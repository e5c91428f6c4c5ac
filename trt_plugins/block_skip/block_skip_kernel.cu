// Which kernels a problem runs as, and where they keep what is between them.
//
// Up to 8 rows: two decode products, the second waiting only for the first one's results. More rows:
// tiles on the matrix unit, after x was put in order if it is not, or if its halves are not aligned.

#include "block_skip.h"

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

Cut cutReduction(Problem const& problem, Device const& device, int32_t decodeRows, int32_t reduction, int32_t columns)
{
    int32_t const tiles = ceilDivide(columns, tileOf(problem.weights));
    int32_t const wanted = device.multiprocessors * kTacticBlocks[problem.tactic];
    // At least two steps for each warp: less would be all start and end.
    int32_t const most = reduction / (2 * kRound) > 1 ? reduction / (2 * kRound) : 1;
    int32_t const slices = ceilDivide(wanted, tiles) < most ? ceilDivide(wanted, tiles) : most;
    int32_t slice = ceilDivide(ceilDivide(reduction, slices), kRound) * kRound;
    int32_t const fits = kMaxDecodeSharedBytes / (2 * decodeRows) / kRound * kRound - kRound;
    slice = slice < fits ? slice : fits;
    slice = slice < kRound ? kRound : slice;
    int32_t const used = ceilDivide(reduction, slice);
    return {slice, used < 1 ? 1 : used};
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
        Problem tried = problem;
        tried.tactic = tactic;
        for (int32_t rows = 1; rows <= kDecodeRows && rows <= problem.rows; ++rows)
        {
            Cut const first = cutReduction(tried, device, rows, problem.n - problem.rank, problem.rank);
            Cut const second = cutReduction(tried, device, rows, problem.rank, problem.m);
            size_t const bytes[] = {static_cast<size_t>(first.slices) * rows * problem.rank * 4,
                static_cast<size_t>(second.slices) * rows * problem.m * 4};
            most = bytes[0] > most ? bytes[0] : most;
            most = bytes[1] > most ? bytes[1] : most;
        }
    }
    return aligned(most);
}

size_t orderedBytes(Problem const& problem)
{
    if (problem.rows <= kDecodeRows)
    {
        return 0;
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

template <typename T, WeightType W>
cudaError_t runDecodeProduct(DecodeArguments<T> const& arguments, int32_t slices, bool early, cudaStream_t stream)
{
    dim3 const grid(static_cast<unsigned>(ceilDivide(arguments.w.columns, decodeTile<W>())), static_cast<unsigned>(slices));
    size_t const shared = decodeSharedBytes<W>(arguments.rows, arguments.slice);
    if (readsInVectors(arguments.w, W))
    {
        return launch(decodeProduct<T, W, true>, grid, kDecodeThreads, shared, stream, early, arguments);
    }
    return launch(decodeProduct<T, W, false>, grid, kDecodeThreads, shared, stream, early, arguments);
}

template <typename T, WeightType W>
cudaError_t decode(Problem const& problem, Pointers const& pointers, Device const& device, unsigned char* workspace,
    uint32_t* counters, cudaStream_t stream)
{
    int32_t const rest = problem.n - problem.rank;
    Cut const first = cutReduction(problem, device, problem.rows, rest, problem.rank);
    Cut const second = cutReduction(problem, device, problem.rows, problem.rank, problem.m);
    T* const latent = reinterpret_cast<T*>(workspace);
    float* const partial = reinterpret_cast<float*>(workspace + latentBytes(problem));

    DecodeArguments<T> mix{};
    mix.in = static_cast<T const*>(pointers.x);
    mix.index = pointers.index;
    mix.init = mix.in;
    mix.out = latent;
    mix.partial = partial;
    mix.counters = counters;
    mix.w = {pointers.a, pointers.aScale, rest, problem.rank, problem.groupSize};
    mix.rows = problem.rows;
    mix.inStride = problem.n;
    mix.outStride = problem.rank;
    mix.slice = first.slice;
    cudaError_t const status = runDecodeProduct<T, W>(mix, first.slices, false, stream);
    if (status != cudaSuccess)
    {
        return status;
    }
    DecodeArguments<T> product{};
    product.in = latent;
    product.out = static_cast<T*>(pointers.y);
    product.partial = partial;
    product.counters = counters;
    product.w = {pointers.b, pointers.bScale, problem.rank, problem.m, problem.groupSize};
    product.rows = problem.rows;
    product.inStride = problem.rank;
    product.outStride = problem.m;
    product.slice = second.slice;
    return runDecodeProduct<T, W>(product, second.slices, device.capability >= 90, stream);
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

template <typename T, WeightType W>
cudaError_t runPrefillProduct(PrefillArguments<T> const& arguments, cudaStream_t stream)
{
    if constexpr (W == WeightType::kFloat)
    {
        if (readsInVectors(arguments.w, W))
        {
            return runPrefillTiles<T, W, true>(arguments, stream);
        }
    }
    return runPrefillTiles<T, W, false>(arguments, stream);
}

template <typename T, WeightType W>
cudaError_t prefill(
    Problem const& problem, Pointers const& pointers, unsigned char* workspace, cudaStream_t stream)
{
    int32_t const rest = problem.n - problem.rank;
    T const* const x = static_cast<T const*>(pointers.x);
    T* const latent = reinterpret_cast<T*>(workspace);
    PrefillArguments<T> mix{x + problem.rank, x, latent,
        {pointers.a, pointers.aScale, rest, problem.rank, problem.groupSize}, problem.rows, problem.n, problem.n,
        alignedStride(problem.rank)};
    if (problem.indexed || problem.n % 8 != 0 || problem.rank % 8 != 0 || !isAligned(x))
    {
        int32_t const firstStride = alignedStride(problem.rank);
        T* const ordered = reinterpret_cast<T*>(workspace + latentBytes(problem));
        T* const second = ordered + static_cast<size_t>(problem.rows) * firstStride;
        GatherArguments<T> const halves{
            x, pointers.index, ordered, second, problem.n, problem.rank, firstStride, alignedStride(rest)};
        cudaError_t const status = launch(
            gather<T>, dim3(static_cast<unsigned>(problem.rows)), kTileThreads, 0, stream, false, halves);
        if (status != cudaSuccess)
        {
            return status;
        }
        mix.in = second;
        mix.init = ordered;
        mix.inStride = alignedStride(rest);
        mix.initStride = firstStride;
    }
    cudaError_t const status = runPrefillProduct<T, W>(mix, stream);
    if (status != cudaSuccess)
    {
        return status;
    }
    PrefillArguments<T> const product{latent, nullptr, static_cast<T*>(pointers.y),
        {pointers.b, pointers.bScale, problem.rank, problem.m, problem.groupSize}, problem.rows,
        alignedStride(problem.rank), 0, problem.m};
    return runPrefillProduct<T, W>(product, stream);
}

template <typename T, WeightType W>
cudaError_t run(Problem const& problem, Pointers const& pointers, Device const& device, void* workspace,
    uint32_t* counters, cudaStream_t stream)
{
    unsigned char* const scratch = static_cast<unsigned char*>(workspace);
    if (problem.rows <= kDecodeRows)
    {
        return decode<T, W>(problem, pointers, device, scratch, counters, stream);
    }
    return prefill<T, W>(problem, pointers, scratch, stream);
}

template <typename T>
cudaError_t runOfType(Problem const& problem, Pointers const& pointers, Device const& device, void* workspace,
    uint32_t* counters, cudaStream_t stream)
{
    switch (problem.weights)
    {
    case WeightType::kFloat: return run<T, WeightType::kFloat>(problem, pointers, device, workspace, counters, stream);
    case WeightType::kInt8: return run<T, WeightType::kInt8>(problem, pointers, device, workspace, counters, stream);
    case WeightType::kInt4: return run<T, WeightType::kInt4>(problem, pointers, device, workspace, counters, stream);
    }
    return cudaErrorInvalidValue;
}

char const* whyPointersRefused(Problem const& problem, Pointers const& p)
{
    bool const quantised = problem.weights != WeightType::kFloat;
    bool const mixes = problem.rank < problem.n;
    if (p.x == nullptr || p.b == nullptr || p.y == nullptr || (mixes && p.a == nullptr))
    {
        return "x, a, b and y must be given";
    }
    if (problem.indexed != (p.index != nullptr))
    {
        return "index must be given if and only if the problem is indexed";
    }
    if (quantised && (p.bScale == nullptr || (mixes && p.aScale == nullptr)))
    {
        return "int8 and int4 weights need scales";
    }
    return nullptr;
}

} // namespace

char const* whyRefused(Problem const& problem) noexcept
{
    bool const quantised = problem.weights != WeightType::kFloat;
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
    if (quantised && problem.weights != WeightType::kInt8 && problem.weights != WeightType::kInt4)
    {
        return "weights must be of the type of x, int8 or int4";
    }
    if (quantised ? problem.groupSize < 16 || problem.groupSize % 16 != 0 : problem.groupSize != 0)
    {
        return "the group size must be a multiple of 16 with int8 and int4, and 0 without";
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
        return runOfType<__half>(problem, pointers, device, workspace, counters, stream);
    }
    return runOfType<__nv_bfloat16>(problem, pointers, device, workspace, counters, stream);
}

} // namespace skipcat
