// Rounding rows of x to 8 bits, and the choice among kinds of CPUs.

#include "products.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace skipcat
{
namespace
{

constexpr int64_t kStep = 16; // numbers that are rounded together; blocks are multiples of it
constexpr int64_t kLongestBlock = 256;
typedef float Floats __attribute__((vector_size(kStep * sizeof(float)), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kStep * sizeof(int32_t))));
typedef int8_t Bytes __attribute__((vector_size(kStep), aligned(1)));

constexpr float kLargest = 127.0F;
// Adding it leaves a number below 2^22 rounded to the nearest integer, ties to even, in the lowest bits.
constexpr float kRounder = 12582912.0F;

template <typename Vector>
auto total(Vector const& numbers)
{
    auto sum = numbers[0];
    for (int64_t i = 1; i < kStep; ++i)
    {
        sum += numbers[i];
    }
    return sum;
}

// Wider instructions are taken where the CPU has them, with the same numbers.
#ifdef __x86_64__
#define SKIPCAT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SKIPCAT_CLONES
#endif

// One block.
SKIPCAT_CLONES void roundBlock(
    float const* x, int64_t block, int8_t* codes, float* scale, int32_t* sum, float* whole)
{
    Floats largest{};
    Floats wholes{};
    for (int64_t at = 0; at < block; at += kStep)
    {
        Floats const numbers = *reinterpret_cast<Floats const*>(x + at);
        Floats const sizes = numbers < 0 ? -numbers : numbers;
        largest = sizes > largest ? sizes : largest;
        wholes += numbers;
    }
    float most = 0;
    for (int64_t i = 0; i < kStep; ++i)
    {
        most = largest[i] > most ? largest[i] : most;
    }
    *whole = total(wholes);
    *scale = most / kLargest;
    float const inverse = *scale == 0 ? 0 : 1 / *scale;
    Ints sums{};
    for (int64_t at = 0; at < block; at += kStep)
    {
        Floats const rounded = *reinterpret_cast<Floats const*>(x + at) * inverse + kRounder;
        Ints bits;
        std::memcpy(&bits, &rounded, sizeof(bits));
        Ints const integers = bits - 0x4B400000; // kRounder's
        sums += integers;
        *reinterpret_cast<Bytes*>(codes + at) = __builtin_convertvector(integers, Bytes);
    }
    *sum = total(sums);
    if (!std::isfinite(*whole))
    {
        *scale = std::numeric_limits<float>::quiet_NaN(); // a NaN is no code: it must not get lost
    }
}

Instructions const* choose()
{
    char const* const wanted = std::getenv("SKIPCAT_KERNELS");
    for (Instructions const* kind : kKinds)
    {
        bool const named = wanted == nullptr || *wanted == 0 || std::strcmp(wanted, kind->name) == 0;
        if (named && kind->available())
        {
            return kind;
        }
    }
    return nullptr;
}

} // namespace

void roundRow(float const* x, int64_t columns, int64_t block, Tile const& tile, int64_t row)
{
    float last[kLongestBlock];
    int8_t codes[kLongestBlock];
    for (int64_t start = 0, index = row; start < columns; start += block, index += tile.rows)
    {
        float const* from = x + start;
        if (start + block > columns)
        {
            std::memset(last, 0, sizeof(last));
            std::memcpy(last, from, static_cast<size_t>(columns - start) * sizeof(float));
            from = last;
        }
        roundBlock(from, block, codes, tile.scales + index, tile.sums + index, tile.wholes + index);
        int8_t* const into = tile.codes + start * tile.rows + row * 4;
        for (int64_t at = 0; at < block; at += 4)
        {
            std::memcpy(into + at * tile.rows, codes + at, 4);
        }
    }
}

Instructions const* instructions()
{
    static Instructions const* const found = choose();
    return found;
}

} // namespace skipcat
