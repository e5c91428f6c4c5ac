// What TensorRT looks for in a plugin library.

#include <memory>
#include <vector>

#include "cache_write_plugin.h"
#include "creator.h"
#include "latent_plugin.h"
#include "log.h"

namespace
{

using Made = std::vector<std::unique_ptr<nvinfer1::IPluginCreatorInterface>>;

// Those of block skip, then those of latent attention, then that of writing the cache.
Made makeCreators()
{
    Made made;
    for (skipcat::Op const& op : skipcat::blockSkipOps())
    {
        made.push_back(std::make_unique<skipcat::BlockSkipCreator>(op));
    }
    for (skipcat::latent::LatentOp const& op : skipcat::latent::latentOps())
    {
        made.push_back(std::make_unique<skipcat::latent::LatentAttentionCreator>(op));
    }
    made.push_back(std::make_unique<skipcat::cache::CacheWriteCreator>());
    return made;
}

std::vector<nvinfer1::IPluginCreatorInterface*> pointersTo(Made const& made)
{
    std::vector<nvinfer1::IPluginCreatorInterface*> out;
    for (auto const& creator : made)
    {
        out.push_back(creator.get());
    }
    return out;
}

} // namespace

#define SKIPCAT_EXPORT extern "C" __attribute__((visibility("default")))

SKIPCAT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    skipcat::setFinder(finder);
}

SKIPCAT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static std::vector<std::unique_ptr<nvinfer1::IPluginCreatorInterface>> const made = makeCreators();
    static std::vector<nvinfer1::IPluginCreatorInterface*> const creators = pointersTo(made);
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}
