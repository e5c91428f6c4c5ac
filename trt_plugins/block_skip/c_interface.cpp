// block_skip.h for callers without C++ (Python's ctypes): the same structures, by pointer.

#include "block_skip.h"

extern "C"
{

// Sizes of the structures, so that a caller whose own disagree can stop.
__attribute__((visibility("default"))) void skipcatStructBytes(size_t* problem, size_t* pointers, size_t* device)
{
    *problem = sizeof(skipcat::Problem);
    *pointers = sizeof(skipcat::Pointers);
    *device = sizeof(skipcat::Device);
}

__attribute__((visibility("default"))) char const* skipcatWhyRefused(skipcat::Problem const* problem)
{
    return skipcat::whyRefused(*problem);
}

__attribute__((visibility("default"))) size_t skipcatWorkspaceBytes(
    skipcat::Problem const* problem, skipcat::Device const* device)
{
    return skipcat::workspaceBytes(*problem, *device);
}

__attribute__((visibility("default"))) size_t skipcatCounterBytes(skipcat::Problem const* problem)
{
    return skipcat::counterBytes(*problem);
}

__attribute__((visibility("default"))) int skipcatBlockSkipLinear(skipcat::Problem const* problem,
    skipcat::Pointers const* pointers, skipcat::Device const* device, void* workspace, uint32_t* counters,
    cudaStream_t stream)
{
    return static_cast<int>(
        skipcat::blockSkipLinear(*problem, *pointers, *device, workspace, counters, stream));
}

// Counters for blockSkipLinear, zero, in memory that no allocator of the caller's knows: PyTorch's takes
// memory back that was handed out while it records a graph. They stay for the life of the process.
__attribute__((visibility("default"))) int skipcatMakeCounters(int device, size_t bytes, void** counters)
{
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess)
    {
        status = cudaMalloc(counters, bytes);
    }
    if (status == cudaSuccess)
    {
        status = cudaMemset(*counters, 0, bytes);
    }
    if (status == cudaSuccess)
    {
        status = cudaDeviceSynchronize(); // streams that do not wait for the default one may use them
    }
    return static_cast<int>(status);
}

} // extern "C"
