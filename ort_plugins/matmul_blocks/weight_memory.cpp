// Large pages: one core read 30 instead of 27 GB/s by them, and two together 50 instead of 31, on a virtual
// machine, which translates every address twice.

#include "weight_memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <sys/mman.h>

namespace skipcat
{
namespace
{

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kRegion = size_t{32} << 20; // of it only the pages that are written take memory
constexpr size_t kLine = 64;

size_t upTo(size_t bytes, size_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

std::shared_ptr<uint8_t> mapRegion(size_t bytes)
{
    size_t const mapped = bytes + kPage; // to start at a page
    void* const start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
    {
        throw std::bad_alloc{};
    }
    std::shared_ptr<uint8_t> const all{
        static_cast<uint8_t*>(start), [mapped](uint8_t* memory) { munmap(memory, mapped); }};
    auto const address = reinterpret_cast<uintptr_t>(start);
    uint8_t* const aligned = all.get() + (upTo(address, kPage) - address);
    madvise(aligned, bytes, MADV_HUGEPAGE); // a wish: without such pages it is slower, no more
    return {all, aligned};
}

struct Region
{
    std::mutex lock;
    std::weak_ptr<uint8_t> memory;
    size_t used{0};
    size_t bytes{0};
};

} // namespace

std::shared_ptr<uint8_t> allocateWeights(size_t bytes)
{
    static Region region;
    std::lock_guard<std::mutex> const guard{region.lock};
    size_t const wanted = upTo(bytes, kLine);
    std::shared_ptr<uint8_t> memory = region.memory.lock();
    if (memory == nullptr || region.used + wanted > region.bytes)
    {
        region.bytes = std::max(kRegion, upTo(wanted, kPage));
        memory = mapRegion(region.bytes);
        region.memory = memory;
        region.used = 0;
    }
    uint8_t* const at = memory.get() + region.used;
    region.used += wanted;
    return {memory, at};
}

} // namespace skipcat
