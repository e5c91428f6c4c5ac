// Memory of exactly the size asked for, so that the address sanitizer sees what lies beside it; all NaN.

#ifndef SKIPCAT_EMULATE_BUFFER_H
#define SKIPCAT_EMULATE_BUFFER_H

#include <cstdlib>
#include <cstring>

namespace skipcat::emulate
{

template <typename N>
struct Buffer
{
    explicit Buffer(size_t count, unsigned char fill = 0xff)
        : bytes(count * sizeof(N))
        , data(static_cast<N*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)))
    {
        std::memset(static_cast<void*>(data), fill, bytes);
    }

    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;

    ~Buffer()
    {
        std::free(data);
    }

    size_t bytes;
    N* data;
};

} // namespace skipcat::emulate

#endif
