// The layer as an IPluginV3 for TensorRT 10.3 and newer. Four op names, one class:
//
//     BlockSkipLinear(x, a, b)                            BlockSkipLinearIndexed(x, a, b, index)
//     BlockSkipLinearQuantized(x, a, aScale, b, bScale)   BlockSkipLinearQuantizedIndexed(..., index)
//
// x [..., n] in fp16 or bf16, rows <= 4096; the rest as in block_skip.h. Codes come as int8 tensors of
// bytes, [rows, columns] or, with 4 bits, [rows, (columns + 1) / 2]; the scales tell the true width.

#ifndef SKIPCAT_PLUGIN_H
#define SKIPCAT_PLUGIN_H

#include <array>
#include <cstdint>
#include <string>

#include "NvInfer.h"

#include "block_skip.h"

namespace skipcat
{

constexpr char const* kNamespace = "skipcat";
constexpr char const* kVersion = "1";

// One of the four ops.
struct Op
{
    char const* name;
    bool quantized;
    bool indexed;

    // Places of the inputs; -1 for one that this op does not have.
    int32_t a() const { return 1; }
    int32_t aScale() const { return quantized ? 2 : -1; }
    int32_t b() const { return quantized ? 3 : 2; }
    int32_t bScale() const { return quantized ? 4 : -1; }
    int32_t index() const { return indexed ? b() + (quantized ? 2 : 1) : -1; }
    int32_t inputs() const { return 3 + (quantized ? 2 : 0) + (indexed ? 1 : 0); }
};

constexpr std::array<Op, 4> kOps{{{"BlockSkipLinear", false, false}, {"BlockSkipLinearIndexed", false, true},
    {"BlockSkipLinearQuantized", true, false}, {"BlockSkipLinearQuantizedIndexed", true, true}}};

// Bits of the codes and rows to a scale; zero where weights are of the type of x.
struct Format
{
    int32_t bits{0};
    int32_t groupSize{0};
};

class BlockSkipPlugin : public nvinfer1::IPluginV3,
                        public nvinfer1::IPluginV3OneCore,
                        public nvinfer1::IPluginV3OneBuild,
                        public nvinfer1::IPluginV3OneRuntime
{
public:
    BlockSkipPlugin(Op const& op, Format format);
    ~BlockSkipPlugin() override;
    BlockSkipPlugin(BlockSkipPlugin const&) = delete;
    BlockSkipPlugin& operator=(BlockSkipPlugin const&) = delete;

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
    int32_t getNbTactics() noexcept override;
    int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;

    int32_t setTactic(int32_t tactic) noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    void makeCounters(size_t bytes) noexcept;

    Op mOp;
    Format mFormat;
    std::string mTimingCacheId;
    int32_t mTactic{0};
    Device mDevice{};
    // Only of a plugin that belongs to a context: two contexts may run at once.
    bool mAttached{false};
    uint32_t* mCounters{nullptr};
    size_t mCounterBytes{0};
    std::array<nvinfer1::PluginField, 2> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

} // namespace skipcat

#endif
