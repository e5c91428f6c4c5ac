// latent_attention.h for callers without C++ (Python's ctypes): the same structures, by pointer.

#include "latent_attention.h"

extern "C"
{

// Sizes of the structures, so that a caller whose own disagree can stop.
__attribute__((visibility("default"))) void skipcatLatentStructBytes(size_t* problem, size_t* pointers)
{
    *problem = sizeof(skipcat::latent::Problem);
    *pointers = sizeof(skipcat::latent::Pointers);
}

__attribute__((visibility("default"))) char const* skipcatLatentWhyRefused(skipcat::latent::Problem const* problem)
{
    return skipcat::latent::whyRefused(*problem);
}

__attribute__((visibility("default"))) size_t skipcatLatentWorkspaceBytes(
    skipcat::latent::Problem const* problem, int32_t multiprocessors)
{
    return skipcat::latent::workspaceBytes(*problem, multiprocessors);
}

__attribute__((visibility("default"))) int skipcatLatentAttention(skipcat::latent::Problem const* problem,
    skipcat::latent::Pointers const* pointers, int32_t multiprocessors, void* workspace, cudaStream_t stream)
{
    return static_cast<int>(
        skipcat::latent::latentAttention(*problem, *pointers, multiprocessors, workspace, stream));
}

} // extern "C"
