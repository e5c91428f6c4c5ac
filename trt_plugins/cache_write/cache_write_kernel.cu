// A copy of rows: read and written once, in the widest pieces that a row is made of.

#include "cache_write.h"

#include "device.cuh"

namespace skipcat::cache
{
namespace
{

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65535;

template <typename Piece>
struct Arguments
{
    Piece const* fresh;
    Piece* cache;
    int32_t const* first;
    int32_t heads, slots, tokens, width; // width in pieces
    int64_t count;                       // pieces of `fresh`
};

template <typename Piece>
__global__ void __launch_bounds__(kThreads) writeRows(Arguments<Piece> a)
{
    int64_t const stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.count; i += stride)
    {
        int64_t const row = i / a.width;
        int64_t const head = row / a.tokens; // of all rows of the batch
        int64_t const slot = a.first[head / a.heads] + row % a.tokens;
        if (slot >= 0 && slot < a.slots)
        {
            a.cache[(head * a.slots + slot) * a.width + i % a.width] = a.fresh[i];
        }
    }
}

template <typename Piece>
cudaError_t writePieces(
    Problem const& p, void const* fresh, int32_t const* first, void* cache, cudaStream_t stream)
{
    int64_t const count = static_cast<int64_t>(p.freshBytes() / sizeof(Piece));
    int64_t const blocks = (count + kThreads - 1) / kThreads;
    Arguments<Piece> const arguments{static_cast<Piece const*>(fresh), static_cast<Piece*>(cache), first, p.heads,
        p.slots, p.tokens, p.rowBytes / static_cast<int32_t>(sizeof(Piece)), count};
    dim3 const grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
    return launch(writeRows<Piece>, grid, kThreads, 0, stream, false, arguments);
}

} // namespace

cudaError_t writeCache(
    Problem const& problem, void const* fresh, int32_t const* first, void* cache, cudaStream_t stream)
{
    if (problem.freshBytes() == 0)
    {
        return cudaSuccess;
    }
    int32_t const bytes = problem.rowBytes;
    return bytes % 16 == 0 ? writePieces<uint4>(problem, fresh, first, cache, stream)
        : bytes % 4 == 0   ? writePieces<uint32_t>(problem, fresh, first, cache, stream)
        : bytes % 2 == 0   ? writePieces<uint16_t>(problem, fresh, first, cache, stream)
                           : writePieces<uint8_t>(problem, fresh, first, cache, stream);
}

} // namespace skipcat::cache
