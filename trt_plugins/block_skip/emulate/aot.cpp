// Runs embedded kernels (aot.cuh) on the CPU, launched as the caller says, against double precision.
//
//     aot SEED < CASES
//
// A case is a line: mix|product fp16|bf16 indexed vector tile gather rows reduction columns, then grid x,
// grid y, threads, bytes of shared memory. Answers each with a line: the relative error.

#include <cmath>
#include <cstdio>
#include <iostream>
#include <random>
#include <string>

#include "aot.cuh"
#include "emulate/buffer.h"

namespace
{

using namespace skipcat;
using emulate::Buffer;

struct Case
{
    std::string op, type;
    bool indexed, vector;
    int tile;
    bool gather;
    int rows, reduction, columns;
    unsigned across, down;
    int threads;
    size_t sharedBytes;
};

std::istream& operator>>(std::istream& in, Case& c)
{
    return in >> c.op >> c.type >> c.indexed >> c.vector >> c.tile >> c.gather >> c.rows >> c.reduction >> c.columns
        >> c.across >> c.down >> c.threads >> c.sharedBytes;
}

template <typename T>
struct Operands
{
    T const* in;
    T const* w;
    int32_t const* index;
    T* out;
};

template <typename T, bool MIX, bool VECTOR, int TILE, bool GATHER>
void runGrid(Case const& c, Operands<T> const& o)
{
    constexpr size_t kNeeded = TILE == kDecodeRows ? kAotDecodeSharedBytes : prefillSharedBytes(TILE, aotRing<TILE>());
    if (c.threads != kDecodeThreads || c.sharedBytes != kNeeded)
    {
        emulate::fail("the launch has other threads or other shared memory than the kernel");
    }
    gridDim = {c.across, c.down, 1};
    for (unsigned at = 0; at < c.across * c.down; ++at)
    {
        blockIdx = {at % c.across, at / c.across, 0};
        emulate::runBlock(c.threads, c.sharedBytes,
            [&]
            {
                aotProduct<T, MIX, VECTOR, TILE, GATHER>(
                    o.in, o.w, o.index, c.rows, c.reduction, c.columns, o.out);
            },
            [](int thread) { threadIdx.x = static_cast<unsigned>(thread); });
    }
}

template <typename T, bool MIX, bool VECTOR>
void runTile(Case const& c, Operands<T> const& o)
{
    switch (c.tile)
    {
    case 8: return runGrid<T, MIX, VECTOR, 8, false>(c, o);
    case 32: return c.gather ? runGrid<T, MIX, VECTOR, 32, true>(c, o) : runGrid<T, MIX, VECTOR, 32, false>(c, o);
    case 64: return c.gather ? runGrid<T, MIX, VECTOR, 64, true>(c, o) : runGrid<T, MIX, VECTOR, 64, false>(c, o);
    default: emulate::fail("there is no such tile");
    }
}

template <typename T>
double relativeError(Case const& c, std::mt19937& random)
{
    bool const mix = c.op == "mix";
    int const width = mix ? c.columns + c.reduction : c.reduction;
    std::normal_distribution<float> normal;
    Buffer<T> in(static_cast<size_t>(c.rows) * width);
    Buffer<T> w(static_cast<size_t>(c.reduction) * c.columns);
    Buffer<T> out(static_cast<size_t>(c.rows) * c.columns);
    Buffer<int32_t> index(static_cast<size_t>(width));
    for (size_t i = 0; i < in.bytes / sizeof(T); ++i)
    {
        fromFloat(normal(random), in.data[i]);
    }
    for (size_t i = 0; i < w.bytes / sizeof(T); ++i)
    {
        fromFloat(normal(random), w.data[i]);
    }
    for (int j = 0; j < width; ++j)
    {
        index.data[j] = j;
    }
    if (c.indexed)
    {
        std::shuffle(index.data, index.data + width, random);
    }
    Operands<T> const operands{in.data, w.data, c.indexed ? index.data : nullptr, out.data};
    auto const run = mix ? (c.vector ? runTile<T, true, true> : runTile<T, true, false>)
                         : (c.vector ? runTile<T, false, true> : runTile<T, false, false>);
    run(c, operands);
    double error = 0.0;
    double norm = 0.0;
    for (int row = 0; row < c.rows; ++row)
    {
        T const* const from = in.data + static_cast<size_t>(row) * width;
        for (int j = 0; j < c.columns; ++j)
        {
            double exact = mix ? toFloat(from[index.data[j]]) : 0.0;
            for (int k = 0; k < c.reduction; ++k)
            {
                exact += static_cast<double>(toFloat(from[index.data[(mix ? c.columns : 0) + k]]))
                    * toFloat(w.data[static_cast<size_t>(k) * c.columns + j]);
            }
            double const difference = toFloat(out.data[static_cast<size_t>(row) * c.columns + j]) - exact;
            error += difference * difference;
            norm += exact * exact;
        }
    }
    return std::sqrt(error / norm);
}

} // namespace

int main(int argc, char** argv)
{
    std::mt19937 random(argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device{}());
    Case c;
    while (std::cin >> c)
    {
        double const error = c.type == "fp16" ? relativeError<__half>(c, random) : relativeError<__nv_bfloat16>(c, random);
        std::printf("%.3e\n", error);
    }
    return 0;
}
