// The harness: a host program with no TensorRT in it that treats the built library as TensorRT would.

#ifndef SKIPCAT_HARNESS_H
#define SKIPCAT_HARNESS_H

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "NvInfer.h"

#include "plugin.h"

namespace harness
{

// What was looked at, and what was seen.
class Report
{
public:
    void check(std::string const& what, bool good, std::string const& observed = "")
    {
        mRows.push_back({what, good, observed});
        mFailures += good ? 0 : 1;
        if (!good || !observed.empty())
        {
            std::printf("%s %s%s%s\n", good ? "ok  " : "FAIL", what.c_str(), observed.empty() ? "" : ": ", observed.c_str());
        }
    }

    int failures() const
    {
        return mFailures;
    }

    int checks() const
    {
        return static_cast<int>(mRows.size());
    }

    // Writes {"schema": 1, "checks": [{"what", "good", "observed"}]}; false when it cannot.
    bool write(char const* path, char const* enqueue) const;

private:
    struct Row
    {
        std::string what;
        bool good;
        std::string observed;
    };

    std::vector<Row> mRows;
    int mFailures{0};
};

// Keeps what the library logs, so that refusals can be read.
class Logger : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        (void) severity;
        last = message;
    }

    nvinfer1::ILogger* findLogger() override
    {
        return this;
    }

    std::string last;
};

using Creators = std::vector<nvinfer1::IPluginCreatorV3One*>;

// A plugin of a creator, given the blocks that its op has.
nvinfer1::IPluginV3* make(nvinfer1::IPluginCreatorV3One& creator, skipcat::Op const& op, skipcat::Blocks const& blocks);

// A problem of an op, its codes in such blocks; without a, n becomes the rank.
skipcat::Problem problemOf(skipcat::Op const& op, skipcat::Blocks const& blocks, int32_t rows, int32_t n, int32_t rank,
    int32_t m);

// A linear tensor of these dimensions.
nvinfer1::PluginTensorDesc tensor(std::vector<int32_t> const& dims, nvinfer1::DataType type);

// The same tensors as a builder describes them, of one shape each.
std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(std::vector<nvinfer1::PluginTensorDesc> const& tensors);

// Gives a plugin its inputs, and behind them its output, as a builder and as a runtime; what both answer, or 1.
int32_t configure(nvinfer1::IPluginV3& plugin, std::vector<nvinfer1::PluginTensorDesc> const& tensors);

// The tensors of a call: inputs in order, then the output.
std::vector<nvinfer1::PluginTensorDesc> describe(skipcat::Op const& op, skipcat::Problem const& problem);

// Everything up to enqueue, without a device.
void checkInterface(Creators const& creators, Logger& logger, Report& report);

// Every node of a file (nodes.cpp says how it is written) becomes a plugin that takes its tensors; false when the
// file cannot be read.
bool checkNodes(Creators const& creators, char const* path, Logger& logger, Report& report);

// enqueue itself, eager, captured and in two contexts at once, against double precision.
void checkEnqueue(Creators const& creators, Report& report, unsigned seed);

// The same of the ops of latent attention (../latent_attention/harness).
void checkLatentInterface(Creators const& creators, Logger& logger, Report& report);
void checkLatentEnqueue(Creators const& creators, Report& report, unsigned seed);

// And of writing the cache (../cache_write/harness).
void checkCacheWriteInterface(Creators const& creators, Logger& logger, Report& report);
void checkCacheWriteEnqueue(Creators const& creators, Report& report, unsigned seed);

template <typename Interface>
Interface* capability(nvinfer1::IPluginV3& plugin, nvinfer1::PluginCapabilityType type)
{
    return static_cast<Interface*>(plugin.getCapabilityInterface(type));
}

inline nvinfer1::IPluginV3OneBuild* buildOf(nvinfer1::IPluginV3& plugin)
{
    return capability<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
}

inline nvinfer1::IPluginV3OneRuntime* runtimeOf(nvinfer1::IPluginV3& plugin)
{
    return capability<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
}

} // namespace harness

#endif
