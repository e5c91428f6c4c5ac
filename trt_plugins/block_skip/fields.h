// Fields that every creator of ours is given by a parser.

#ifndef SKIPCAT_FIELDS_H
#define SKIPCAT_FIELDS_H

#include <string>

#include "NvInfer.h"

namespace skipcat
{

// Whether a field is one of the attributes that lead a parser here; `refusal` says if it leads elsewhere.
bool isOurs(nvinfer1::PluginField const& field, std::string& refusal);

// Why an op without fields of its own refuses these; empty when it does not.
std::string whyNoFields(nvinfer1::PluginFieldCollection const* fields);

} // namespace skipcat

#endif
