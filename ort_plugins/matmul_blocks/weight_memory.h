// Memory for matrices that are read from end to end for every token.

#ifndef SKIPCAT_ORT_WEIGHT_MEMORY_H
#define SKIPCAT_ORT_WEIGHT_MEMORY_H

#include <cstddef>
#include <cstdint>
#include <memory>

namespace skipcat
{

// So many bytes, from the start of a cache line, side by side with those of other matrices in large
// pages. The memory goes back when all that share it have let go. Throws std::bad_alloc.
std::shared_ptr<uint8_t> allocateWeights(size_t bytes);

} // namespace skipcat

#endif
