// The products by themselves, without ONNX Runtime, against sums in double: for sanitizers.
//
//     compare CASES SEED      prints the kinds of instructions that ran, each with a digest of all its
//                             numbers, which kinds have in common; fails on the first difference

#include "../products.h"
#include "../weight_memory.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

// In place of weight_memory.cpp: each matrix by itself, so that a byte beyond it is an error.
std::shared_ptr<uint8_t> skipcat::allocateWeights(size_t bytes)
{
    return {new uint8_t[bytes], std::default_delete<uint8_t[]>{}};
}

namespace
{

using skipcat::Instructions;
using skipcat::Matrix;
using skipcat::Tile;

std::mt19937 generator;
constexpr int64_t kRowsOfAll = 4; // of a tile that every kind has products for

int64_t between(int64_t first, int64_t last)
{
    return std::uniform_int_distribution<int64_t>{first, last}(generator);
}

float number(float low, float high)
{
    return std::uniform_real_distribution<float>{low, high}(generator);
}

// Vectors of exactly the sizes that are promised, so that a byte beyond is an error.
struct Case
{
    int64_t rows;
    int64_t columns;
    int64_t bits;
    int64_t block;
    int held; // 0 from the middle, 1 zeros, 2 rests
    std::vector<uint8_t> codes;
    std::vector<float> scales;
    std::vector<uint8_t> zeros;
    std::vector<float> rests;

    Case()
        : rows{between(1, 40)}
        , columns{between(1, 300)}
        , bits{int64_t{1} << between(1, 3)}
        , block{int64_t{16} << between(0, 4)}
        , held{static_cast<int>(between(0, 2))}
    {
        int64_t const blocks = (columns + block - 1) / block;
        codes.resize(static_cast<size_t>(rows * blocks * block * bits / 8));
        scales.resize(static_cast<size_t>(rows * blocks));
        zeros.resize(held == 1 ? static_cast<size_t>(rows * ((blocks * bits + 7) / 8)) : 0);
        rests.resize(held == 2 ? static_cast<size_t>(rows * blocks) : 0);
        bool const halves = between(0, 1) == 0;
        for (auto* bytes : {&codes, &zeros})
        {
            for (auto& byte : *bytes)
            {
                byte = static_cast<uint8_t>(between(0, 255));
            }
        }
        for (auto* numbers : {&scales, &rests})
        {
            for (auto& one : *numbers)
            {
                one = halves ? static_cast<float>(between(1, 100)) / 1024 : number(0.001F, 0.1F);
            }
        }
    }

    Matrix matrix() const
    {
        return {rows, columns, bits, block, codes.data(), scales.data(), held == 1 ? zeros.data() : nullptr,
            held == 2 ? rests.data() : nullptr};
    }

    int64_t codeAt(uint8_t const* bytes, int64_t place) const
    {
        int64_t const inByte = 8 / bits;
        return bytes[place / inByte] >> (place % inByte * bits) & ((1 << bits) - 1);
    }

    // (code - zero) of row j and column k, and what is added for its block.
    int64_t whole(int64_t j, int64_t k) const
    {
        int64_t const blocks = (columns + block - 1) / block;
        int64_t zero = int64_t{1} << (bits - 1);
        if (held == 1)
        {
            zero = codeAt(zeros.data() + j * ((blocks * bits + 7) / 8), k / block);
        }
        return codeAt(codes.data() + j * blocks * block * bits / 8, k) - zero;
    }
};

// A tile of exactly the promised sizes.
struct Rounded
{
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> sums;
    std::vector<float> wholes;
    Tile tile;

