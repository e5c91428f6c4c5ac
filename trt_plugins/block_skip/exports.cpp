// What TensorRT looks for in a plugin library.

#include "creator.h"
#include "log.h"

#define SKIPCAT_EXPORT extern "C" __attribute__((visibility("default")))

SKIPCAT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    skipcat::setFinder(finder);
}

SKIPCAT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static skipcat::BlockSkipCreator plain(skipcat::kOps[0]);
    static skipcat::BlockSkipCreator indexed(skipcat::kOps[1]);
    static skipcat::BlockSkipCreator quantized(skipcat::kOps[2]);
    static skipcat::BlockSkipCreator quantizedIndexed(skipcat::kOps[3]);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&plain, &indexed, &quantized, &quantizedIndexed};
    count = static_cast<int32_t>(sizeof(creators) / sizeof(creators[0]));
    return creators;
}
