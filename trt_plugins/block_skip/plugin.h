// The layer as an IPluginV3 for TensorRT 10.3 and newer. Twenty op names, one class:
//
//     BlockSkipLinear[A4|A8][B4|B8][Indexed](x, a[, aScale], b[, bScale][, index])
//     LinearQuantized4(x, b, bScale)   LinearQuantized8(x, b, bScale)   without a: y = x b
//
// x [..., n] in fp16 or bf16, rows <= 4096; the rest as in block_skip.h. Codes come as int8 tensors of
// bytes, [rows, columns] or, with 4 bits, [rows, (columns + 1) / 2]; the scales tell the true width. Fields
// block_a and block_b say how many rows share a scale.

#ifndef SKIPCAT_PLUGIN_H
#define SKIPCAT_PLUGIN_H

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "NvInfer.h"

#include "block_skip.h"

namespace skipcat
{

constexpr char const* kNamespace = "skipcat";
constexpr char const* kVersion = "1";

// One of the ops.
struct Op
{
    std::string name;
    bool mixes;    // whether there is an a
    int32_t aBits; // of codes; zero where it is of the type of x
    int32_t bBits;
    bool indexed;

    // Places of the inputs; -1 for one that this op does not have.
    int32_t a() const { return mixes ? 1 : -1; }
    int32_t aScale() const { return aBits > 0 ? 2 : -1; }
    int32_t b() const { return mixes ? (aBits > 0 ? 3 : 2) : 1; }
    int32_t bScale() const { return bBits > 0 ? b() + 1 : -1; }
    int32_t index() const { return indexed ? b() + (bBits > 0 ? 2 : 1) : -1; }
    int32_t inputs() const { return b() + (bBits > 0 ? 2 : 1) + (indexed ? 1 : 0); }
    bool isCode(int32_t place) const { return (aBits > 0 && place == a()) || (bBits > 0 && place == b()); }
};

// All of them, in the order of their names.
std::vector<Op> const& blockSkipOps();

// Rows of a and b that share a scale; zero where there are no codes.
struct Blocks
{
    int32_t a{0};
    int32_t b{0};
};

// The fields of an op, each with the number of `blocks` that it stands for.
std::vector<nvinfer1::PluginField> fieldsOf(Op const& op, Blocks const& blocks);

class BlockSkipPlugin : public nvinfer1::IPluginV3,
                        public nvinfer1::IPluginV3OneCore,
                        public nvinfer1::IPluginV3OneBuild,
                        public nvinfer1::IPluginV3OneRuntime
{
public:
    BlockSkipPlugin(Op const& op, Blocks blocks);
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
    Blocks mBlocks;
    std::string mTimingCacheId;
    int32_t mTactic{0};
    Device mDevice{};
    // Only of a plugin that belongs to a context: two contexts may run at once.
    bool mAttached{false};
    uint32_t* mCounters{nullptr};
    size_t mCounterBytes{0};
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

} // namespace skipcat

#endif