    Rounded(std::vector<float> const& x, int64_t rows, int64_t columns, int64_t block)
    {
        size_t const count = static_cast<size_t>(rows * ((columns + block - 1) / block));
        codes.resize(count * static_cast<size_t>(block));
        scales.resize(count);
        sums.resize(count);
        wholes.resize(count);
        tile = {rows, codes.data(), scales.data(), sums.data(), wholes.data()};
        for (int64_t row = 0; row < rows; ++row)
        {
            std::vector<float> const own(x.begin() + row * columns, x.begin() + (row + 1) * columns);
            skipcat::roundRow(own.data(), columns, block, tile, row);
        }
    }
};

std::vector<float> numbersOf(int64_t count)
{
    std::vector<float> numbers(static_cast<size_t>(count));
    for (auto& one : numbers)
    {
        one = number(-1, 1);
    }
    return numbers;
}

// FNV-1a.
void digest(std::vector<float> const& numbers, uint64_t* into)
{
    auto const* const bytes = reinterpret_cast<uint8_t const*>(numbers.data());
    for (size_t i = 0; i < numbers.size() * sizeof(float); ++i)
    {
        *into = (*into ^ bytes[i]) * 1099511628211U;
    }
}

// Whether a tile of so many rows agrees; one that the kind has no product for does. What all kinds have
// products for is added to the digest.
bool agrees(Instructions const& kind, Case const& one, int64_t rows, uint64_t* all)
{
    auto const x = numbersOf(rows * one.columns);
    auto const bias = numbersOf(one.rows);
    if (rows > kind.mostRows)
    {
        return true;
    }
    Rounded const rounded{x, rows, one.columns, one.block};
    auto const product = kind.pack(one.matrix());
    std::vector<float> y(static_cast<size_t>(rows * one.rows));
    product->compute(rounded.tile, 0, product->groups(), bias.data(), y.data());
    if (rows <= kRowsOfAll)
    {
        digest(y, all);
    }
    int64_t const blocks = (one.columns + one.block - 1) / one.block;
    std::vector<float> numbers(static_cast<size_t>(one.columns));
    for (int64_t j = 0; j < one.rows; ++j)
    {
        product->row(j, one.columns, numbers.data());
        for (int64_t r = 0; r < rows; ++r)
        {
            double expected = bias[static_cast<size_t>(j)];
            double size = 1;
            for (int64_t k = 0; k < one.columns; ++k)
            {
                int64_t const at = k / one.block;
                double const scale = one.scales[static_cast<size_t>(j * blocks + at)];
                double const rest = one.held == 2 ? one.rests[static_cast<size_t>(at * one.rows + j)] : 0;
                double const given = rounded.codes[static_cast<size_t>((k / 4 * rows + r) * 4 + k % 4)]
                    * static_cast<double>(rounded.scales[static_cast<size_t>(at * rows + r)]);
                double const weight = static_cast<double>(one.whole(j, k)) * scale;
                expected += given * weight + x[static_cast<size_t>(r * one.columns + k)] * rest;
                size += std::fabs(given * weight);
                if (std::fabs(weight + rest - numbers[static_cast<size_t>(k)]) > 1e-5)
                {
                    return false;
                }
            }
            if (std::fabs(expected - y[static_cast<size_t>(r * one.rows + j)]) > 1e-5 * size)
            {
                return false;
            }
        }
    }
    return true;
}

} // namespace

int main(int count, char** arguments)
{
    int const cases = count > 1 ? std::atoi(arguments[1]) : 100;
    for (Instructions const* kind : skipcat::kKinds)
    {
        if (!kind->available())
        {
            continue;
        }
        generator.seed(count > 2 ? static_cast<unsigned>(std::atoi(arguments[2])) : 0U);
        uint64_t all = 14695981039346656037U;
        for (int number = 0; number < cases; ++number)
        {
            Case const one;
            for (int64_t const rows : skipcat::kTileRows)
            {
                if (!agrees(*kind, one, rows, &all))
                {
                    std::printf("%s differs: case %d, %ld rows\n", kind->name, number, static_cast<long>(rows));
                    return 1;
                }
            }
        }
        std::printf("%s %016llx\n", kind->name, static_cast<unsigned long long>(all));
    }
    return 0;
}
