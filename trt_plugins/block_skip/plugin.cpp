#include "plugin.h"

#include <new>

#include "log.h"
#include "shapes.h"

namespace skipcat
{
namespace
{

constexpr int32_t kFailure = -1;
constexpr size_t kAlignment = 256;

size_t aligned(size_t bytes)
{
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The current device; zeros when there is none, as while an engine is inspected on a machine without GPU.
Device currentDevice()
{
    int ordinal = 0;
    int major = 0;
    int minor = 0;
    Device device;
    bool const known = cudaGetDevice(&ordinal) == cudaSuccess
        && cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal) == cudaSuccess
        && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) == cudaSuccess
        && cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) == cudaSuccess;
    device.capability = 10 * major + minor;
    return known ? device : Device{};
}

std::array<nvinfer1::Dims, 6> dimsOf(nvinfer1::PluginTensorDesc const* tensors, int32_t count)
{
    std::array<nvinfer1::Dims, 6> dims{};
    for (int32_t i = 0; i < count; ++i)
    {
        dims[static_cast<size_t>(i)] = tensors[i].dims;
    }
    return dims;
}

std::array<nvinfer1::Dims, 6> largestOf(nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t count)
{
    std::array<nvinfer1::Dims, 6> dims{};
    for (int32_t i = 0; i < count; ++i)
    {
        dims[static_cast<size_t>(i)] = tensors[i].max;
    }
    return dims;
}

} // namespace

BlockSkipPlugin::BlockSkipPlugin(Op const& op, Blocks blocks)
    : mOp(op)
    , mBlocks(blocks)
    // What a timing depends on beside types and shapes, which TensorRT adds.
    , mTimingCacheId(op.name + " blocks " + std::to_string(blocks.a) + " " + std::to_string(blocks.b))
    , mFields(fieldsOf(mOp, mBlocks))
{
    mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
}

BlockSkipPlugin::~BlockSkipPlugin()
{
    if (mCounters != nullptr)
    {
        cudaFree(mCounters);
    }
}

nvinfer1::IPluginCapability* BlockSkipPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* BlockSkipPlugin::clone() noexcept
{
    auto* const copy = new (std::nothrow) BlockSkipPlugin(mOp, mBlocks);
    if (copy != nullptr)
    {
        copy->mTactic = mTactic;
    }
    return copy;
}

char const* BlockSkipPlugin::getPluginName() const noexcept
{
    return mOp.name.c_str();
}

char const* BlockSkipPlugin::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* BlockSkipPlugin::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t BlockSkipPlugin::getNbOutputs() const noexcept
{
    return 1;
}

int32_t BlockSkipPlugin::getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
    nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (nbOutputs != 1 || nbInputs != mOp.inputs())
    {
        logError(mOp.name.c_str(),
            std::to_string(nbInputs) + " inputs and " + std::to_string(nbOutputs) + " outputs, expected "
                + std::to_string(mOp.inputs()) + " and 1");
        return kFailure;
    }
    outputTypes[0] = inputTypes[0];
    return 0;
}

int32_t BlockSkipPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& /*exprBuilder*/) noexcept
{
    if (nbOutputs != 1 || nbInputs != mOp.inputs() || inputs[0].nbDims < 1)
    {
        logError(mOp.name.c_str(), "x must have at least one dimension");
        return kFailure;
    }
    // Two codes of 4 bits share a byte, so that the scales know an odd width and the codes do not.
    nvinfer1::DimsExprs const& wide = inputs[mOp.bBits > 0 ? mOp.bScale() : mOp.b()];
    if (wide.nbDims != 2)
    {
        logError(mOp.name.c_str(), "b must have two dimensions, not " + std::to_string(wide.nbDims));
        return kFailure;
    }
    outputs[0] = inputs[0];
    outputs[0].d[inputs[0].nbDims - 1] = wide.d[1];
    return 0;
}

bool BlockSkipPlugin::supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* descriptors,
    int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != mOp.inputs() || nbOutputs != 1 || pos < 0 || pos > nbInputs)
    {
        return false;
    }
    nvinfer1::PluginTensorDesc const& tensor = descriptors[pos].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR)
    {
        return false;
    }
    if (pos == 0)
    {
        return tensor.type == nvinfer1::DataType::kHALF || tensor.type == nvinfer1::DataType::kBF16;
    }
    if (pos == mOp.index())
    {
        return tensor.type == nvinfer1::DataType::kINT32;
    }
    if (mOp.isCode(pos))
    {
        return tensor.type == nvinfer1::DataType::kINT8;
    }
    return tensor.type == descriptors[0].desc.type;
}

int32_t BlockSkipPlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept
{
    if (nbInputs != mOp.inputs())
    {
        logError(mOp.name.c_str(), std::to_string(nbInputs) + " inputs, expected " + std::to_string(mOp.inputs()));
        return kFailure;
    }
    std::string refusal;
    problemOf(mOp, mBlocks, in[0].desc.type, largestOf(in, nbInputs).data(), refusal);
    if (!refusal.empty())
    {
        logError(mOp.name.c_str(), refusal);
        return kFailure;
    }
    return 0;
}

