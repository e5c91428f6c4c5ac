// Messages go to TensorRT's logger once it has lent us one, and to stderr before.

#ifndef SKIPCAT_LOG_H
#define SKIPCAT_LOG_H

#include <string>

#include "NvInfer.h"

namespace skipcat
{

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// "skipcat::NAME: MESSAGE"
void logError(char const* name, std::string const& message) noexcept;

} // namespace skipcat

#endif
