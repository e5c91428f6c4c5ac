// What warps that walk on their own need of the device: votes, shuffles, transposes, and small copies.
//
// Beside block skip's device layer, and as there: with SKIPCAT_EMULATE the same names run on the CPU.

#ifndef SKIPCAT_LATENT_LANES_CUH
#define SKIPCAT_LATENT_LANES_CUH

#include <cmath>
#include <cstring>

#include "device.cuh"

namespace skipcat::latent
{

#ifdef SKIPCAT_EMULATE

template <typename N>
N fromLane(N mine, int lane)
{
    auto& lanes = emulate::block().exchange(&mine, sizeof(mine));
    N other;
    std::memcpy(static_cast<void*>(&other), lanes[lane].data(), sizeof(other));
    emulate::block().barrier(emulate::Scope::kWarp);
    return other;
}

inline float shuffleXor(float mine, int distance)
{
    return fromLane(mine, static_cast<int>(threadIdx.x) % 32 ^ distance);
}

inline bool anyLane(bool mine)
{
    auto& lanes = emulate::block().exchange(&mine, sizeof(mine));
    bool any = false;
    for (auto const& lane : lanes)
    {
        any = any || lane[0] != 0;
    }
    emulate::block().barrier(emulate::Scope::kWarp);
    return any;
}

inline uint32_t transposed(uint32_t mine)
{
    auto& lanes = emulate::block().exchange(&mine, sizeof(mine));
    int const lane = static_cast<int>(threadIdx.x) % 32;
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half)
    {
        // Row 2 (lane % 4) + half of the matrix, column lane / 4.
        auto const& holder = lanes[4 * (2 * (lane % 4) + half) + lane / 4 / 2];
        std::memcpy(&pair[half], holder.data() + 2 * (lane / 4 % 2), 2);
    }
    emulate::block().barrier(emulate::Scope::kWarp);
    return pair[0] | static_cast<uint32_t>(pair[1]) << 16;
}

inline void loadMatrixPair(uint32_t (&out)[2], void const* row)
{
    uint32_t all[4];
    loadMatrices(all, row);
    out[0] = all[0];
    out[1] = all[1];
}

inline void copyWhole16(void* to, void const* from)
{
    copyAsync16(to, from, 16);
}

inline void copyAsync4(void* to, void const* from)
{
    copyAsync(to, from, 4, 4);
}

inline float powerOf2(float exponent)
{
    return exp2f(exponent);
}

// An RTX 30's or a Hopper's.
inline int sharedBytesAtMost()
{
    return emulate::randomness()() % 2 == 0 ? 99 * 1024 : 227 * 1024;
}

template <typename Arguments>
int residentBlocks(void (*)(Arguments), int, size_t)
{
    return static_cast<int>(1 + emulate::randomness()() % 5);
}

#else

__device__ __forceinline__ float shuffleXor(float mine, int distance)
{
    return __shfl_xor_sync(0xffffffffu, mine, distance);
}

__device__ __forceinline__ bool anyLane(bool mine)
{
    return __any_sync(0xffffffffu, mine) != 0;
}

// An 8 x 8 matrix of 16-bit numbers, of which lane 4g + t holds (g, 2t) and (g, 2t + 1), turned over.
__device__ __forceinline__ uint32_t transposed(uint32_t mine)
{
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(mine));
    return result;
}

// Two matrices, as loadMatrices; lane 8i + j of the first 16 names row j of matrix i.
__device__ __forceinline__ void loadMatrixPair(uint32_t (&out)[2], void const* row)
{
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
}

// 16 bytes to shared memory in the background, all of them there: fewer instructions than with a count.
__device__ __forceinline__ void copyWhole16(void* to, void const* from)
{
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void copyAsync4(void* to, void const* from)
{
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}

// 2^exponent to 2 units in the last place; 0 where it is below the smallest normal number.
__device__ __forceinline__ float powerOf2(float exponent)
{
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
    return result;
}

// Shared memory that a block may ask for on this device; 0 where it does not say.
inline int sharedBytesAtMost()
{
    int device = 0;
    int bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess
        || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    {
        return 0;
    }
    return bytes;
}

// Blocks that run on one multiprocessor at a time; at least 1.
template <typename Arguments>
int residentBlocks(void (*kernel)(Arguments), int threads, size_t sharedBytes)
{
    int blocks = 0;
    cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sharedBytes));
    if (status == cudaSuccess)
    {
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, sharedBytes);
    }
    return status == cudaSuccess && blocks > 0 ? blocks : 1;
}

#endif

} // namespace skipcat::latent

#endif
