#include "shapes.h"

namespace skipcat
{
namespace
{

bool isMatrix(nvinfer1::Dims const& dims, int64_t rows, int64_t columns)
{
    return dims.nbDims == 2 && dims.d[0] == rows && dims.d[1] == columns;
}

int64_t rowsOf(nvinfer1::Dims const& x)
{
    int64_t rows = 1;
    for (int32_t i = 0; i + 1 < x.nbDims; ++i)
    {
        rows *= x.d[i];
    }
    return rows;
}

std::string expected(char const* name, nvinfer1::Dims const& observed, int64_t rows, int64_t columns)
{
    return std::string(name) + " is " + text(observed) + ", expected [" + std::to_string(rows) + ", "
        + std::to_string(columns) + "]";
}

// Codes, of so many bits or none, and scales of one matrix [rows, columns].
std::string whyMatrixRefused(char const* name, WeightFormat const& format, nvinfer1::Dims const& codes,
    nvinfer1::Dims const* scale, int64_t rows, int64_t columns)
{
    int64_t const stored = format.type == WeightType::kInt4 ? (columns + 1) / 2 : columns;
    if (!isMatrix(codes, rows, stored))
    {
        return expected(name, codes, rows, stored);
    }
    if (scale != nullptr)
    {
        int64_t const groups = (rows + format.groupSize - 1) / format.groupSize;
        if (!isMatrix(*scale, groups, columns))
        {
            return expected((std::string("the scale of ") + name).c_str(), *scale, groups, columns);
        }
    }
    return "";
}

} // namespace

std::string text(nvinfer1::Dims const& dims)
{
    std::string result = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        result += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    }
    return result + "]";
}

Problem problemOf(Op const& op, Blocks const& blocks, nvinfer1::DataType type, nvinfer1::Dims const* inputs,
    std::string& refusal)
{
    Problem problem;
    problem.a = {static_cast<WeightType>(op.aBits), blocks.a};
    problem.b = {static_cast<WeightType>(op.bBits), blocks.b};
    nvinfer1::Dims const& x = inputs[0];
    nvinfer1::Dims const& b = inputs[op.b()];
    auto const at = [&](int32_t place) { return place < 0 ? nullptr : &inputs[place]; };
    nvinfer1::Dims const* const bScale = at(op.bScale());
    if (x.nbDims < 1 || b.nbDims != 2 || (bScale != nullptr && bScale->nbDims != 2))
    {
        refusal = "x is " + text(x) + " and b is " + text(b) + ", expected [..., n] and two dimensions";
        return problem;
    }
    int64_t const n = x.d[x.nbDims - 1];
    int64_t const rank = b.d[0]; // which a dense layer calls n
    int64_t const m = bScale != nullptr ? bScale->d[1] : b.d[1];
    int64_t const rows = rowsOf(x);
    if (n < 1 || n > INT32_MAX || m < 1 || m > INT32_MAX || rank < (op.mixes ? 1 : n) || rank > n || rows < 1
        || rows > kMaxRows)
    {
        refusal = "x is " + text(x) + " and b is " + text(b) + ", expected 1 to " + std::to_string(kMaxRows)
            + " rows of x, and " + (op.mixes ? "from 1 to n" : "n") + " rows of b";
        return problem;
    }
    refusal = op.mixes ? whyMatrixRefused("a", problem.a, *at(op.a()), at(op.aScale()), n - rank, rank) : "";
    if (refusal.empty())
    {
        refusal = whyMatrixRefused("b", problem.b, b, bScale, rank, m);
    }
    if (refusal.empty() && op.indexed)
    {
        nvinfer1::Dims const& index = inputs[op.index()];
        if (index.nbDims != 1 || index.d[0] != n)
        {
            refusal = "index is " + text(index) + ", expected [" + std::to_string(n) + "]";
        }
    }
    problem.rows = static_cast<int32_t>(rows);
    problem.n = static_cast<int32_t>(n);
    problem.m = static_cast<int32_t>(m);
    problem.rank = static_cast<int32_t>(rank);
    problem.type = type == nvinfer1::DataType::kBF16 ? Float::kBF16 : Float::kFP16;
    problem.indexed = op.indexed;
    if (refusal.empty() && whyRefused(problem) != nullptr)
    {
        refusal = whyRefused(problem);
    }
    return problem;
}

} // namespace skipcat
