#include "latent_plugin.h"

#include <array>
#include <new>

#include "fields.h"
#include "log.h"
#include "plugin.h"

namespace skipcat::latent
{
namespace
{

constexpr int32_t kFailure = -1;

// Of the current device; 0 when there is none, as while an engine is inspected on a machine without GPU.
int32_t multiprocessors()
{
    int ordinal = 0;
    int32_t count = 0;
    bool const known = cudaGetDevice(&ordinal) == cudaSuccess
        && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ordinal) == cudaSuccess;
    return known ? count : 0;
}

using AllDims = std::array<nvinfer1::Dims, kMostInputs>;

AllDims dimsOf(nvinfer1::PluginTensorDesc const* tensors, int32_t count)
{
    AllDims dims{};
    for (int32_t i = 0; i < count; ++i)
    {
        dims[static_cast<size_t>(i)] = tensors[i].dims;
    }
    return dims;
}

AllDims largestOf(nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t count)
{
    AllDims dims{};
    for (int32_t i = 0; i < count; ++i)
    {
        dims[static_cast<size_t>(i)] = tensors[i].max;
    }
    return dims;
}

} // namespace

LatentAttentionPlugin::LatentAttentionPlugin(LatentOp const& op)
    : mOp(op)
    , mName(op.name())
{
}

nvinfer1::IPluginCapability* LatentAttentionPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* LatentAttentionPlugin::clone() noexcept
{
    return new (std::nothrow) LatentAttentionPlugin(mOp);
}

char const* LatentAttentionPlugin::getPluginName() const noexcept
{
    return mName.c_str();
}

char const* LatentAttentionPlugin::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* LatentAttentionPlugin::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t LatentAttentionPlugin::getNbOutputs() const noexcept
{
    return 1;
}

bool LatentAttentionPlugin::hasInputs(int32_t count) const noexcept
{
    if (count != mOp.inputs())
    {
        logError(
            mName.c_str(), std::to_string(count) + " inputs, expected " + std::to_string(mOp.inputs()));
    }
    return count == mOp.inputs();
}

int32_t LatentAttentionPlugin::getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
    nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (nbOutputs != 1 || !hasInputs(nbInputs))
    {
        return kFailure;
    }
    outputTypes[0] = inputTypes[kQuery];
    return 0;
}

int32_t LatentAttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept
{
    if (nbOutputs != 1 || !hasInputs(nbInputs))
    {
        return kFailure;
    }
    nvinfer1::DimsExprs const& values = inputs[mOp.valuesAt()];
    if (inputs[kQuery].nbDims != 4 || values.nbDims != 4 || !values.d[3]->isConstant())
    {
        logError(mName.c_str(), "query and values must have four dimensions, and the last a fixed size");
        return kFailure;
    }
    outputs[0] = inputs[kQuery];
    bool const pairs = mOp.values == Form::kNibbles;
    outputs[0].d[3] = pairs ? exprBuilder.constant(2 * values.d[3]->getConstantValue()) : values.d[3];
    return 0;
}

bool LatentAttentionPlugin::supportsFormatCombination(int32_t pos,
    nvinfer1::DynamicPluginTensorDesc const* descriptors, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != mOp.inputs() || nbOutputs != 1 || pos < 0 || pos > nbInputs)
    {
        return false;
    }
    nvinfer1::PluginTensorDesc const& tensor = descriptors[pos].desc;
    bool const isCodes = (pos == kKeys && mOp.keySteps() >= 0) || (pos == mOp.valuesAt() && mOp.valueSteps() >= 0);
    bool const isTable = mOp.rebuilt && (pos == mOp.up() + 2 || pos == mOp.up() + 3);
    nvinfer1::DataType const expected = isCodes ? nvinfer1::DataType::kINT8
        : isTable                               ? nvinfer1::DataType::kFLOAT
                                                : nvinfer1::DataType::kHALF;
    return tensor.format == nvinfer1::TensorFormat::kLINEAR && tensor.type == expected;
}

