#include "cache_write_plugin.h"

#include <array>
#include <new>

#include "fields.h"
#include "log.h"
#include "plugin.h"
#include "shapes.h"

namespace skipcat::cache
{
namespace
{

constexpr int32_t kFailure = -1;

int32_t bytesOf(nvinfer1::DataType type)
{
    switch (type)
    {
    case nvinfer1::DataType::kFLOAT: return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    case nvinfer1::DataType::kINT8: return 1;
    default: return 0;
    }
}

bool hasInputs(int32_t count)
{
    if (count != kInputs)
    {
        logError(kName, std::to_string(count) + " inputs, expected " + std::to_string(kInputs));
    }
    return count == kInputs;
}

template <typename Tensor, typename DimsOf>
std::array<nvinfer1::Dims, kInputs> dimsOf(Tensor const* tensors, DimsOf of)
{
    return {of(tensors[kPast]), of(tensors[kNew]), of(tensors[kFirst])};
}

// Logs why there is no such problem; false then.
bool fits(nvinfer1::DataType type, std::array<nvinfer1::Dims, kInputs> const& dims)
{
    std::string refusal;
    problemOf(type, dims.data(), refusal);
    if (!refusal.empty())
    {
        logError(kName, refusal);
    }
    return refusal.empty();
}

} // namespace

Problem problemOf(nvinfer1::DataType type, nvinfer1::Dims const* inputs, std::string& refusal)
{
    nvinfer1::Dims const& past = inputs[kPast];
    nvinfer1::Dims const& fresh = inputs[kNew];
    nvinfer1::Dims const& first = inputs[kFirst];
    Problem p;
    if (past.nbDims != 4 || bytesOf(type) == 0)
    {
        refusal = "past is " + text(past) + ", expected [any, any, any, any] of floats or int8";
        return p;
    }
    p.batch = static_cast<int32_t>(past.d[0]);
    p.heads = static_cast<int32_t>(past.d[1]);
    p.slots = static_cast<int32_t>(past.d[2]);
    p.rowBytes = static_cast<int32_t>(past.d[3]) * bytesOf(type);
    bool const alike
        = fresh.nbDims == 4 && fresh.d[0] == past.d[0] && fresh.d[1] == past.d[1] && fresh.d[3] == past.d[3];
    if (!alike || fresh.d[2] > past.d[2])
    {
        refusal = "new is " + text(fresh) + ", expected as past " + text(past) + " with no more tokens than slots";
        return p;
    }
    p.tokens = static_cast<int32_t>(fresh.d[2]);
    if (first.nbDims != 1 || first.d[0] != past.d[0])
    {
        refusal = "first is " + text(first) + ", expected [" + std::to_string(past.d[0]) + "]";
    }
    return p;
}

nvinfer1::IPluginCapability* CacheWritePlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* CacheWritePlugin::clone() noexcept
{
    return new (std::nothrow) CacheWritePlugin;
}

char const* CacheWritePlugin::getPluginName() const noexcept
{
    return kName;
}

char const* CacheWritePlugin::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* CacheWritePlugin::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t CacheWritePlugin::getNbOutputs() const noexcept
{
    return 1;
}

int32_t CacheWritePlugin::getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
    nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (nbOutputs != 1 || !hasInputs(nbInputs))
    {
        return kFailure;
    }
    outputTypes[0] = inputTypes[kPast];
    return 0;
}

int32_t CacheWritePlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& /*exprBuilder*/) noexcept
{
    if (nbOutputs != 1 || !hasInputs(nbInputs))
    {
        return kFailure;
    }
    outputs[0] = inputs[kPast];
    return 0;
}

bool CacheWritePlugin::supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* descriptors,
    int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != kInputs || nbOutputs != 1 || pos < 0 || pos > nbInputs)
    {
        return false;
    }
    nvinfer1::PluginTensorDesc const& tensor = descriptors[pos].desc;
    bool const typed = pos == kFirst ? tensor.type == nvinfer1::DataType::kINT32
        : pos == kPast               ? bytesOf(tensor.type) > 0
                                     : tensor.type == descriptors[kPast].desc.type;
    return typed && tensor.format == nvinfer1::TensorFormat::kLINEAR;
}

int32_t CacheWritePlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept
{
    bool const good = hasInputs(nbInputs)
        && fits(in[kPast].desc.type,
            dimsOf(in, [](nvinfer1::DynamicPluginTensorDesc const& tensor) { return tensor.max; }));
    return good ? 0 : kFailure;
}

int32_t CacheWritePlugin::getAliasedInput(int32_t outputIndex) noexcept
{
    return outputIndex == 0 ? kPast : -1;
}

char const* CacheWritePlugin::getTimingCacheID() noexcept
{
    return kName;
}

char const* CacheWritePlugin::getMetadataString() noexcept
{
    return kName;
}

int32_t CacheWritePlugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::PluginTensorDesc const* /*out*/, int32_t /*nbOutputs*/) noexcept
{
    bool const good = hasInputs(nbInputs)
        && fits(in[kPast].type, dimsOf(in, [](nvinfer1::PluginTensorDesc const& tensor) { return tensor.dims; }));
    return good ? 0 : kFailure;
}

int32_t CacheWritePlugin::enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
    nvinfer1::PluginTensorDesc const* /*outputDesc*/, void const* const* inputs, void* const* outputs,
    void* /*workspace*/, cudaStream_t stream) noexcept
{
    auto const dims = dimsOf(inputDesc, [](nvinfer1::PluginTensorDesc const& tensor) { return tensor.dims; });
    std::string refusal;
    Problem const problem = problemOf(inputDesc[kPast].type, dims.data(), refusal);
    if (!refusal.empty())
    {
        logError(kName, refusal);
        return kFailure;
    }
    cudaError_t status = cudaSuccess;
    // A builder without the preview feature, or one that times the plugin, gives the output a memory of its own.
    if (outputs[0] != inputs[kPast])
    {
        status = cudaMemcpyAsync(
            outputs[0], inputs[kPast], problem.cacheBytes(), cudaMemcpyDeviceToDevice, stream);
    }
    if (status == cudaSuccess)
    {
        status = writeCache(problem, inputs[kNew], static_cast<int32_t const*>(inputs[kFirst]), outputs[0], stream);
    }
    if (status != cudaSuccess)
    {
        logError(kName, std::string("the cache cannot be written: ") + cudaGetErrorString(status));
        return kFailure;
    }
    return 0;
}

nvinfer1::IPluginV3* CacheWritePlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* CacheWritePlugin::getFieldsToSerialize() noexcept
{
    return &mNoFields;
}

nvinfer1::IPluginV3* CacheWriteCreator::createPlugin(char const* /*name*/,
    nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase /*phase*/) noexcept
{
    std::string const refusal = whyNoFields(fields);
    if (!refusal.empty())
    {
        logError(kName, refusal);
        return nullptr;
    }
    return new (std::nothrow) CacheWritePlugin;
}

nvinfer1::PluginFieldCollection const* CacheWriteCreator::getFieldNames() noexcept
{
    return &mNoFields;
}

char const* CacheWriteCreator::getPluginName() const noexcept
{
    return kName;
}

char const* CacheWriteCreator::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* CacheWriteCreator::getPluginNamespace() const noexcept
{
    return kNamespace;
}

} // namespace skipcat::cache
