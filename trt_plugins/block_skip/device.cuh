// What the kernels need of the device: the matrix unit, permutes, streaming loads, and the launch.
//
// Compiled by a host compiler with SKIPCAT_EMULATE, every name here comes from emulate/device.h
// instead, and the same kernels run on the CPU, thread by thread.

#ifndef SKIPCAT_DEVICE_CUH
#define SKIPCAT_DEVICE_CUH

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef SKIPCAT_EMULATE
#include "emulate/device.h"
#else

#include <cuda_runtime.h>

namespace skipcat
{

// d[16 x 8] += a[16 x 16] b[16 x 8]. Lane 4g + t holds, with p = 2t and p + 1:
//     a[0]: (g, p), a[1]: (g + 8, p), a[2]: (g, p + 8), a[3]: (g + 8, p + 8), b[0]: (p, g), b[1]: (p + 8, g)
//     d[0..1]: (g, p), d[2..3]: (g + 8, p)
__device__ __forceinline__ void multiply(
    __half, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(
    __nv_bfloat16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane 8i + j names row j of matrix i.
__device__ __forceinline__ void loadMatrices(uint32_t (&out)[4], void const* row)
{
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void loadTransposed(uint32_t (&out)[4], void const* row)
{
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

template <uint32_t SELECTOR>
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high)
{
    return __byte_perm(low, high, SELECTOR);
}

// (x & mask) ^ bits, which the compiler makes two operations when both are constants.
__device__ __forceinline__ uint32_t maskFlip(uint32_t x, uint32_t mask, uint32_t bits)
{
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
    return result;
}

// Weights are read once: past L1, in whole lines.
__device__ __forceinline__ uint4 loadOnce16(void const* from)
{
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

__device__ __forceinline__ uint2 loadOnce8(void const* from)
{
    uint2 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "l"(from));
    return value;
}

// Past L1, which other multiprocessors' stores do not reach.
__device__ __forceinline__ float loadShared(float const* from)
{
    return __ldcg(from);
}

// 16 (8) bytes to shared memory in the background; those beyond `bytes` are zero and not read.
__device__ __forceinline__ void copyAsync16(void* to, void const* from, int bytes)
{
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copyAsync8(void* to, void const* from, int bytes)
{
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// The line of an address to the second cache, which all stores reach.
__device__ __forceinline__ void prefetchSecondCache(void const* from)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

__device__ __forceinline__ void closeCopies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int OPEN>
__device__ __forceinline__ void awaitCopies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

// Lets the next launch start its blocks early; what it does before awaitPrevious must not depend on this one.
__device__ __forceinline__ void releaseNext()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void awaitPrevious()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ unsigned char* sharedMemory()
{
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// `early`: the blocks may start before the previous kernel of the stream has ended (Hopper on).
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t sharedBytes, cudaStream_t stream, bool early,
    Arguments const& arguments)
{
    if (sharedBytes > 48 * 1024)
    {
        cudaError_t const status = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sharedBytes));
        // Room for blocks of the next launch beside those of this one.
        cudaError_t const carved = cudaFuncSetAttribute(
            kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        if (status != cudaSuccess || carved != cudaSuccess)
        {
            return status != cudaSuccess ? status : carved;
        }
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = sharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments);
}

} // namespace skipcat

#endif // SKIPCAT_EMULATE

namespace skipcat
{

__device__ __forceinline__ float toFloat(__half value)
{
    return __half2float(value);
}

__device__ __forceinline__ float toFloat(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

__device__ __forceinline__ void fromFloat(float value, __half& out)
{
    out = __float2half_rn(value);
}

__device__ __forceinline__ void fromFloat(float value, __nv_bfloat16& out)
{
    out = __float2bfloat16_rn(value);
}

} // namespace skipcat

#endif
