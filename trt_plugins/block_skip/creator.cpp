#include "creator.h"

#include <cstring>
#include <new>
#include <string>

#include "fields.h"
#include "log.h"

namespace skipcat
{
namespace
{

void readNumber(nvinfer1::PluginField const& field, int32_t& number, std::string& refusal)
{
    if (field.data == nullptr || field.length != 1)
    {
        refusal = std::string("the field '") + field.name + "' has " + std::to_string(field.length)
            + " values, expected one";
    }
    else if (field.type == nvinfer1::PluginFieldType::kINT32)
    {
        number = *static_cast<int32_t const*>(field.data);
    }
    else if (field.type == nvinfer1::PluginFieldType::kINT64)
    {
        number = static_cast<int32_t>(*static_cast<int64_t const*>(field.data));
    }
    else
    {
        refusal = std::string("the field '") + field.name + "' is of type "
            + std::to_string(static_cast<int32_t>(field.type)) + ", expected int32";
    }
}

std::string readFields(Op const& op, nvinfer1::PluginFieldCollection const& fields, Format& format)
{
    std::string refusal;
    for (int32_t i = 0; i < fields.nbFields && refusal.empty(); ++i)
    {
        nvinfer1::PluginField const& field = fields.fields[i];
        if (field.name == nullptr)
        {
            refusal = "a field without a name";
        }
        else if (isOurs(field, refusal))
        {
            continue;
        }
        else if (op.quantized && std::strcmp(field.name, "bits") == 0)
        {
            readNumber(field, format.bits, refusal);
        }
        else if (op.quantized && std::strcmp(field.name, "group_size") == 0)
        {
            readNumber(field, format.groupSize, refusal);
        }
        else
        {
            refusal = std::string("there is no field '") + field.name + "'; it has "
                + (op.quantized ? "bits and group_size" : "none");
        }
    }
    if (refusal.empty() && op.quantized && format.bits != 4 && format.bits != 8)
    {
        refusal = "bits is " + std::to_string(format.bits) + ", expected 4 or 8";
    }
    if (refusal.empty() && op.quantized && (format.groupSize < 16 || format.groupSize % 16 != 0))
    {
        refusal = "group_size is " + std::to_string(format.groupSize) + ", expected a multiple of 16";
    }
    return refusal;
}

} // namespace

BlockSkipCreator::BlockSkipCreator(Op const& op)
    : mOp(op)
{
    mFields[0] = {"bits", nullptr, nvinfer1::PluginFieldType::kINT32, 1};
    mFields[1] = {"group_size", nullptr, nvinfer1::PluginFieldType::kINT32, 1};
    mFieldCollection = {mOp.quantized ? 2 : 0, mFields.data()};
}

nvinfer1::IPluginV3* BlockSkipCreator::createPlugin(
    char const* /*name*/, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase /*phase*/) noexcept
{
    Format format;
    std::string const refusal
        = fields == nullptr ? "no fields were given" : readFields(mOp, *fields, format);
    if (!refusal.empty())
    {
        logError(mOp.name, refusal);
        return nullptr;
    }
    return new (std::nothrow) BlockSkipPlugin(mOp, format);
}

nvinfer1::PluginFieldCollection const* BlockSkipCreator::getFieldNames() noexcept
{
    return &mFieldCollection;
}

char const* BlockSkipCreator::getPluginName() const noexcept
{
    return mOp.name;
}

char const* BlockSkipCreator::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* BlockSkipCreator::getPluginNamespace() const noexcept
{
    return kNamespace;
}

} // namespace skipcat
