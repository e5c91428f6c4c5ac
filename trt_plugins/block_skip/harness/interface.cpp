// Checks that need no device: creators, fields, types, formats, shapes, tactics, copies.

#include "harness.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace harness
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

struct Constant : nvinfer1::apiv::VDimensionExpr
{
    explicit Constant(int64_t v)
        : value(v)
    {
    }

    bool isConstant() const override
    {
        return true;
    }

    int64_t getConstantValue() const override
    {
        return value;
    }

    bool isSizeTensor() const override
    {
        return false;
    }

    int64_t value;
};

// A dimension that is known: all the plugin ever does with one is to pass it on.
struct Dimension : nvinfer1::IDimensionExpr
{
    explicit Dimension(int64_t value)
        : constant(value)
    {
        mImpl = &constant;
    }

    Constant constant;
};

struct NoBuilder : nvinfer1::IExprBuilder
{
    NoBuilder()
    {
        mImpl = nullptr;
    }
};

void refuses(nvinfer1::IPluginCreatorV3One& creator, std::vector<PluginField> fields, char const* says, Logger& logger,
    Report& report)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    logger.last.clear();
    std::unique_ptr<nvinfer1::IPluginV3> const made(
        creator.createPlugin("layer", &collection, TensorRTPhase::kBUILD));
    std::string const name = creator.getPluginName();
    report.check(name + " refuses: " + says, made == nullptr && logger.last.find(says) != std::string::npos,
        made == nullptr && logger.last.find(says) != std::string::npos ? "" : "logged '" + logger.last + "'");
}

void checkFields(nvinfer1::IPluginCreatorV3One& creator, skipcat::Op const& op, Logger& logger, Report& report)
{
    int32_t const four = 4;
    int32_t const twenty = 20;
    float const number = 32.0f;
    char const other[] = "other";
    auto const field = [](char const* name, int32_t const& value)
    { return PluginField{name, &value, PluginFieldType::kINT32, 1}; };
    refuses(creator, {field("depth", four)}, "no field 'depth'", logger, report);
    refuses(creator, {{"plugin_namespace", other, PluginFieldType::kCHAR, 5}}, "expected 'skipcat'", logger, report);
    refuses(creator, {{"plugin_version", other, PluginFieldType::kCHAR, 5}}, "expected '1'", logger, report);
    skipcat::Blocks const blocks{32, 32};
    std::vector<PluginField> const good = skipcat::fieldsOf(op, blocks);
    for (char const* name : {"block_a", "block_b"})
    {
        bool const has = std::any_of(
            good.begin(), good.end(), [&](PluginField const& known) { return std::strcmp(known.name, name) == 0; });
        if (!has)
        {
            refuses(creator, {field(name, four)}, (std::string("no field '") + name).c_str(), logger, report);
            continue;
        }
        refuses(creator, {}, " is 0", logger, report);
        std::vector<PluginField> wrong = good;
        for (PluginField& known : wrong)
        {
            known.data = std::strcmp(known.name, name) == 0 ? &twenty : known.data;
        }
        refuses(creator, wrong, " is 20", logger, report);
        refuses(creator, {{name, &number, PluginFieldType::kFLOAT32, 1}}, "expected int32", logger, report);
        refuses(creator, {{name, &four, PluginFieldType::kINT32, 2}}, "expected one", logger, report);
    }
}

void checkShapes(nvinfer1::IPluginV3& plugin, skipcat::Op const& op, skipcat::Problem const& problem, Report& report)
{
    std::vector<std::unique_ptr<Dimension>> kept;
    std::vector<nvinfer1::DimsExprs> inputs;
    for (auto const& tensor : describe(op, problem))
    {
        nvinfer1::DimsExprs dims;
        dims.nbDims = tensor.dims.nbDims;
        for (int32_t i = 0; i < dims.nbDims; ++i)
        {
            kept.push_back(std::make_unique<Dimension>(tensor.dims.d[i]));
            dims.d[i] = kept.back().get();
        }
        inputs.push_back(dims);
    }
    nvinfer1::DimsExprs output{};
    NoBuilder builder;
    int32_t const status
        = buildOf(plugin)->getOutputShapes(inputs.data(), op.inputs(), nullptr, 0, &output, 1, builder);
    bool const good = status == 0 && output.nbDims == 3 && output.d[0] == inputs[0].d[0] && output.d[1] == inputs[0].d[1]
        && output.d[2]->getConstantValue() == problem.m;
    report.check(op.name + " has output shape [..., m]", good);
}

// Every type in every place: only the documented combinations pass.
void checkFormats(nvinfer1::IPluginV3& plugin, skipcat::Op const& op, skipcat::Problem const& problem, Report& report)
{
    DataType const types[]
        = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kINT32, DataType::kINT64};
    bool good = true;
    for (DataType const x : {DataType::kHALF, DataType::kBF16, DataType::kFLOAT})
    {
        for (int32_t place = 0; place <= op.inputs(); ++place)
        {
            for (DataType const type : types)
            {
                auto tensors = dynamic(describe(op, problem));
                tensors[0].desc.type = x;
                tensors[static_cast<size_t>(place)].desc.type = type;
                bool const expected = place == 0 ? type == DataType::kHALF || type == DataType::kBF16
                    : place == op.index()        ? type == DataType::kINT32
                    : op.isCode(place)           ? type == DataType::kINT8
                                                 : type == x;
                bool const said
                    = buildOf(plugin)->supportsFormatCombination(place, tensors.data(), op.inputs(), 1);
                good = good && said == expected;
                tensors[static_cast<size_t>(place)].desc.format = nvinfer1::TensorFormat::kCHW4;
                good = good && !buildOf(plugin)->supportsFormatCombination(place, tensors.data(), op.inputs(), 1);
            }
        }
    }
    report.check(op.name + " takes its types, linear, and no others", good);
}

