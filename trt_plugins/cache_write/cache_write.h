// New keys or values into a cache of fixed length, in place.

#ifndef SKIPCAT_CACHE_WRITE_H
#define SKIPCAT_CACHE_WRITE_H

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace skipcat::cache
{

// cache [batch, heads, slots, width], fresh [batch, heads, tokens, width]; first [batch] is the slot of a row's
// first token.
struct Problem
{
    int32_t batch{0};
    int32_t heads{0};
    int32_t slots{0};
    int32_t tokens{0};
    int32_t rowBytes{0}; // of a head's numbers of one token

    size_t cacheBytes() const { return static_cast<size_t>(batch) * heads * slots * rowBytes; }
    size_t freshBytes() const { return static_cast<size_t>(batch) * heads * tokens * rowBytes; }
};

// Writes `fresh` to its slots of `cache`; both are aligned to 16 bytes. What lies outside the slots is left out.
cudaError_t writeCache(
    Problem const& problem, void const* fresh, int32_t const* first, void* cache, cudaStream_t stream);

} // namespace skipcat::cache

#endif
