// The ops of latent attention in the harness: the interface without a device, and the numbers on one.

#include "harness/harness.h"

#include <cstring>
#include <memory>

#include <cuda_runtime_api.h>

#include "latent_plugin.h"
#include "random_call.h"

namespace harness
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;
using skipcat::latent::Call;
using skipcat::latent::Form;
using skipcat::latent::LatentOp;
using skipcat::latent::Problem;
using skipcat::latent::RandomSide;

// A dimension that is known, and a builder of such.
struct Known : nvinfer1::IDimensionExpr, nvinfer1::apiv::VDimensionExpr
{
    explicit Known(int64_t of)
        : value(of)
    {
        mImpl = this;
    }

    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }

    int64_t value;
};

struct Builder : nvinfer1::IExprBuilder, nvinfer1::apiv::VExprBuilder
{
    Builder()
    {
        mImpl = this;
    }

    nvinfer1::IDimensionExpr const* constant(int64_t value) override
    {
        made.push_back(std::make_unique<Known>(value));
        return made.back().get();
    }

    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&,
        nvinfer1::IDimensionExpr const&) override
    {
        return nullptr;
    }

    nvinfer1::IDimensionExpr const* declareSizeTensor(
        int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return nullptr;
    }

    std::vector<std::unique_ptr<Known>> made;
};

// The tensors of a call: inputs in order, then the output.
std::vector<PluginTensorDesc> describeCall(LatentOp const& op, Problem const& p)
{
    std::vector<PluginTensorDesc> tensors{tensor({p.batch, p.heads, p.queries, p.width}, DataType::kHALF),
        tensor({p.maskByRow ? p.batch : 1, 1, p.queries, p.slots}, DataType::kHALF)};
    for (skipcat::latent::Side const& side : {p.keys, p.values})
    {
        bool const numbers = side.form == Form::kNumbers;
        tensors.push_back(tensor({p.batch, side.groups, p.slots, side.held}, numbers ? DataType::kHALF : DataType::kINT8));
        if (!numbers)
        {
            tensors.push_back(tensor({p.batch, side.groups, p.slots, 2}, DataType::kHALF));
        }
    }
    if (op.rebuilt)
    {
        tensors.push_back(tensor({p.keys.groups, p.headsPerGroup, p.keys.rank(), p.width}, DataType::kHALF));
        tensors.push_back(tensor({p.keys.groups, p.headsPerGroup, 1, p.width}, DataType::kHALF));
        tensors.push_back(tensor({p.slots, p.width / 2}, DataType::kFLOAT));
        tensors.push_back(tensor({p.slots, p.width / 2}, DataType::kFLOAT));
    }
    tensors.push_back(tensor({p.batch, p.heads, p.queries, p.values.rank()}, DataType::kHALF));
    return tensors;
}

Problem example(LatentOp const& op)
{
    Problem p;
    p.batch = 2;
    p.heads = 6;
    p.queries = 3;
    p.slots = 40;
    p.maskByRow = true;
    p.keys = {1, 24, op.keys};
    p.values = {3, 10, op.values};
    p.headsPerGroup = op.rebuilt ? 3 : 0;
    p.width = op.rebuilt ? 64 : p.keys.rank();
    return p;
}

void checkShapes(nvinfer1::IPluginV3& plugin, LatentOp const& op, Problem const& p, Report& report)
{
    Builder builder;
    std::vector<nvinfer1::DimsExprs> inputs;
    for (auto const& one : describeCall(op, p))
    {
        nvinfer1::DimsExprs dims;
        dims.nbDims = one.dims.nbDims;
        for (int32_t i = 0; i < dims.nbDims; ++i)
        {
            dims.d[i] = builder.constant(one.dims.d[i]);
        }
        inputs.push_back(dims);
    }
    nvinfer1::DimsExprs output{};
    int32_t const status
        = buildOf(plugin)->getOutputShapes(inputs.data(), op.inputs(), nullptr, 0, &output, 1, builder);
    bool const good = status == 0 && output.nbDims == 4 && output.d[1] == inputs[0].d[1]
        && output.d[3]->getConstantValue() == p.values.rank();
    report.check(op.name() + " has output shape [B, H, S, rank of the values]", good);
}

