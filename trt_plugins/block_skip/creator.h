// Makes plugins of one op, and refuses fields that make no sense.

#ifndef SKIPCAT_CREATOR_H
#define SKIPCAT_CREATOR_H

#include "plugin.h"

namespace skipcat
{

class BlockSkipCreator : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit BlockSkipCreator(Op const& op);

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    Op mOp;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

} // namespace skipcat

#endif
