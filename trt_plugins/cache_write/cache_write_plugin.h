// Writing the cache as IPluginV3 for TensorRT 10.3 and newer:
//
//     CacheWrite(past [B, H, L, W], new [B, H, S, W], first int32 [B]) -> present, which is past
//
// past and new of one type: fp16, bf16, fp32, or codes of int8. The output is an alias of the first input where the
// builder has the preview feature kALIASED_PLUGIN_IO_10_03; where it has not, past is copied first.

#ifndef SKIPCAT_CACHE_WRITE_PLUGIN_H
#define SKIPCAT_CACHE_WRITE_PLUGIN_H

#include <string>

#include "NvInfer.h"

#include "cache_write.h"

namespace skipcat::cache
{

constexpr char const* kName = "CacheWrite";
constexpr int32_t kPast = 0;
constexpr int32_t kNew = 1;
constexpr int32_t kFirst = 2;
constexpr int32_t kInputs = 3;

// The problem of these input dimensions. `refusal` says what does not fit, and is empty if all does.
Problem problemOf(nvinfer1::DataType type, nvinfer1::Dims const* inputs, std::string& refusal);

class CacheWritePlugin : public nvinfer1::IPluginV3,
                         public nvinfer1::IPluginV3OneCore,
                         public nvinfer1::IPluginV3OneBuildV2,
                         public nvinfer1::IPluginV3OneRuntime
{
public:
    CacheWritePlugin() = default;
    CacheWritePlugin(CacheWritePlugin const&) = delete;
    CacheWritePlugin& operator=(CacheWritePlugin const&) = delete;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
        nvinfer1::DimsExprs const* shapeInputs, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
        int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* descriptors, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t getAliasedInput(int32_t outputIndex) noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    nvinfer1::PluginFieldCollection mNoFields{0, nullptr};
};

class CacheWriteCreator : public nvinfer1::IPluginCreatorV3One
{
public:
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    nvinfer1::PluginFieldCollection mNoFields{0, nullptr};
};

} // namespace skipcat::cache

#endif
