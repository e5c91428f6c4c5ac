// device.cuh for a host compiler: each CUDA thread is a fiber, and a block's fibers take turns.
//
// Slow, exact, and strict: collectives need every lane of the warp, barriers every thread of the block,
// and a block that can no longer move is an error, not a hang. The order in which fibers run is shuffled
// (SKIPCAT_EMULATE_SEED), so that a result that depends on it shows. Copies in the background arrive at
// once, but only awaitCopies makes them count: until then the target holds NaN. With
// SKIPCAT_EMULATE_NO_BARRIER no block waits for its threads: a test of the comparison itself.

#ifndef SKIPCAT_EMULATE_DEVICE_H
#define SKIPCAT_EMULATE_DEVICE_H

#include <cstdint>
#include <cstring>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "emulate/fiber.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace skipcat
{

// The reserved names of CUDA, set before a fiber runs.
struct Place
{
    unsigned x{0}, y{0}, z{0};
};

inline Place threadIdx, blockIdx, gridDim;

inline void __syncthreads()
{
#ifndef SKIPCAT_EMULATE_NO_BARRIER
    emulate::block().barrier(emulate::Scope::kBlock);
#endif
}

inline void __syncwarp()
{
#ifndef SKIPCAT_EMULATE_NO_BARRIER
    emulate::block().barrier(emulate::Scope::kWarp);
#endif
}

inline void __threadfence() {}

inline unsigned atomicAdd(uint32_t* address, unsigned value)
{
    unsigned const before = *address;
    *address += value;
    return before;
}

template <typename T, typename Convert>
void multiplyLanes(float (&d)[4], uint32_t const (&mine)[6], Convert convert)
{
    auto& lanes = emulate::block().exchange(mine, sizeof(mine));
    int const lane = static_cast<int>(threadIdx.x) % 32;
    auto const number = [&](int holder, int slot, int half)
    {
        uint32_t word;
        std::memcpy(&word, lanes[holder].data() + 4 * slot, 4);
        uint16_t const bits = static_cast<uint16_t>(half == 0 ? word : word >> 16);
        T value;
        std::memcpy(static_cast<void*>(&value), &bits, 2);
        return convert(value);
    };
    for (int e = 0; e < 4; ++e)
    {
        int const row = lane / 4 + 8 * (e / 2);
        int const column = 2 * (lane % 4) + e % 2;
        float sum = d[e];
        for (int k = 0; k < 16; ++k)
        {
            float const a = number(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
            float const b = number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
            sum += a * b;
        }
        d[e] = sum;
    }
    emulate::block().barrier(emulate::Scope::kWarp);
}

inline void multiply(
    __half, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    multiplyLanes<__half>(d, {a0, a1, a2, a3, b0, b1}, [](__half value) { return __half2float(value); });
}

inline void multiply(
    __nv_bfloat16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    multiplyLanes<__nv_bfloat16>(
        d, {a0, a1, a2, a3, b0, b1}, [](__nv_bfloat16 value) { return __bfloat162float(value); });
}

inline void loadLanes(uint32_t (&out)[4], void const* row, bool transposed)
{
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    {
        emulate::fail("a matrix load from an address that is not 16-byte aligned");
    }
    auto& lanes = emulate::block().exchange(row, 16);
    int const lane = static_cast<int>(threadIdx.x) % 32;
    for (int i = 0; i < 4; ++i)
    {
        uint16_t pair[2];
        for (int half = 0; half < 2; ++half)
        {
            int const from = transposed ? 2 * (lane % 4) + half : lane / 4;
            int const at = transposed ? lane / 4 : 2 * (lane % 4) + half;
            std::memcpy(&pair[half], lanes[8 * i + from].data() + 2 * at, 2);
        }
        out[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    emulate::block().barrier(emulate::Scope::kWarp);
}

inline void loadMatrices(uint32_t (&out)[4], void const* row)
{
    loadLanes(out, row, false);
}

inline void loadTransposed(uint32_t (&out)[4], void const* row)
{
    loadLanes(out, row, true);
}

template <uint32_t SELECTOR>
uint32_t permute(uint32_t low, uint32_t high)
{
    uint64_t const bytes = low | static_cast<uint64_t>(high) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
    {
        uint32_t const byte = (bytes >> (8 * (SELECTOR >> (4 * i) & 7))) & 255;
        result |= byte << (8 * i);
    }
    return result;
}

// CUDA's headers give host compilers no fused multiply of pairs; in float it is exact for the codes here.
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z)
{
    return __floats2half2_rn(__half2float(x.x) * __half2float(y.x) + __half2float(z.x),
        __half2float(x.y) * __half2float(y.y) + __half2float(z.y));
}

inline uint32_t maskFlip(uint32_t x, uint32_t mask, uint32_t bits)
{
    return (x & mask) ^ bits;
}

template <typename Vector>
Vector loadAligned(void const* from)
{
    if (reinterpret_cast<uintptr_t>(from) % sizeof(Vector) != 0)
    {
        emulate::fail("a vector load from an address that is not aligned to its size");
    }
    Vector value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

inline uint4 loadOnce16(void const* from)
{
    return loadAligned<uint4>(from);
}

inline uint2 loadOnce8(void const* from)
{
    return loadAligned<uint2>(from);
}

inline float loadShared(float const* from)
{
    return *from;
}

inline void copyAsync(void* to, void const* from, int bytes, size_t size)
{
    if (reinterpret_cast<uintptr_t>(to) % size != 0 || reinterpret_cast<uintptr_t>(from) % size != 0)
    {
        emulate::fail("an asynchronous copy between addresses that are not aligned to its size");
    }
    emulate::Copy copy{};
    std::memcpy(copy.bytes, from, static_cast<size_t>(bytes));
    copy.to = to;
    copy.size = size;
    std::memset(to, 0xff, size);
    emulate::block().current().open.push_back(copy);
}

inline void copyAsync16(void* to, void const* from, int bytes)
{
    copyAsync(to, from, bytes, 16);
}

inline void copyAsync8(void* to, void const* from, int bytes)
{
    copyAsync(to, from, bytes, 8);
}

inline void prefetchSecondCache(void const* from)
{
    volatile unsigned char const first = *static_cast<unsigned char const*>(from); // seen by the address sanitizer
    static_cast<void>(first);
}

inline void closeCopies()
{
    auto& fiber = emulate::block().current();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int OPEN>
void awaitCopies()
{
    auto& groups = emulate::block().current().groups;
    while (groups.size() > OPEN)
    {
        for (auto const& copy : groups.front())
        {
            std::memcpy(copy.to, copy.bytes, copy.size);
        }
        groups.pop_front();
    }
}

inline void releaseNext() {}

inline void awaitPrevious() {}

inline unsigned char* sharedMemory()
{
    return emulate::block().shared();
}

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t sharedBytes, cudaStream_t, bool,
    Arguments const& arguments)
{
    gridDim = {grid.x, grid.y, grid.z};
    // In any order: no block may rely on another having run.
    std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y);
    for (size_t i = 0; i < order.size(); ++i)
    {
        order[i] = static_cast<unsigned>(i);
    }
    std::shuffle(order.begin(), order.end(), emulate::randomness());
    for (unsigned const at : order)
    {
        blockIdx = {at % grid.x, at / grid.x, 0};
        emulate::runBlock(threads, sharedBytes, [&] { kernel(arguments); },
            [](int thread) { threadIdx.x = static_cast<unsigned>(thread); });
    }
    return cudaSuccess;
}

} // namespace skipcat

#endif
