// Which ops there are, and their names.

#include "latent_plugin.h"

namespace skipcat::latent
{

std::string LatentOp::name() const
{
    auto const part = [](char const* side, Form form)
    { return form == Form::kNumbers ? std::string() : side + std::to_string(static_cast<int32_t>(form)); };
    return std::string("LatentAttention") + (rebuilt ? "Rebuilt" : "") + part("Keys", keys) + part("Values", values);
}

std::vector<LatentOp> latentOps()
{
    std::vector<LatentOp> ops;
    for (bool const rebuilt : {false, true})
    {
        for (Form const keys : {Form::kNumbers, Form::kBytes, Form::kNibbles})
        {
            for (Form const values : {Form::kNumbers, Form::kBytes, Form::kNibbles})
            {
                ops.push_back({rebuilt, keys, values});
            }
        }
    }
    return ops;
}

} // namespace skipcat::latent
