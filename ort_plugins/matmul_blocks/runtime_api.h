// What a library of operators needs of ONNX Runtime's C interface, which its wheel brings no headers for.
//
// The interface is a table of functions to which versions add at the end, so that a function's place in
// it never changes; the places are those of the documented onnxruntime_c_api.h. OrtCustomOp likewise: a
// runtime reads no more of it than the version that it holds.

#ifndef SKIPCAT_ORT_RUNTIME_API_H
#define SKIPCAT_ORT_RUNTIME_API_H

#include <cstddef>
#include <cstdint>

namespace skipcat
{

struct Status;        // OrtStatus; null is success
struct SessionOptions;
struct KernelInfo;
struct KernelContext;
struct Value;         // OrtValue
struct ShapeInfo;     // OrtTensorTypeAndShapeInfo
struct Domain;        // OrtCustomOpDomain
struct ShapeContext;

constexpr uint32_t kApiVersion = 18; // the first with all that is called here

struct ApiBase
{
    void const* (*getApi)(uint32_t version);
    char const* (*getVersionString)();
};

// Types of the elements of tensors, and that an input or output must be there.
constexpr int kFloat32 = 1;
constexpr int kUint8 = 2;
constexpr int kInt32 = 6;
constexpr int kInt64 = 7;
constexpr int kRequired = 0;

// OrtCustomOp; what is null takes the default.
struct CustomOp
{
    uint32_t version{kApiVersion};
    void* (*createKernel)(CustomOp const*, void const*, KernelInfo const*){};
    char const* (*getName)(CustomOp const*){};
    char const* (*getProvider)(CustomOp const*){};
    int (*getInputType)(CustomOp const*, size_t){};
    size_t (*getInputCount)(CustomOp const*){};
    int (*getOutputType)(CustomOp const*, size_t){};
    size_t (*getOutputCount)(CustomOp const*){};
    void (*compute)(void*, KernelContext*){};
    void (*destroy)(void*){};
    int (*getInputCharacteristic)(CustomOp const*, size_t){};
    int (*getOutputCharacteristic)(CustomOp const*, size_t){};
    int (*getInputMemory)(CustomOp const*, size_t){};
    int (*getVariadicInputMinimum)(CustomOp const*){};
    int (*getVariadicInputAlike)(CustomOp const*){};
    int (*getVariadicOutputMinimum)(CustomOp const*){};
    int (*getVariadicOutputAlike)(CustomOp const*){};
    Status* (*createKernelV2)(CustomOp const*, void const*, KernelInfo const*, void**){};
    Status* (*computeV2)(void*, KernelContext*){};
    Status* (*inferShape)(CustomOp const*, ShapeContext*){};
    int (*getStartVersion)(CustomOp const*){};
    int (*getEndVersion)(CustomOp const*){};
    size_t (*getMayInplace)(int**, int**){};
    void (*releaseMayInplace)(int*, int*){};
    size_t (*getAliasMap)(int**, int**){};
    void (*releaseAliasMap)(int*, int*){};
};

static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "OrtCustomOp of version 18 has 26 words");

// Functions of OrtApi by their place in it.
class Api
{
public:
    explicit Api(void const* table)
        : mTable{static_cast<void const* const*>(table)}
    {
    }

    Status* fail(char const* message) const
    {
        constexpr int kInvalidArgument = 2;
        return at<Status* (*)(int, char const*)>(0)(kInvalidArgument, message);
    }

    Status* createDomain(char const* name, Domain** domain) const
    {
        return at<Status* (*)(char const*, Domain**)>(26)(name, domain);
    }

    Status* addOp(Domain* domain, CustomOp const* op) const
    {
        return at<Status* (*)(Domain*, CustomOp const*)>(27)(domain, op);
    }

    Status* addDomain(SessionOptions* options, Domain* domain) const
    {
        return at<Status* (*)(SessionOptions*, Domain*)>(28)(options, domain);
    }

    Status* attribute(KernelInfo const* info, char const* name, int64_t* value) const
    {
        return at<Status* (*)(KernelInfo const*, char const*, int64_t*)>(86)(info, name, value);
    }

    Status* input(KernelContext const* context, size_t index, Value const** value) const
    {
        return at<Status* (*)(KernelContext const*, size_t, Value const**)>(90)(context, index, value);
    }

    Status* output(
        KernelContext* context, size_t index, int64_t const* sizes, size_t dimensions, Value** value) const
    {
        return at<Status* (*)(KernelContext*, size_t, int64_t const*, size_t, Value**)>(91)(
            context, index, sizes, dimensions, value);
    }

    Status* data(Value const* value, void** data) const
    {
        return at<Status* (*)(Value const*, void**)>(51)(value, data);
    }

    Status* shape(Value const* value, ShapeInfo** shape) const
    {
        return at<Status* (*)(Value const*, ShapeInfo**)>(65)(value, shape);
    }

    Status* dimensions(ShapeInfo const* shape, size_t* count) const
    {
        return at<Status* (*)(ShapeInfo const*, size_t*)>(61)(shape, count);
    }

    Status* sizes(ShapeInfo const* shape, int64_t* sizes, size_t count) const
    {
        return at<Status* (*)(ShapeInfo const*, int64_t*, size_t)>(62)(shape, sizes, count);
    }

    Status* elements(ShapeInfo const* shape, size_t* count) const
    {
        return at<Status* (*)(ShapeInfo const*, size_t*)>(64)(shape, count);
    }

    void release(ShapeInfo* shape) const
    {
        at<void (*)(ShapeInfo*)>(99)(shape);
    }

    Status* constant(KernelInfo const* info, size_t index, int* isConstant, Value const** value) const
    {
        return at<Status* (*)(KernelInfo const*, size_t, int*, Value const**)>(249)(
            info, index, isConstant, value);
    }

    // task(user, i) for i from 0 to count - 1, by the threads of the session.
    Status* parallelFor(KernelContext const* context, void (*task)(void*, size_t), size_t count, void* user) const
    {
        return at<Status* (*)(KernelContext const*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
            context, task, count, 0, user);
    }

private:
    template <typename Function>
    Function at(size_t place) const
    {
        return reinterpret_cast<Function>(const_cast<void*>(mTable[place]));
    }

    void const* const* mTable;
};

} // namespace skipcat

#endif
