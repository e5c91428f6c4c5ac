// The nodes of a graph, as a parser would hand them over: one to a line, words by spaces,
//
//     NODE OP  FIELDS (NAME VALUE)...  TENSORS (TYPE DIMENSIONS D...)...
//
// with numbers for FIELDS, VALUE, TENSORS and DIMENSIONS; types half, bf16, int8 and int32; tensors are the
// inputs in order and the output. What a graph of our own has is so told apart from what the plugin takes.

#include "harness.h"

#include <fstream>
#include <memory>
#include <sstream>

namespace harness
{
namespace
{

struct Node
{
    std::string name;
    std::string op;
    std::vector<std::pair<std::string, int32_t>> fields;
    std::vector<nvinfer1::PluginTensorDesc> tensors;
};

bool readType(std::istream& from, nvinfer1::DataType& type)
{
    std::string word;
    from >> word;
    for (auto const& [name, known] :
        {std::pair{"half", nvinfer1::DataType::kHALF}, std::pair{"bf16", nvinfer1::DataType::kBF16},
            std::pair{"int8", nvinfer1::DataType::kINT8}, std::pair{"int32", nvinfer1::DataType::kINT32}})
    {
        if (word == name)
        {
            type = known;
            return true;
        }
    }
    return false;
}

bool readTensor(std::istream& from, nvinfer1::PluginTensorDesc& tensor)
{
    bool good = readType(from, tensor.type) && (from >> tensor.dims.nbDims) && tensor.dims.nbDims >= 0
        && tensor.dims.nbDims <= nvinfer1::Dims::MAX_DIMS;
    for (int32_t i = 0; good && i < tensor.dims.nbDims; ++i)
    {
        good = static_cast<bool>(from >> tensor.dims.d[i]);
    }
    tensor.format = nvinfer1::TensorFormat::kLINEAR;
    tensor.scale = 1.0f;
    return good;
}

bool readNode(std::string const& line, Node& node)
{
    std::istringstream from(line);
    size_t fields = 0;
    size_t tensors = 0;
    from >> node.name >> node.op >> fields;
    for (size_t i = 0; from && i < fields; ++i)
    {
        node.fields.emplace_back();
        from >> node.fields.back().first >> node.fields.back().second;
    }
    from >> tensors;
    bool good = static_cast<bool>(from) && tensors >= 2;
    for (size_t i = 0; good && i < tensors; ++i)
    {
        node.tensors.emplace_back();
        good = readTensor(from, node.tensors.back());
    }
    return good;
}

// The parser passes on every attribute that a node has.
std::unique_ptr<nvinfer1::IPluginV3> made(nvinfer1::IPluginCreatorV3One& creator, Node const& node)
{
    std::vector<nvinfer1::PluginField> fields{
        {"plugin_namespace", skipcat::kNamespace, nvinfer1::PluginFieldType::kCHAR, 7},
        {"plugin_version", skipcat::kVersion, nvinfer1::PluginFieldType::kCHAR, 1}};
    for (auto const& [name, value] : node.fields)
    {
        fields.push_back({name.c_str(), &value, nvinfer1::PluginFieldType::kINT32, 1});
    }
    nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<nvinfer1::IPluginV3>(
        creator.createPlugin(node.name.c_str(), &collection, nvinfer1::TensorRTPhase::kBUILD));
}

bool takes(nvinfer1::IPluginV3& plugin, Node const& node)
{
    auto const tensors = dynamic(node.tensors);
    int32_t const inputs = static_cast<int32_t>(tensors.size()) - 1;
    bool good = true;
    for (int32_t place = 0; place <= inputs; ++place)
    {
        good = good && buildOf(plugin)->supportsFormatCombination(place, tensors.data(), inputs, 1);
    }
    return good && node.tensors.front().dims.nbDims == node.tensors.back().dims.nbDims
        && configure(plugin, node.tensors) == 0;
}

} // namespace

bool checkNodes(Creators const& creators, char const* path, Logger& logger, Report& report)
{
    std::ifstream file(path);
    std::string line;
    size_t nodes = 0;
    while (std::getline(file, line))
    {
        Node node;
        if (!readNode(line, node))
        {
            return false;
        }
        nodes += 1;
        logger.last.clear();
        bool good = false;
        for (nvinfer1::IPluginCreatorV3One* const creator : creators)
        {
            if (creator->getPluginName() == node.op)
            {
                auto const plugin = made(*creator, node);
                good = plugin != nullptr && takes(*plugin, node);
            }
        }
        report.check("node " + node.name + " is taken by " + node.op, good, good ? "" : "logged '" + logger.last + "'");
    }
    return nodes > 0;
}

} // namespace harness
