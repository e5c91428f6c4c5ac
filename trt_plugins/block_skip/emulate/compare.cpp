// Runs the kernels on the CPU and compares with double precision, over shapes that a GPU would see.
//
//     compare [CASES [SEED]]      exit status 0 when every case is within its bound
//
// Inputs are fresh with every seed. Weights, inputs and outputs lie in allocations of their exact size,
// so that the address sanitizer sees a read or write beside them; outputs and scratch memory hold NaN.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "block_skip.h"
#include "device.cuh"
#include "emulate/buffer.h"

namespace
{

using namespace skipcat;
using emulate::Buffer;

// A matrix as the layer gets it, and the numbers it stands for.
template <typename T>
struct RandomMatrix
{
    RandomMatrix(int rows, int columns, WeightFormat const& format, std::mt19937& random)
        : values(static_cast<size_t>(rows) * columns)
        , numbers(format.type == WeightType::kFloat ? values.size() : 0)
        , codes(format.type == WeightType::kInt8 ? values.size()
                : format.type == WeightType::kInt4 ? static_cast<size_t>(rows) * ((columns + 1) / 2)
                                                   : 0,
              0)
        , scales(format.groupSize > 0 ? static_cast<size_t>((rows + format.groupSize - 1) / format.groupSize) * columns
                                      : 0)
    {
        std::normal_distribution<float> normal(0.0f, 0.05f);
        for (size_t i = 0; i < scales.bytes / sizeof(T); ++i)
        {
            fromFloat(0.001f + std::fabs(normal(random)) * 0.01f, scales.data[i]);
        }
        for (int k = 0; k < rows; ++k)
        {
            for (int j = 0; j < columns; ++j)
            {
                set(format, k, j, columns, normal(random), random);
            }
        }
    }

    void set(WeightFormat const& format, int k, int j, int columns, float number, std::mt19937& random)
    {
        size_t const at = static_cast<size_t>(k) * columns + j;
        if (format.type == WeightType::kFloat)
        {
            fromFloat(number, numbers.data[at]);
            values[at] = toFloat(numbers.data[at]);
            return;
        }
        T const scale = scales.data[static_cast<size_t>(k / format.groupSize) * columns + j];
        int code = static_cast<int>(random() % 255) - 127;
        if (format.type == WeightType::kInt8)
        {
            codes.data[at] = static_cast<uint8_t>(static_cast<int8_t>(code));
        }
        else
        {
            code = static_cast<int>(random() % 16) - 8;
            uint8_t& both = codes.data[static_cast<size_t>(k) * ((columns + 1) / 2) + j / 2];
            both = static_cast<uint8_t>(both | (code & 15) << (j % 2 * 4));
        }
        values[at] = static_cast<double>(code) * toFloat(scale);
    }

    void const* stored() const
    {
        return numbers.bytes > 0 ? static_cast<void const*>(numbers.data) : codes.data;
    }

