// The operators, as ONNX Runtime finds and calls them.

#include "block_skip_node.h"
#include "look_up_node.h"
#include "matmul_node.h"

#include <deque>
#include <mutex>
#include <new>
#include <string>

namespace skipcat
{
namespace
{

constexpr Zero kZeroes[] = {Zero::kMiddle, Zero::kZeros, Zero::kRests};

char const* nameOf(Zero zero)
{
    return zero == Zero::kMiddle ? "" : zero == Zero::kZeros ? "Zeros" : "Rests";
}

// One name of an operator, and the types of its inputs.
struct Operator : CustomOp
{
    std::string name;
    std::vector<int> inputs;
    Zero first;   // of the matrix, or of A
    Zero second;  // of B
    bool another; // input: a bias, or an index

    void take(Zero zero)
    {
        inputs.insert(inputs.end(), {kUint8, kFloat32});
        if (zero == Zero::kZeros)
        {
            inputs.push_back(kUint8);
        }
        if (zero == Zero::kRests)
        {
            inputs.insert(inputs.end(), {kFloat32, kFloat32});
        }
    }
};

Operator const& of(CustomOp const* op)
{
    return *static_cast<Operator const*>(op);
}

// The table of a runtime's functions, for as long as the process lives.
Api const& apiOf(void const* table)
{
    static Api const api{table};
    return api;
}

Status* makeNode(Api const& api, KernelInfo const* info, Operator const& op, MatMulNode* node)
{
    return MatMulNode::make(api, info, op.first, op.another, node);
}

Status* makeNode(Api const& api, KernelInfo const* info, Operator const& op, BlockSkipNode* node)
{
    return BlockSkipNode::make(api, info, op.first, op.second, op.another, node);
}

Status* makeNode(Api const& api, KernelInfo const* info, Operator const& op, LookUpNode* node)
{
    return LookUpNode::make(api, info, op.first, node);
}

template <typename Node>
Status* create(CustomOp const* op, void const* table, KernelInfo const* info, void** made)
{
    Api const& api = apiOf(table);
    try
    {
        auto node = std::make_unique<Node>();
        Status* const status = makeNode(api, info, of(op), node.get());
        if (status == nullptr)
        {
            *made = node.release();
        }
        return status;
    }
    catch (std::bad_alloc const&)
    {
        return api.fail("skipcat: no memory for a matrix");
    }
}

template <typename Node>
Status* compute(void* made, KernelContext* context)
{
    Node const& node = *static_cast<Node*>(made);
    try
    {
        return node.compute(context);
    }
    catch (std::bad_alloc const&)
    {
        return node.api().fail("skipcat: no memory for the rows of x");
    }
}

template <typename Node>
Operator makeOperator(std::string name, Zero first, Zero second, bool another)
{
    Operator op{};
    op.name = std::move(name);
    op.inputs = {kFloat32};
    op.first = first;
    op.second = second;
    op.another = another;
    op.getName = [](CustomOp const* self) { return of(self).name.c_str(); };
    op.getProvider = [](CustomOp const*) -> char const* { return nullptr; };
    op.getInputCount = [](CustomOp const* self) { return of(self).inputs.size(); };
    op.getInputType = [](CustomOp const* self, size_t index) { return of(self).inputs[index]; };
    op.getOutputCount = [](CustomOp const*) -> size_t { return 1; };
    op.getOutputType = [](CustomOp const*, size_t) { return kFloat32; };
    op.getInputCharacteristic = [](CustomOp const*, size_t) { return kRequired; };
    op.getOutputCharacteristic = [](CustomOp const*, size_t) { return kRequired; };
    op.getInputMemory = [](CustomOp const*, size_t) { return 0; };
    op.createKernelV2 = create<Node>;
    op.computeV2 = compute<Node>;
    op.destroy = [](void* made) { delete static_cast<Node*>(made); };
    op.getStartVersion = [](CustomOp const*) { return 1; };
    op.getEndVersion = [](CustomOp const*) { return 1; };
    return op;
}

// All names: of every way that matrices are held.
std::deque<Operator> makeOperators()
{
    std::deque<Operator> all;
    for (Zero const zero : kZeroes)
    {
        for (bool const bias : {false, true})
        {
            std::string const name = std::string{"MatMulBlocks"} + nameOf(zero) + (bias ? "Bias" : "");
            Operator op = makeOperator<MatMulNode>(name, zero, zero, bias);
            op.take(zero);
            if (bias)
            {
                op.inputs.push_back(kFloat32);
            }
            all.push_back(std::move(op));
        }
    }
    for (Zero const a : kZeroes)
    {
        for (Zero const b : kZeroes)
        {
            for (bool const indexed : {false, true})
            {
                std::string const name = std::string{"BlockSkipBlocksA"} + nameOf(a) + "B" + nameOf(b)
                    + (indexed ? "Indexed" : "");
                Operator op = makeOperator<BlockSkipNode>(name, a, b, indexed);
                if (indexed)
                {
                    op.inputs.push_back(kInt32);
                }
                op.take(a);
                op.take(b);
                all.push_back(std::move(op));
            }
        }
    }
    for (Zero const zero : {Zero::kMiddle, Zero::kZeros})
    {
        Operator op = makeOperator<LookUpNode>(std::string{"LookUpBlocks"} + nameOf(zero), zero, zero, false);
        op.inputs = {kInt64};
        op.take(zero);
        all.push_back(std::move(op));
    }
    return all;
}

// The domain, made once: sessions keep its address.
Status* findDomain(Api const& api, Domain** domain)
{
    static std::mutex lock;
    static Domain* made = nullptr;
    static std::deque<Operator> const operators = makeOperators();
    std::lock_guard<std::mutex> const guard{lock};
    if (made == nullptr)
    {
        Domain* fresh = nullptr;
        Status* status = api.createDomain("skipcat", &fresh);
        for (auto op = operators.begin(); status == nullptr && op != operators.end(); ++op)
        {
            status = api.addOp(fresh, &*op);
        }
        if (status != nullptr)
        {
            return status;
        }
        made = fresh;
    }
    *domain = made;
    return nullptr;
}

} // namespace
} // namespace skipcat

extern "C"
{

// What ONNX Runtime looks for in a library of operators.
__attribute__((visibility("default"))) skipcat::Status* RegisterCustomOps(
    skipcat::SessionOptions* options, skipcat::ApiBase const* base)
{
    void const* const table = base->getApi(skipcat::kApiVersion);
    if (table == nullptr)
    {
        return nullptr; // an ONNX Runtime before 1.18, which runs the bodies
    }
    skipcat::Api const& api = skipcat::apiOf(table);
    if (skipcat::instructions() == nullptr)
    {
        return api.fail("skipcat: no kernels for this CPU");
    }
    skipcat::Domain* domain = nullptr;
    skipcat::Status* const status = skipcat::findDomain(api, &domain);
    return status != nullptr ? status : api.addDomain(options, domain);
}

} // extern "C"
