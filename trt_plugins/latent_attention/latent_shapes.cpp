// From the tensors TensorRT names to the problem the kernels know, or to why there is none.

#include "latent_plugin.h"

#include "shapes.h"

namespace skipcat::latent
{
namespace
{

constexpr int64_t kAny = -1;

// "mask is [1, 1, 3, 7], expected [1, 1, 3, 8]"; empty when it is. kAny stands for what is at least 1.
std::string whyNot(char const* name, nvinfer1::Dims const& seen, std::vector<int64_t> const& expected)
{
    bool fits = seen.nbDims == static_cast<int32_t>(expected.size());
    std::string wanted = "[";
    for (size_t i = 0; i < expected.size(); ++i)
    {
        int64_t const size = fits ? seen.d[i] : 0;
        fits = fits && (expected[i] == kAny ? size >= 1 && size <= INT32_MAX : size == expected[i]);
        wanted += (i > 0 ? ", " : "") + (expected[i] == kAny ? std::string("any") : std::to_string(expected[i]));
    }
    return fits ? "" : std::string(name) + " is " + text(seen) + ", expected " + wanted + "]";
}

std::string whySideNot(char const* name, Form form, nvinfer1::Dims const& held, nvinfer1::Dims const* steps,
    int64_t batch, int64_t slots, Side& side)
{
    std::string refusal = whyNot(name, held, {batch, kAny, slots, kAny});
    if (refusal.empty() && steps != nullptr)
    {
        refusal = whyNot((std::string("the steps of ") + name).c_str(), *steps, {batch, held.d[1], slots, 2});
    }
    if (refusal.empty())
    {
        side = {static_cast<int32_t>(held.d[1]), static_cast<int32_t>(held.d[3]), form};
    }
    return refusal;
}

std::string whyTablesNot(LatentOp const& op, nvinfer1::Dims const* inputs, Problem& problem)
{
    nvinfer1::Dims const& up = inputs[op.up()];
    std::string refusal = whyNot("up", up, {problem.keys.groups, kAny, problem.keys.rank(), problem.width});
    if (!refusal.empty())
    {
        return refusal;
    }
    problem.headsPerGroup = static_cast<int32_t>(up.d[1]);
    refusal = whyNot("mean", inputs[op.up() + 1], {problem.keys.groups, up.d[1], 1, problem.width});
    for (int32_t const place : {op.up() + 2, op.up() + 3})
    {
        nvinfer1::Dims const& table = inputs[place];
        if (refusal.empty())
        {
            refusal = whyNot("a table of angles", table, {kAny, problem.width / 2});
        }
        if (refusal.empty() && table.d[0] < problem.slots)
        {
            refusal = "a table of angles is " + text(table) + ", expected at least " + std::to_string(problem.slots)
                + " rows";
        }
    }
    return refusal;
}

} // namespace

Problem problemOf(LatentOp const& op, nvinfer1::Dims const* inputs, std::string& refusal)
{
    Problem problem;
    nvinfer1::Dims const& query = inputs[kQuery];
    nvinfer1::Dims const& mask = inputs[kMask];
    refusal = whyNot("query", query, {kAny, kAny, kAny, kAny});
    if (!refusal.empty())
    {
        return problem;
    }
    problem.batch = static_cast<int32_t>(query.d[0]);
    problem.heads = static_cast<int32_t>(query.d[1]);
    problem.queries = static_cast<int32_t>(query.d[2]);
    problem.width = static_cast<int32_t>(query.d[3]);
    problem.maskByRow = mask.nbDims == 4 && mask.d[0] != 1;
    refusal = whyNot("mask", mask, {problem.maskByRow ? query.d[0] : 1, 1, query.d[2], kAny});
    if (!refusal.empty())
    {
        return problem;
    }
    problem.slots = static_cast<int32_t>(mask.d[3]);
    auto const at = [&](int32_t place) { return place < 0 ? nullptr : &inputs[place]; };
    refusal = whySideNot(
        "keys", op.keys, inputs[kKeys], at(op.keySteps()), problem.batch, problem.slots, problem.keys);
    if (refusal.empty())
    {
        refusal = whySideNot("values", op.values, inputs[op.valuesAt()], at(op.valueSteps()), problem.batch,
            problem.slots, problem.values);
    }
    if (refusal.empty() && op.rebuilt)
    {
        refusal = whyTablesNot(op, inputs, problem);
    }
    if (refusal.empty() && whyRefused(problem) != nullptr)
    {
        refusal = whyRefused(problem);
    }
    return problem;
}

} // namespace skipcat::latent
