// Latent attention as IPluginV3 for TensorRT 10.3 and newer. Eighteen op names, one class:
//
//     LatentAttention[Rebuilt][Keys8|Keys4][Values8|Values4](
//         query, mask, keys[, keySteps], values[, valueSteps][, up, mean, cos, sin])
//
// Shapes as in latent_attention.h, by axes; cos and sin are float, codes int8, all else fp16.

#ifndef SKIPCAT_LATENT_PLUGIN_H
#define SKIPCAT_LATENT_PLUGIN_H

#include <array>
#include <string>
#include <vector>

#include "NvInfer.h"

#include "latent_attention.h"

namespace skipcat::latent
{

// One of the ops, and the places of its inputs; -1 for one that it does not have.
struct LatentOp
{
    bool rebuilt{false};
    Form keys{Form::kNumbers};
    Form values{Form::kNumbers};

    std::string name() const;
    int32_t keySteps() const { return keys == Form::kNumbers ? -1 : 3; }
    int32_t valuesAt() const { return keys == Form::kNumbers ? 3 : 4; }
    int32_t valueSteps() const { return values == Form::kNumbers ? -1 : valuesAt() + 1; }
    int32_t up() const { return rebuilt ? valuesAt() + (values == Form::kNumbers ? 1 : 2) : -1; }
    int32_t inputs() const { return valuesAt() + (values == Form::kNumbers ? 1 : 2) + (rebuilt ? 4 : 0); }
};

constexpr int32_t kQuery = 0;
constexpr int32_t kMask = 1;
constexpr int32_t kKeys = 2;
constexpr int32_t kMostInputs = 10;

// All of them, in the order of their names.
std::vector<LatentOp> latentOps();

// The problem of these input dimensions. `refusal` says what does not fit, and is empty if all does.
Problem problemOf(LatentOp const& op, nvinfer1::Dims const* inputs, std::string& refusal);

class LatentAttentionPlugin : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit LatentAttentionPlugin(LatentOp const& op);
    LatentAttentionPlugin(LatentAttentionPlugin const&) = delete;
    LatentAttentionPlugin& operator=(LatentAttentionPlugin const&) = delete;

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
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    bool hasInputs(int32_t count) const noexcept;

    LatentOp mOp;
    std::string mName;
    int32_t mMultiprocessors{0};
    nvinfer1::PluginFieldCollection mNoFields{0, nullptr};
};

class LatentAttentionCreator : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit LatentAttentionCreator(LatentOp const& op);

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    LatentOp mOp;
    std::string mName;
    nvinfer1::PluginFieldCollection mNoFields{0, nullptr};
};

} // namespace skipcat::latent

#endif