void checkMisfits(nvinfer1::IPluginV3& plugin, skipcat::Op const& op, skipcat::Problem const& problem, Logger& logger,
    Report& report)
{
    auto const good = describe(op, problem);
    report.check(op.name + " takes shapes that fit", configure(plugin, good) == 0, "");
    for (int32_t place = 1; place < op.inputs(); ++place)
    {
        auto wrong = good;
        wrong[static_cast<size_t>(place)].dims.d[0] += 1000;
        logger.last.clear();
        bool const refused = configure(plugin, wrong) == -1 && logger.last.find("expected") != std::string::npos;
        report.check(op.name + " refuses a misfit in input " + std::to_string(place), refused,
            refused ? "" : "logged '" + logger.last + "'");
    }
    auto wrong = good;
    wrong[0].dims.d[0] = 5000;
    report.check(op.name + " refuses more than 4096 rows", configure(plugin, wrong) == -1);
}

void checkCopies(nvinfer1::IPluginCreatorV3One& creator, nvinfer1::IPluginV3& plugin, skipcat::Op const& op,
    skipcat::Problem const& problem, Report& report)
{
    auto* const fields = runtimeOf(plugin)->getFieldsToSerialize();
    std::unique_ptr<nvinfer1::IPluginV3> const again(creator.createPlugin("layer", fields, TensorRTPhase::kRUNTIME));
    std::unique_ptr<nvinfer1::IPluginV3> const copy(plugin.clone());
    std::unique_ptr<nvinfer1::IPluginV3> const attached(runtimeOf(plugin)->attachToContext(nullptr));
    bool good = again != nullptr && copy != nullptr && attached != nullptr;
    for (auto const* other : {again.get(), copy.get(), attached.get()})
    {
        auto& mutableOther = const_cast<nvinfer1::IPluginV3&>(*other);
        good = good && std::strcmp(buildOf(mutableOther)->getTimingCacheID(), buildOf(plugin)->getTimingCacheID()) == 0
            && configure(mutableOther, describe(op, problem)) == 0;
    }
    report.check(op.name + " survives serialisation, clone and attaching to a context", good);
}

void checkTactics(nvinfer1::IPluginV3& plugin, skipcat::Op const& op, Report& report)
{
    int32_t const count = buildOf(plugin)->getNbTactics();
    std::vector<int32_t> tactics(static_cast<size_t>(count), 0);
    bool good = count > 0 && buildOf(plugin)->getValidTactics(tactics.data(), count) == 0;
    for (int32_t const tactic : tactics)
    {
        good = good && tactic > 0 && runtimeOf(plugin)->setTactic(tactic) == 0;
    }
    good = good && runtimeOf(plugin)->setTactic(0) == 0 && runtimeOf(plugin)->setTactic(count + 1) != 0;
    report.check(op.name + " takes its tactics and no others", good, std::to_string(count) + " tactics");
}

} // namespace

void checkInterface(Creators const& creators, Logger& logger, Report& report)
{
    std::vector<skipcat::Op> const& ops = skipcat::blockSkipOps();
    report.check("there are twenty creators of block skip", creators.size() == ops.size() && ops.size() == 20);
    for (size_t i = 0; i < creators.size() && i < ops.size(); ++i)
    {
        skipcat::Op const& op = ops[i];
        nvinfer1::IPluginCreatorV3One& creator = *creators[i];
        report.check(op.name + " is found by name, version and namespace",
            creator.getPluginName() == op.name
                && std::strcmp(creator.getPluginVersion(), skipcat::kVersion) == 0
                && std::strcmp(creator.getPluginNamespace(), skipcat::kNamespace) == 0);
        report.check(op.name + " names its fields",
            creator.getFieldNames() != nullptr && creator.getFieldNames()->nbFields == (op.aBits > 0) + (op.bBits > 0));
        checkFields(creator, op, logger, report);
        // Blocks of their own, and one scale to a column.
        for (skipcat::Blocks const& blocks : {skipcat::Blocks{32, 16}, skipcat::Blocks{112, 48}})
        {
            skipcat::Problem const problem = problemOf(op, blocks, 6, 100, 33, 51);
            std::unique_ptr<nvinfer1::IPluginV3> const plugin(make(creator, op, blocks));
            report.check(op.name + " is made", plugin != nullptr);
            if (plugin == nullptr)
            {
                continue;
            }
            checkShapes(*plugin, op, problem, report);
            checkFormats(*plugin, op, problem, report);
            checkMisfits(*plugin, op, problem, logger, report);
            checkCopies(creator, *plugin, op, problem, report);
            checkTactics(*plugin, op, report);
        }
    }
}

} // namespace harness
