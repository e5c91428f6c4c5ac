// Loads the plugin library and walks its interface as TensorRT would, without TensorRT.
//
//     harness LIBRARY [--json FILE] [--seed N] [--nodes FILE]
//
// Exit status 0: all is well (with no CUDA device, all up to enqueue); 1: something is not; 2: usage.

#include "harness.h"

#include <cstdlib>
#include <cstring>
#include <ctime>

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "latent_plugin.h"

namespace
{

std::string escaped(std::string const& text)
{
    std::string result;
    for (char const c : text)
    {
        if (c == '"' || c == '\\')
        {
            result += '\\';
        }
        result += c == '\n' ? ' ' : c;
    }
    return result;
}

struct Options
{
    char const* library{nullptr};
    char const* json{nullptr};
    char const* nodes{nullptr};
    unsigned seed{static_cast<unsigned>(std::time(nullptr))};
};

bool read(int argc, char** argv, Options& options)
{
    for (int i = 1; i < argc; ++i)
    {
        bool const hasValue = i + 1 < argc;
        if (std::strcmp(argv[i], "--json") == 0 && hasValue)
        {
            options.json = argv[++i];
        }
        else if (std::strcmp(argv[i], "--nodes") == 0 && hasValue)
        {
            options.nodes = argv[++i];
        }
        else if (std::strcmp(argv[i], "--seed") == 0 && hasValue)
        {
            options.seed = static_cast<unsigned>(std::strtoul(argv[++i], nullptr, 10));
        }
        else if (argv[i][0] != '-' && options.library == nullptr)
        {
            options.library = argv[i];
        }
        else
        {
            return false;
        }
    }
    return options.library != nullptr;
}

bool loadCreators(char const* path, harness::Logger& logger, harness::Creators& creators)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        std::fprintf(stderr, "%s cannot be loaded: %s\n", path, dlerror());
        return false;
    }
    using SetFinder = void (*)(nvinfer1::ILoggerFinder*);
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
    auto const setFinder = reinterpret_cast<SetFinder>(dlsym(library, "setLoggerFinder"));
    auto const getCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    if (setFinder == nullptr || getCreators == nullptr)
    {
        std::fprintf(stderr, "%s exports no setLoggerFinder or no getCreators\n", path);
        return false;
    }
    setFinder(&logger);
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const found = getCreators(count);
    for (int32_t i = 0; i < count; ++i)
    {
        creators.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(found[i]));
    }
    return true;
}

} // namespace

bool harness::Report::write(char const* path, char const* enqueue) const
{
    std::FILE* const file = std::fopen(path, "w");
    if (file == nullptr)
    {
        return false;
    }
    std::fprintf(file, "{\"schema\": 1, \"enqueue\": \"%s\", \"failures\": %d, \"checks\": [", enqueue, mFailures);
    for (size_t i = 0; i < mRows.size(); ++i)
    {
        std::fprintf(file, "%s\n  {\"what\": \"%s\", \"good\": %s, \"observed\": \"%s\"}", i > 0 ? "," : "",
            escaped(mRows[i].what).c_str(), mRows[i].good ? "true" : "false", escaped(mRows[i].observed).c_str());
    }
    std::fprintf(file, "\n]}\n");
    return std::fclose(file) == 0;
}

int main(int argc, char** argv)
{
    Options options;
    if (!read(argc, argv, options))
    {
        std::fprintf(stderr, "usage: harness LIBRARY [--json FILE] [--seed N] [--nodes FILE]\n");
        return 2;
    }
    harness::Logger logger;
    harness::Creators creators;
    if (!loadCreators(options.library, logger, creators))
    {
        return 1;
    }
    harness::Report report;
    // In the order of exports.cpp.
    size_t taken = 0;
    auto const next = [&](size_t count)
    {
        auto const from = creators.begin() + static_cast<std::ptrdiff_t>(taken);
        taken = taken + count < creators.size() ? taken + count : creators.size();
        return harness::Creators(from, creators.begin() + static_cast<std::ptrdiff_t>(taken));
    };
    harness::Creators const blockSkip = next(skipcat::blockSkipOps().size());
    harness::Creators const latent = next(skipcat::latent::latentOps().size());
    harness::Creators const cacheWrite = next(creators.size());
    harness::checkInterface(blockSkip, logger, report);
    harness::checkLatentInterface(latent, logger, report);
    harness::checkCacheWriteInterface(cacheWrite, logger, report);
    if (options.nodes != nullptr && !harness::checkNodes(creators, options.nodes, logger, report))
    {
        std::fprintf(stderr, "%s cannot be read\n", options.nodes);
        return 1;
    }
    int devices = 0;
    bool const hasDevice = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
    if (hasDevice)
    {
        std::printf("seed %u\n", options.seed);
        harness::checkEnqueue(blockSkip, report, options.seed);
        harness::checkLatentEnqueue(latent, report, options.seed);
        harness::checkCacheWriteEnqueue(cacheWrite, report, options.seed);
    }
    char const* const enqueue = hasDevice ? "run" : "not run, no CUDA device";
    std::printf("enqueue: %s\n%d checks, %d failed\n", enqueue, report.checks(), report.failures());
    if (options.json != nullptr && !report.write(options.json, enqueue))
    {
        std::fprintf(stderr, "%s cannot be written\n", options.json);
        return 1;
    }
    return report.failures() == 0 ? 0 : 1;
}
