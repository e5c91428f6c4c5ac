// Runs the kernel on the CPU and compares with a copy, row by row, over shapes that a GPU would see.
//
//     compare [CASES [SEED]]      exit status 0 when every byte is as it should be
//
// Memory is of the exact size; some rows begin before the cache or end behind it, and are then left out there.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cache_write.h"
#include "emulate/buffer.h"

namespace
{

using skipcat::cache::Problem;
using skipcat::emulate::Buffer;
using Random = std::mt19937;

int32_t between(Random& random, int32_t least, int32_t most)
{
    return std::uniform_int_distribution<int32_t>(least, most)(random);
}

Problem randomProblem(Random& random)
{
    Problem p;
    p.batch = between(random, 1, 3);
    p.heads = between(random, 1, 5);
    p.slots = between(random, 1, 70);
    p.tokens = between(random, 1, p.slots);
    p.rowBytes = between(random, 1, 16) * (random() % 2 == 0 ? 16 : 1);
    return p;
}

bool isRight(Problem const& p, Random& random)
{
    Buffer<unsigned char> cache(p.cacheBytes()), fresh(p.freshBytes());
    Buffer<int32_t> first(static_cast<size_t>(p.batch));
    for (Buffer<unsigned char>* const bytes : {&cache, &fresh})
    {
        for (size_t i = 0; i < bytes->bytes; ++i)
        {
            bytes->data[i] = static_cast<unsigned char>(random());
        }
    }
    std::vector<unsigned char> expected(cache.data, cache.data + cache.bytes);
    for (int32_t row = 0; row < p.batch; ++row)
    {
        int32_t const beside = random() % 4 == 0 ? 2 : 0;
        first.data[row] = between(random, -beside, p.slots - p.tokens + beside);
        for (int32_t i = 0; i < p.heads * p.tokens; ++i)
        {
            int32_t const slot = first.data[row] + i % p.tokens;
            if (slot >= 0 && slot < p.slots)
            {
                size_t const to = (static_cast<size_t>(row * p.heads + i / p.tokens) * p.slots + slot) * p.rowBytes;
                size_t const from = (static_cast<size_t>(row) * p.heads * p.tokens + i) * p.rowBytes;
                std::copy_n(fresh.data + from, p.rowBytes, expected.data() + to);
            }
        }
    }
    bool const done = writeCache(p, fresh.data, first.data, cache.data, nullptr) == cudaSuccess;
    return done && std::equal(expected.begin(), expected.end(), cache.data);
}

} // namespace

int main(int argc, char** argv)
{
    int const cases = argc > 1 ? std::atoi(argv[1]) : 40;
    Random random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : std::random_device{}());
    int wrong = 0;
    for (int i = 0; i < cases; ++i)
    {
        Problem const p = randomProblem(random);
        bool const good = isRight(p, random);
        wrong += good ? 0 : 1;
        std::printf("%s batch %d heads %d slots %2d tokens %2d row of %3d bytes\n", good ? "ok  " : "FAIL", p.batch,
            p.heads, p.slots, p.tokens, p.rowBytes);
    }
    std::printf("%d cases, %d wrong\n", cases, wrong);
    return wrong == 0 ? 0 : 1;
}