size_t BlockSkipPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /*outputs*/, int32_t /*nbOutputs*/) const noexcept
{
    std::string refusal;
    Problem const largest = problemOf(mOp, mBlocks, inputs[0].desc.type, largestOf(inputs, nbInputs).data(), refusal);
    return refusal.empty() ? aligned(counterBytes(largest)) + workspaceBytes(largest, currentDevice()) : 0;
}

int32_t BlockSkipPlugin::getNbTactics() noexcept
{
    return kTactics;
}

int32_t BlockSkipPlugin::getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept
{
    for (int32_t i = 0; i < nbTactics; ++i)
    {
        tactics[i] = i + 1; // 0 would be TensorRT's own default
    }
    return 0;
}

char const* BlockSkipPlugin::getTimingCacheID() noexcept
{
    return mTimingCacheId.c_str();
}

char const* BlockSkipPlugin::getMetadataString() noexcept
{
    return mTimingCacheId.c_str();
}

int32_t BlockSkipPlugin::setTactic(int32_t tactic) noexcept
{
    if (tactic < 0 || tactic > kTactics)
    {
        logError(mOp.name.c_str(), "tactic " + std::to_string(tactic) + ", expected 0 to " + std::to_string(kTactics));
        return kFailure;
    }
    mTactic = tactic == 0 ? 0 : tactic - 1;
    return 0;
}

int32_t BlockSkipPlugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::PluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept
{
    if (nbInputs != mOp.inputs())
    {
        logError(mOp.name.c_str(), std::to_string(nbInputs) + " inputs, expected " + std::to_string(mOp.inputs()));
        return kFailure;
    }
    std::string refusal;
    Problem const problem = problemOf(mOp, mBlocks, in[0].type, dimsOf(in, nbInputs).data(), refusal);
    if (!refusal.empty())
    {
        logError(mOp.name.c_str(), refusal);
        return kFailure;
    }
    mDevice = currentDevice();
    if (mAttached)
    {
        makeCounters(counterBytes(problem));
    }
    return 0;
}

// Not in enqueue, which must not allocate. Without a device there is nothing to count.
void BlockSkipPlugin::makeCounters(size_t bytes) noexcept
{
    if (bytes <= mCounterBytes || mDevice.multiprocessors == 0)
    {
        return;
    }
    void* fresh = nullptr;
    if (cudaMalloc(&fresh, bytes) != cudaSuccess)
    {
        return; // enqueue then clears counters in its workspace
    }
    if (cudaMemset(fresh, 0, bytes) != cudaSuccess)
    {
        cudaFree(fresh);
        return;
    }
    cudaFree(mCounters);
    mCounters = static_cast<uint32_t*>(fresh);
    mCounterBytes = bytes;
}

int32_t BlockSkipPlugin::enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
    nvinfer1::PluginTensorDesc const* /*outputDesc*/, void const* const* inputs, void* const* outputs, void* workspace,
    cudaStream_t stream) noexcept
{
    std::string refusal;
    Problem problem = problemOf(mOp, mBlocks, inputDesc[0].type, dimsOf(inputDesc, mOp.inputs()).data(), refusal);
    if (!refusal.empty())
    {
        logError(mOp.name.c_str(), refusal);
        return kFailure;
    }
    problem.tactic = mTactic;
    Device const device = mDevice.multiprocessors > 0 ? mDevice : currentDevice();
    size_t const bytes = counterBytes(problem);
    auto* const scratch = static_cast<unsigned char*>(workspace);
    uint32_t* counters = mCounters;
    // A builder times plugins that belong to no context.
    if (mCounterBytes < bytes)
    {
        counters = reinterpret_cast<uint32_t*>(scratch);
        if (cudaMemsetAsync(counters, 0, bytes, stream) != cudaSuccess)
        {
            logError(mOp.name.c_str(), "the counters cannot be cleared");
            return kFailure;
        }
    }
    auto const at = [&](int32_t place) { return place < 0 ? nullptr : inputs[place]; };
    Pointers const pointers{inputs[0], static_cast<int32_t const*>(at(mOp.index())), at(mOp.a()), at(mOp.aScale()),
        at(mOp.b()), at(mOp.bScale()), outputs[0]};
    cudaError_t const status
        = blockSkipLinear(problem, pointers, device, scratch + aligned(bytes), counters, stream);
    if (status != cudaSuccess)
    {
        logError(mOp.name.c_str(), std::string("the kernel cannot be launched: ") + cudaGetErrorString(status));
        return kFailure;
    }
    return 0;
}

nvinfer1::IPluginV3* BlockSkipPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    auto* const copy = static_cast<BlockSkipPlugin*>(clone());
    if (copy != nullptr)
    {
        copy->mAttached = true;
    }
    return copy;
}

nvinfer1::PluginFieldCollection const* BlockSkipPlugin::getFieldsToSerialize() noexcept
{
    return &mFieldCollection;
}

} // namespace skipcat
