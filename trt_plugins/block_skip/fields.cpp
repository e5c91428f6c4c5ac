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

} // namespace skipcat
