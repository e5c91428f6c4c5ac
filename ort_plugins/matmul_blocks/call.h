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

inline Status* readShape(
    Api const& api, Value const* input, std::array<int64_t, 8>* sizes, size_t* dimensions)
{
    ShapeInfo* shape = nullptr;
    if (Status* const status = api.shape(input, &shape))
    {
        return status;
    }
    Status* status = api.dimensions(shape, dimensions);
    if (status == nullptr && (*dimensions == 0 || *dimensions > sizes->size()))
    {
        status = api.fail("skipcat: x has one to eight dimensions");
    }
    status = status != nullptr ? status : api.sizes(shape, sizes->data(), *dimensions);
    api.release(shape);
    return status;
}

// x [..., columns] is input 0, y [..., outputs] output 0.
inline Status* openCall(Api const& api, KernelContext* context, int64_t columns, int64_t outputs, Call* call)
{
    Value const* input = nullptr;
    std::array<int64_t, 8> sizes{};
    size_t dimensions = 0;
    Status* status = api.input(context, 0, &input);
    status = status != nullptr ? status : readShape(api, input, &sizes, &dimensions);
    if (status != nullptr)
    {
        return status;
    }
    int64_t& last = sizes[dimensions - 1];
    if (last != columns)
    {
        return api.fail("skipcat: the last dimension of x is not the one of the node's matrix");
    }
    last = outputs;
    call->rows = 1;
    for (size_t i = 0; i + 1 < dimensions; ++i)
    {
        call->rows *= sizes[i];
    }
    Value* output = nullptr;
    void* x = nullptr;
    void* y = nullptr;
    status = api.output(context, 0, sizes.data(), dimensions, &output);
    status = status != nullptr ? status : api.data(input, &x);
    status = status != nullptr ? status : api.data(output, &y);
    call->x = static_cast<float const*>(x);
    call->y = static_cast<float*>(y);
    return status;
}

// ids [...] are input 0, y [..., columns] output 0.
inline Status* openLookUp(Api const& api, KernelContext* context, int64_t columns, int64_t* rows, float** y)
{
    Value const* input = nullptr;
    std::array<int64_t, 8> sizes{};
    size_t dimensions = 0;
    Status* status = api.input(context, 0, &input);
    status = status != nullptr ? status : readShape(api, input, &sizes, &dimensions);
    if (status != nullptr)
    {
        return status;
    }
    if (dimensions == sizes.size())
    {
        return api.fail("skipcat: ids have at most seven dimensions");
    }
    *rows = 1;
    for (size_t i = 0; i < dimensions; ++i)
    {
        *rows *= sizes[i];
    }
    sizes[dimensions] = columns;
    Value* output = nullptr;
    void* data = nullptr;
    status = api.output(context, 0, sizes.data(), dimensions + 1, &output);
    status = status != nullptr ? status : api.data(output, &data);
    *y = static_cast<float*>(data);
    return status;
}

} // namespace skipcat

#endif