// Every type in every place: only the one that the op has there passes.
void checkTypes(nvinfer1::IPluginV3& plugin, LatentOp const& op, Problem const& p, Report& report)
{
    auto const tensors = describeCall(op, p);
    bool good = true;
    for (int32_t place = 0; place <= op.inputs(); ++place)
    {
        for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kINT32})
        {
            auto tried = dynamic(tensors);
            tried[static_cast<size_t>(place)].desc.type = type;
            bool const expected = type == tensors[static_cast<size_t>(place)].type;
            good = good && buildOf(plugin)->supportsFormatCombination(place, tried.data(), op.inputs(), 1) == expected;
            tried[static_cast<size_t>(place)].desc.format = nvinfer1::TensorFormat::kCHW4;
            good = good && !buildOf(plugin)->supportsFormatCombination(place, tried.data(), op.inputs(), 1);
        }
    }
    report.check(op.name() + " takes its types, linear, and no others", good);
}

void checkMisfits(
    nvinfer1::IPluginV3& plugin, LatentOp const& op, Problem const& p, Logger& logger, Report& report)
{
    auto const good = describeCall(op, p);
    logger.last.clear();
    bool const fits = configure(plugin, good) == 0;
    report.check(op.name() + " takes shapes that fit", fits, logger.last);
    for (int32_t place = 0; place < op.inputs(); ++place)
    {
        auto wrong = good;
        // A longer table is one that fits.
        bool const isTable = op.rebuilt && place >= op.up() + 2;
        wrong[static_cast<size_t>(place)].dims.d[isTable ? 1 : 2] += 1000;
        logger.last.clear();
        bool const refused = configure(plugin, wrong) == -1 && logger.last.find("expected") != std::string::npos;
        report.check(op.name() + " refuses a misfit in input " + std::to_string(place), refused,
            refused ? "" : "logged '" + logger.last + "'");
    }
}

void checkCopies(nvinfer1::IPluginCreatorV3One& creator, nvinfer1::IPluginV3& plugin, LatentOp const& op,
    Problem const& p, Report& report)
{
    auto* const fields = runtimeOf(plugin)->getFieldsToSerialize();
    std::unique_ptr<nvinfer1::IPluginV3> const again(
        creator.createPlugin("layer", fields, nvinfer1::TensorRTPhase::kRUNTIME));
    std::unique_ptr<nvinfer1::IPluginV3> const copy(plugin.clone());
    std::unique_ptr<nvinfer1::IPluginV3> const attached(runtimeOf(plugin)->attachToContext(nullptr));
    bool good = true;
    for (auto* const other : {again.get(), copy.get(), attached.get()})
    {
        good = good && other != nullptr && configure(*other, describeCall(op, p)) == 0;
    }
    report.check(op.name() + " survives serialisation, clone and attaching to a context", good);
}

// Device memory of a call, and the tensors of the plugin in it.
class OnDevice
{
public:
    OnDevice(LatentOp const& op, Call const& call)
    {
        add(call.query.held.data, call.query.held.bytes);
        add(call.mask.data, call.mask.bytes);
        for (RandomSide const* side : {&call.keys, &call.values})
        {
            add(side->stored(), side->codes.bytes > 0 ? side->codes.bytes : side->numbers.held.bytes);
            if (side->steps.bytes > 0)
            {
                add(side->steps.data, side->steps.bytes);
            }
        }
        if (op.rebuilt)
        {
            add(call.tables.up.held.data, call.tables.up.held.bytes);
            add(call.tables.mean.held.data, call.tables.mean.held.bytes);
            add(call.tables.cos.data, call.tables.cos.bytes);
            add(call.tables.sin.data, call.tables.sin.bytes);
        }
        add(call.mixed.data, call.mixed.bytes); // NaN, so that what is not written shows
    }

    ~OnDevice()
    {
        for (void* const one : mMemory)
        {
            cudaFree(one);
        }
    }

    void add(void const* from, size_t bytes)
    {
        void* memory = nullptr;
        good = good && cudaMalloc(&memory, bytes) == cudaSuccess
            && (from == nullptr || cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess);
        mMemory.push_back(memory);
    }

    void const* const* inputs() const { return mMemory.data(); }
    void* last() const { return mMemory.back(); }

    bool good{true};

private:
    std::vector<void*> mMemory;
};

