// Which ops there are, their names and their fields.

#include "plugin.h"

namespace skipcat
{
namespace
{

std::string nameOf(Op const& op)
{
    auto const form = [](char const* letter, int32_t bits)
    { return bits == 0 ? std::string() : letter + std::to_string(bits); };
    if (!op.mixes)
    {
        return "LinearQuantized" + std::to_string(op.bBits);
    }
    return "BlockSkipLinear" + form("A", op.aBits) + form("B", op.bBits) + (op.indexed ? "Indexed" : "");
}

std::vector<Op> makeOps()
{
    std::vector<Op> ops;
    for (int32_t const aBits : {0, 4, 8})
    {
        for (int32_t const bBits : {0, 4, 8})
        {
            for (bool const indexed : {false, true})
            {
                ops.push_back({"", true, aBits, bBits, indexed});
            }
        }
    }
    ops.push_back({"", false, 0, 4, false});
    ops.push_back({"", false, 0, 8, false});
    for (Op& op : ops)
    {
        op.name = nameOf(op);
    }
    return ops;
}

} // namespace

std::vector<Op> const& blockSkipOps()
{
    static std::vector<Op> const ops = makeOps();
    return ops;
}

std::vector<nvinfer1::PluginField> fieldsOf(Op const& op, Blocks const& blocks)
{
    std::vector<nvinfer1::PluginField> fields;
    if (op.aBits > 0)
    {
        fields.push_back({"block_a", &blocks.a, nvinfer1::PluginFieldType::kINT32, 1});
    }
    if (op.bBits > 0)
    {
        fields.push_back({"block_b", &blocks.b, nvinfer1::PluginFieldType::kINT32, 1});
    }
    return fields;
}

} // namespace skipcat