int32_t LatentAttentionPlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept
{
    if (!hasInputs(nbInputs))
    {
        return kFailure;
    }
    std::string refusal;
    problemOf(mOp, largestOf(in, nbInputs).data(), refusal);
    if (!refusal.empty())
    {
        logError(mName.c_str(), refusal);
        return kFailure;
    }
    return 0;
}

size_t LatentAttentionPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /*outputs*/, int32_t /*nbOutputs*/) const noexcept
{
    std::string refusal;
    Problem const largest = problemOf(mOp, largestOf(inputs, nbInputs).data(), refusal);
    int32_t const count = multiprocessors();
    return refusal.empty() ? workspaceBytes(largest, count > 0 ? count : 1) : 0;
}

char const* LatentAttentionPlugin::getTimingCacheID() noexcept
{
    return mName.c_str();
}

char const* LatentAttentionPlugin::getMetadataString() noexcept
{
    return mName.c_str();
}

int32_t LatentAttentionPlugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::PluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept
{
    if (!hasInputs(nbInputs))
    {
        return kFailure;
    }
    std::string refusal;
    problemOf(mOp, dimsOf(in, nbInputs).data(), refusal);
    if (!refusal.empty())
    {
        logError(mName.c_str(), refusal);
        return kFailure;
    }
    mMultiprocessors = multiprocessors();
    return 0;
}

int32_t LatentAttentionPlugin::enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
    nvinfer1::PluginTensorDesc const* /*outputDesc*/, void const* const* inputs, void* const* outputs, void* workspace,
    cudaStream_t stream) noexcept
{
    std::string refusal;
    Problem const problem = problemOf(mOp, dimsOf(inputDesc, mOp.inputs()).data(), refusal);
    if (!refusal.empty())
    {
        logError(mName.c_str(), refusal);
        return kFailure;
    }
    int32_t const up = mOp.up();
    auto const at = [&](int32_t place) { return place < 0 ? nullptr : inputs[place]; };
    auto const table = [&](int32_t place) { return static_cast<float const*>(up < 0 ? nullptr : inputs[place]); };
    Pointers const pointers{inputs[kQuery], inputs[kMask], inputs[kKeys], at(mOp.keySteps()), inputs[mOp.valuesAt()],
        at(mOp.valueSteps()), at(up), up < 0 ? nullptr : inputs[up + 1], table(up + 2), table(up + 3), outputs[0]};
    int32_t const count = mMultiprocessors > 0 ? mMultiprocessors : multiprocessors();
    cudaError_t const status = latentAttention(problem, pointers, count, workspace, stream);
    if (status != cudaSuccess)
    {
        logError(mName.c_str(), std::string("the kernel cannot be launched: ") + cudaGetErrorString(status));
        return kFailure;
    }
    return 0;
}

nvinfer1::IPluginV3* LatentAttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* LatentAttentionPlugin::getFieldsToSerialize() noexcept
{
    return &mNoFields;
}

LatentAttentionCreator::LatentAttentionCreator(LatentOp const& op)
    : mOp(op)
    , mName(op.name())
{
}

nvinfer1::IPluginV3* LatentAttentionCreator::createPlugin(char const* /*name*/,
    nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase /*phase*/) noexcept
{
    std::string const refusal = whyNoFields(fields);
    if (!refusal.empty())
    {
        logError(mName.c_str(), refusal);
        return nullptr;
    }
    return new (std::nothrow) LatentAttentionPlugin(mOp);
}

nvinfer1::PluginFieldCollection const* LatentAttentionCreator::getFieldNames() noexcept
{
    return &mNoFields;
}

char const* LatentAttentionCreator::getPluginName() const noexcept
{
    return mName.c_str();
}

char const* LatentAttentionCreator::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* LatentAttentionCreator::getPluginNamespace() const noexcept
{
    return kNamespace;
}

} // namespace skipcat::latent
