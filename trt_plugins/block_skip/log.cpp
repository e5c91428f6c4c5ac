#include "log.h"

#include <atomic>
#include <cstdio>

namespace skipcat
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

} // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder = finder;
}

void logError(char const* name, std::string const& message) noexcept
{
    std::string const line = std::string("skipcat::") + name + ": " + message;
    nvinfer1::ILoggerFinder* const finder = gFinder;
    nvinfer1::ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
        return;
    }
    std::fprintf(stderr, "%s\n", line.c_str());
}

} // namespace skipcat
