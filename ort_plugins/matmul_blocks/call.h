// What every operator of this library does: read x, make y.

#ifndef SKIPCAT_ORT_CALL_H
#define SKIPCAT_ORT_CALL_H

#include "runtime_api.h"

#include <array>

namespace skipcat
{

// One call of a node. Without rows there is nothing to compute.
struct Call
{
    float const* x;
    float* y;
    int64_t rows;
};

constexpr size_t kMostDimensions = 8;
using Sizes = std::array<int64_t, kMostDimensions>;

// Input 0 and its shape.
inline Status* readInput(
    Api const& api, KernelContext const* context, Value const** input, Sizes* sizes, size_t* dimensions)
{
    ShapeInfo* shape = nullptr;
    Status* status = api.input(context, 0, input);
    status = status != nullptr ? status : api.shape(*input, &shape);
    if (status != nullptr)
    {
        return status;
    }
    status = api.dimensions(shape, dimensions);
    if (status == nullptr && (*dimensions == 0 || *dimensions >= kMostDimensions))
    {
        status = api.fail("skipcat: the first input has one to seven dimensions");
    }
    status = status != nullptr ? status : api.sizes(shape, sizes->data(), *dimensions);
    api.release(shape);
    return status;
}

// Output 0 of a shape, and how many rows it has.
inline Status* makeOutput(
    Api const& api, KernelContext* context, Sizes const& sizes, size_t dimensions, int64_t* rows, float** y)
{
    *rows = 1;
    for (size_t i = 0; i + 1 < dimensions; ++i)
    {
        *rows *= sizes[i];
    }
    Value* output = nullptr;
    void* data = nullptr;
    Status* status = api.output(context, 0, sizes.data(), dimensions, &output);
    status = status != nullptr ? status : api.data(output, &data);
    *y = static_cast<float*>(data);
    return status;
}

// x [..., columns] is input 0, y [..., outputs] output 0.
inline Status* openCall(Api const& api, KernelContext* context, int64_t columns, int64_t outputs, Call* call)
{
    Value const* input = nullptr;
    Sizes sizes{};
    size_t dimensions = 0;
    if (Status* const status = readInput(api, context, &input, &sizes, &dimensions))
    {
        return status;
    }
    int64_t& last = sizes[dimensions - 1];
    if (last != columns)
    {
        return api.fail("skipcat: the last dimension of x is not the one of the node's matrix");
    }
    last = outputs;
    void* x = nullptr;
    Status* status = api.data(input, &x);
    status = status != nullptr ? status : makeOutput(api, context, sizes, dimensions, &call->rows, &call->y);
    call->x = static_cast<float const*>(x);
    return status;
}

// ids [...] are input 0, y [..., columns] output 0.
inline Status* openLookUp(Api const& api, KernelContext* context, int64_t columns, int64_t* rows, float** y)
{
    Value const* input = nullptr;
    Sizes sizes{};
    size_t dimensions = 0;
    if (Status* const status = readInput(api, context, &input, &sizes, &dimensions))
    {
        return status;
    }
    sizes[dimensions] = columns;
    return makeOutput(api, context, sizes, dimensions + 1, rows, y);
}

} // namespace skipcat

#endif
