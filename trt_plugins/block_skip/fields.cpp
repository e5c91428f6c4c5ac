// The body of fields.h.

#include "fields.h"

#include <cstring>

#include "plugin.h"

namespace skipcat
{

// Parsers hand over the attributes that led them here; they must say what we are.
bool isOurs(nvinfer1::PluginField const& field, std::string& refusal)
{
    char const* const expected = std::strcmp(field.name, "plugin_namespace") == 0 ? kNamespace
        : std::strcmp(field.name, "plugin_version") == 0                         ? kVersion
                                                                                 : nullptr;
    if (expected == nullptr)
    {
        return false;
    }
    // Their length counts the closing zero in some versions, and not in others.
    std::string const observed(
        static_cast<char const*>(field.data), strnlen(static_cast<char const*>(field.data), field.length));
    if (observed != expected)
    {
        refusal = std::string(field.name) + " is '" + observed + "', expected '" + expected + "'";
    }
    return true;
}

std::string whyNoFields(nvinfer1::PluginFieldCollection const* fields)
{
    std::string refusal = fields == nullptr ? "no fields were given" : "";
    for (int32_t i = 0; refusal.empty() && i < fields->nbFields; ++i)
    {
        nvinfer1::PluginField const& field = fields->fields[i];
        if (field.name == nullptr)
        {
            refusal = "a field without a name";
        }
        else if (!isOurs(field, refusal) && refusal.empty())
        {
            refusal = std::string("there is no field '") + field.name + "'; it has none";
        }
    }
    return refusal;
}

} // namespace skipcat