// Once as it is and once from a captured graph, which writes over the first answer's place.
double errorOnDevice(nvinfer1::IPluginV3& plugin, LatentOp const& op, Call& call, bool captured)
{
    auto const tensors = describeCall(op, call.p);
    auto const ranges = dynamic(tensors);
    OnDevice memory(op, call);
    void* const output = memory.last();
    memory.add(nullptr, buildOf(plugin)->getWorkspaceSize(ranges.data(), op.inputs(), &ranges.back(), 1));
    cudaStream_t stream = nullptr;
    bool good = memory.good && configure(plugin, tensors) == 0 && cudaStreamCreate(&stream) == cudaSuccess;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    if (captured)
    {
        good = good && cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    }
    void* outputs[] = {output};
    good = good
        && runtimeOf(plugin)->enqueue(
               tensors.data(), &tensors.back(), memory.inputs(), outputs, memory.last(), stream)
            == 0;
    if (captured)
    {
        good = good && cudaStreamEndCapture(stream, &graph) == cudaSuccess
            && cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess
            && cudaGraphLaunch(executable, stream) == cudaSuccess;
    }
    good = good && cudaStreamSynchronize(stream) == cudaSuccess
        && cudaMemcpy(call.mixed.data, output, call.mixed.bytes, cudaMemcpyDeviceToHost) == cudaSuccess;
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    return good ? call.relativeError() : INFINITY;
}

} // namespace

void checkLatentInterface(Creators const& creators, Logger& logger, Report& report)
{
    auto const ops = skipcat::latent::latentOps();
    report.check("there is a creator for every op of latent attention", creators.size() == ops.size());
    for (size_t i = 0; i < creators.size() && i < ops.size(); ++i)
    {
        LatentOp const& op = ops[i];
        nvinfer1::IPluginCreatorV3One& creator = *creators[i];
        report.check(op.name() + " is found by name, version and namespace",
            op.name() == creator.getPluginName() && std::strcmp(creator.getPluginVersion(), "1") == 0
                && std::strcmp(creator.getPluginNamespace(), "skipcat") == 0);
        int32_t const four = 4;
        nvinfer1::PluginField const wrong{"bits", &four, nvinfer1::PluginFieldType::kINT32, 1};
        nvinfer1::PluginFieldCollection const fields{1, &wrong};
        nvinfer1::PluginFieldCollection const none{0, nullptr};
        report.check(op.name() + " refuses a field",
            creator.createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
        std::unique_ptr<nvinfer1::IPluginV3> const plugin(
            creator.createPlugin("layer", &none, nvinfer1::TensorRTPhase::kBUILD));
        report.check(op.name() + " is made", plugin != nullptr);
        if (plugin == nullptr)
        {
            continue;
        }
        Problem const p = example(op);
        checkShapes(*plugin, op, p, report);
        checkTypes(*plugin, op, p, report);
        checkMisfits(*plugin, op, p, logger, report);
        checkCopies(creator, *plugin, op, p, report);
    }
}

void checkLatentEnqueue(Creators const& creators, Report& report, unsigned seed)
{
    std::mt19937 random(seed);
    auto const ops = skipcat::latent::latentOps();
    for (int i = 0; i < 120; ++i)
    {
        Problem const p = skipcat::latent::randomProblem(random, false);
        for (size_t k = 0; k < ops.size(); ++k)
        {
            LatentOp const& op = ops[k];
            if (op.rebuilt != (p.headsPerGroup > 0) || op.keys != p.keys.form || op.values != p.values.form)
            {
                continue;
            }
            nvinfer1::PluginFieldCollection const none{0, nullptr};
            std::unique_ptr<nvinfer1::IPluginV3> const plugin(
                creators[k]->createPlugin("layer", &none, nvinfer1::TensorRTPhase::kBUILD));
            Call call(p, random);
            double const eager = errorOnDevice(*plugin, op, call, false);
            double const captured = errorOnDevice(*plugin, op, call, true);
            char observed[80];
            std::snprintf(observed, sizeof(observed), "relative error %.2e, captured %.2e", eager, captured);
            report.check(op.name() + " batch " + std::to_string(p.batch) + " heads " + std::to_string(p.heads)
                    + " slots " + std::to_string(p.slots),
                eager <= 1e-3 && captured <= 1e-3, observed);
        }
    }
}

} // namespace harness
