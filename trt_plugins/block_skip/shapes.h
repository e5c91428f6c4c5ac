// From the tensors TensorRT names to the problem the kernels know, or to why there is none.

#ifndef SKIPCAT_SHAPES_H
#define SKIPCAT_SHAPES_H

#include <string>

#include "plugin.h"

namespace skipcat
{

// The problem of these input dimensions. `refusal` says what does not fit, and is empty if all does.
Problem problemOf(Op const& op, Blocks const& blocks, nvinfer1::DataType type, nvinfer1::Dims const* inputs,
    std::string& refusal);

// "[3, 4]"
std::string text(nvinfer1::Dims const& dims);

} // namespace skipcat

#endif
