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

// Takes a field that an op has: the number of its block, or why it is none.
bool readBlock(Op const& op, nvinfer1::PluginField const& field, Blocks& blocks, std::string& refusal)
{
    for (nvinfer1::PluginField const& known : fieldsOf(op, blocks))
    {
        if (std::strcmp(field.name, known.name) == 0)
        {
            readNumber(field, known.data == &blocks.a ? blocks.a : blocks.b, refusal);
            return true;
        }
    }
    return false;
}

std::string whyBlocksRefused(Op const& op, Blocks const& blocks)
{
    for (nvinfer1::PluginField const& field : fieldsOf(op, blocks))
    {
        int32_t const block = *static_cast<int32_t const*>(field.data);
        if (block < 16 || block % 16 != 0)
        {
            return std::string(field.name) + " is " + std::to_string(block) + ", expected a multiple of 16";
        }
    }
    return "";
}

std::string readFields(Op const& op, nvinfer1::PluginFieldCollection const& fields, Blocks& blocks)
{
    std::string refusal;
    for (int32_t i = 0; i < fields.nbFields && refusal.empty(); ++i)
    {
        nvinfer1::PluginField const& field = fields.fields[i];
        if (field.name == nullptr)
        {
            refusal = "a field without a name";
        }
        else if (!isOurs(field, refusal) && !readBlock(op, field, blocks, refusal))
        {
            refusal = std::string("there is no field '") + field.name + "'; it has";
            for (nvinfer1::PluginField const& known : fieldsOf(op, blocks))
            {
                refusal += std::string(" ") + known.name;
            }
            refusal += fieldsOf(op, blocks).empty() ? " none" : "";
        }
    }
    return refusal.empty() ? whyBlocksRefused(op, blocks) : refusal;
}

} // namespace

BlockSkipCreator::BlockSkipCreator(Op const& op)
    : mOp(op)
    , mFields(fieldsOf(op, {}))
{
    for (nvinfer1::PluginField& field : mFields)
    {
        field.data = nullptr; // a name alone
    }
    mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
}

nvinfer1::IPluginV3* BlockSkipCreator::createPlugin(
    char const* /*name*/, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase /*phase*/) noexcept
{
    Blocks blocks;
    std::string const refusal
        = fields == nullptr ? "no fields were given" : readFields(mOp, *fields, blocks);
    if (!refusal.empty())
    {
        logError(mOp.name.c_str(), refusal);
        return nullptr;
    }
    return new (std::nothrow) BlockSkipPlugin(mOp, blocks);
}

nvinfer1::PluginFieldCollection const* BlockSkipCreator::getFieldNames() noexcept
{
    return &mFieldCollection;
}

char const* BlockSkipCreator::getPluginName() const noexcept
{
    return mOp.name.c_str();
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