    std::vector<double> values;
    Buffer<T> numbers;
    Buffer<uint8_t> codes;
    Buffer<T> scales;
};

// The size of the error by the size that the output has when its terms have random signs: a sum of few terms
// may cancel to nothing, and what rounding does to it still has the size of the terms.
template <typename T>
double relativeError(Problem const& problem, std::mt19937& random)
{
    int const rest = problem.n - problem.rank;
    RandomMatrix<T> const a(rest, problem.rank, problem.a, random);
    RandomMatrix<T> const b(problem.rank, problem.m, problem.b, random);
    Buffer<T> x(static_cast<size_t>(problem.rows) * problem.n);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < x.bytes / sizeof(T); ++i)
    {
        fromFloat(normal(random), x.data[i]);
    }
    Buffer<int32_t> index(static_cast<size_t>(problem.n));
    for (int j = 0; j < problem.n; ++j)
    {
        index.data[j] = j;
    }
    if (problem.indexed)
    {
        std::shuffle(index.data, index.data + problem.n, random);
    }
    Buffer<T> y(static_cast<size_t>(problem.rows) * problem.m);
    // A small chip and a large one: few slices of a reduction, and many.
    Device const device{random() % 2 == 0 ? 4 : 132, 90};
    Buffer<unsigned char> workspace(workspaceBytes(problem, device));
    Buffer<uint32_t> counters(counterBytes(problem) / 4, 0);
    Pointers const pointers{x.data, problem.indexed ? index.data : nullptr, rest > 0 ? a.stored() : nullptr,
        problem.a.groupSize > 0 && rest > 0 ? a.scales.data : nullptr, b.stored(),
        problem.b.groupSize > 0 ? b.scales.data : nullptr, y.data};
    if (blockSkipLinear(problem, pointers, device, workspace.data, counters.data, nullptr) != cudaSuccess)
    {
        return INFINITY;
    }
    for (size_t i = 0; i < counters.bytes / 4; ++i)
    {
        if (counters.data[i] != 0)
        {
            emulate::fail("a counter was left standing");
        }
    }
    double error = 0.0;
    double norm = 0.0;
    for (int row = 0; row < problem.rows; ++row)
    {
        std::vector<double> z(static_cast<size_t>(problem.rank));
        std::vector<double> squares(z.size());
        T const* const from = x.data + static_cast<size_t>(row) * problem.n;
        for (int j = 0; j < problem.rank; ++j)
        {
            z[j] = toFloat(from[index.data[j]]);
            squares[j] = z[j] * z[j];
            for (int k = 0; k < rest; ++k)
            {
                double const term
                    = toFloat(from[index.data[problem.rank + k]]) * a.values[static_cast<size_t>(k) * problem.rank + j];
                z[j] += term;
                squares[j] += term * term;
            }
        }
        for (int j = 0; j < problem.m; ++j)
        {
            double exact = 0.0;
            for (int k = 0; k < problem.rank; ++k)
            {
                double const factor = b.values[static_cast<size_t>(k) * problem.m + j];
                exact += z[k] * factor;
                norm += squares[k] * factor * factor;
            }
            double const difference = toFloat(y.data[static_cast<size_t>(row) * problem.m + j]) - exact;
            error += difference * difference;
        }
    }
    return std::sqrt(error / norm);
}

Problem randomProblem(std::mt19937& random)
{
    auto const pick = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
    Problem problem;
    problem.type = pick(0, 1) == 0 ? Float::kFP16 : Float::kBF16;
    // A group that is wider than the matrix is one scale to a column.
    auto const format = [&]
    {
        WeightType const types[] = {WeightType::kFloat, WeightType::kInt8, WeightType::kInt4};
        WeightType const type = types[pick(0, 2)];
        return WeightFormat{type, type == WeightType::kFloat ? 0 : pick(0, 3) == 0 ? 4096 : 16 * pick(1, 4)};
    };
    problem.a = format();
    problem.b = format();
    int const size = pick(0, 9);
    problem.rows = size < 4 ? 1 : size < 7 ? pick(2, 8) : size < 9 ? pick(9, 64) : pick(65, 140);
    int const unit = pick(0, 2) == 0 ? 1 : 16;
    problem.n = unit * pick(1, (problem.rows == 1 ? 3000 : 700) / unit);
    problem.rank = pick(0, 4) == 0 ? problem.n : unit * pick(1, problem.n / unit);
    problem.m = unit * pick(1, 300 / unit);
    problem.indexed = pick(0, 1) == 1;
    problem.tactic = pick(0, kTactics - 1);
    return problem;
}

} // namespace

int main(int argc, char** argv)
{
    int const cases = argc > 1 ? std::atoi(argv[1]) : 40;
    std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : std::random_device{}());
    int beyond = 0;
    for (int i = 0; i < cases; ++i)
    {
        Problem const p = randomProblem(random);
        bool const half = p.type == Float::kFP16;
        double const error = half ? relativeError<__half>(p, random) : relativeError<__nv_bfloat16>(p, random);
        bool const good = error <= (half ? 1e-3 : 1e-2);
        beyond += good ? 0 : 1;
        auto const bits = [](WeightFormat const& format)
        { return format.type == WeightType::kFloat ? 16 : static_cast<int>(format.type); };
        std::printf("%s %s bits %2d, %2d group %4d, %4d rows %4d n %4d rank %4d m %4d %s tactic %d: %.2e\n",
            good ? "ok  " : "FAIL", half ? "fp16" : "bf16", bits(p.a), bits(p.b), p.a.groupSize, p.b.groupSize, p.rows,
            p.n, p.rank, p.m, p.indexed ? "indexed" : "ordered", p.tactic, error);
    }
    std::printf("%d cases, %d beyond their bound\n", cases, beyond);
    return beyond == 0 ? 0 : 1;
}
