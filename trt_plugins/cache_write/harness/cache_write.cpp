// The op that writes the cache in the harness: the interface without a device, and the bytes on one.

#include "harness/harness.h"

#include <cstring>
#include <memory>
#include <random>

#include <cuda_runtime_api.h>

#include "cache_write_plugin.h"

namespace harness
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;
using skipcat::cache::kFirst;
using skipcat::cache::kInputs;
using skipcat::cache::kNew;
using skipcat::cache::kPast;

// Past, new, first and present.
std::vector<PluginTensorDesc> example(DataType type)
{
    return {tensor({2, 3, 40, 20}, type), tensor({2, 3, 7, 20}, type), tensor({2}, DataType::kINT32),
        tensor({2, 3, 40, 20}, type)};
}

void checkTypes(nvinfer1::IPluginV3& plugin, Report& report)
{
    bool good = true;
    for (DataType const past : {DataType::kHALF, DataType::kBF16, DataType::kFLOAT, DataType::kINT8, DataType::kINT32})
    {
        bool const known = past != DataType::kINT32;
        for (int32_t place = 0; place <= kInputs; ++place)
        {
            for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32})
            {
                auto tried = dynamic(example(past));
                tried[static_cast<size_t>(place)].desc.type = type;
                bool const expected = place == kFirst ? type == DataType::kINT32
                    : place == kPast                  ? type != DataType::kINT32
                                                      : type == past;
                auto* const build = buildOf(plugin);
                good = good && (!known || build->supportsFormatCombination(place, tried.data(), kInputs, 1) == expected);
                tried[static_cast<size_t>(place)].desc.format = nvinfer1::TensorFormat::kCHW4;
                good = good && !build->supportsFormatCombination(place, tried.data(), kInputs, 1);
            }
        }
    }
    report.check("CacheWrite takes its types, linear, and no others", good);
}

void checkMisfits(nvinfer1::IPluginV3& plugin, Logger& logger, Report& report)
{
    auto const good = example(DataType::kHALF);
    report.check("CacheWrite takes shapes that fit", configure(plugin, good) == 0);
    for (auto const& [place, axis] : {std::pair{kNew, 0}, {kNew, 1}, {kNew, 3}, {kFirst, 0}, {kPast, 3}})
    {
        auto wrong = good;
        wrong[static_cast<size_t>(place)].dims.d[axis] += 1;
        logger.last.clear();
        bool const refused = configure(plugin, wrong) == -1 && logger.last.find("expected") != std::string::npos;
        report.check("CacheWrite refuses a misfit in axis " + std::to_string(axis) + " of input " + std::to_string(place),
            refused, refused ? "" : "logged '" + logger.last + "'");
    }
    auto wrong = good;
    wrong[kNew].dims.d[2] = 41;
    report.check("CacheWrite refuses more tokens than slots", configure(plugin, wrong) == -1);
}

// The builder asks for aliases through the second version of the interface alone.
void checkAlias(nvinfer1::IPluginV3& plugin, Report& report)
{
    auto* const build = buildOf(plugin);
    bool const second = build->getInterfaceInfo().major == 2;
    auto* const aliasing = static_cast<nvinfer1::IPluginV3OneBuildV2*>(build);
    report.check("CacheWrite's output is an alias of the cache, and there is no other",
        second && aliasing->getAliasedInput(0) == kPast && aliasing->getAliasedInput(1) == -1);
}

void checkCopies(nvinfer1::IPluginCreatorV3One& creator, nvinfer1::IPluginV3& plugin, Report& report)
{
    auto* const fields = runtimeOf(plugin)->getFieldsToSerialize();
    std::unique_ptr<nvinfer1::IPluginV3> const again(
        creator.createPlugin("layer", fields, nvinfer1::TensorRTPhase::kRUNTIME));
    std::unique_ptr<nvinfer1::IPluginV3> const copy(plugin.clone());
    std::unique_ptr<nvinfer1::IPluginV3> const attached(runtimeOf(plugin)->attachToContext(nullptr));
    bool good = true;
    for (auto* const other : {again.get(), copy.get(), attached.get()})
    {
        good = good && other != nullptr && configure(*other, example(DataType::kINT8)) == 0;
    }
    report.check("CacheWrite survives serialisation, clone and attaching to a context", good);
}

// Device memory with bytes in it.
class OnDevice
{
public:
    explicit OnDevice(std::vector<unsigned char> const& bytes)
        : size(bytes.size())
    {
        good = cudaMalloc(&memory, size) == cudaSuccess
            && cudaMemcpy(memory, bytes.data(), size, cudaMemcpyHostToDevice) == cudaSuccess;
    }

    ~OnDevice()
    {
        cudaFree(memory);
    }

    std::vector<unsigned char> read() const
    {
        std::vector<unsigned char> bytes(size);
        cudaMemcpy(bytes.data(), memory, size, cudaMemcpyDeviceToHost);
        return bytes;
    }

    size_t size;
    void* memory{nullptr};
    bool good{false};
};

std::vector<unsigned char> randomBytes(size_t count, std::mt19937& random)
{
    std::vector<unsigned char> bytes(count);
    for (unsigned char& byte : bytes)
    {
        byte = static_cast<unsigned char>(random());
    }
    return bytes;
}

// In place, or with an output of its own; whether every byte is as it should be.
bool writesOnDevice(nvinfer1::IPluginV3& plugin, DataType type, size_t item, bool inPlace, std::mt19937& random)
{
    auto const tensors = example(type);
    size_t const row = 20 * item;
    auto const past = randomBytes(2 * 3 * 40 * row, random);
    auto const fresh = randomBytes(2 * 3 * 7 * row, random);
    int32_t const first[] = {static_cast<int32_t>(random() % 34), static_cast<int32_t>(random() % 34)};
    auto expected = past;
    for (size_t i = 0; i < 2 * 3 * 7; ++i)
    {
        size_t const head = i / 7;
        size_t const slot = static_cast<size_t>(first[head / 3]) + i % 7;
        std::memcpy(expected.data() + (head * 40 + slot) * row, fresh.data() + i * row, row);
    }
    auto const* const starts = reinterpret_cast<unsigned char const*>(first);
    OnDevice const cache(past), added(fresh), places({starts, starts + sizeof(first)}), apart(randomBytes(past.size(), random));
    void const* const inputs[] = {cache.memory, added.memory, places.memory};
    void* outputs[] = {inPlace ? cache.memory : apart.memory};
    bool const ran = cache.good && added.good && places.good && apart.good && configure(plugin, tensors) == 0
        && runtimeOf(plugin)->enqueue(tensors.data(), &tensors.back(), inputs, outputs, nullptr, nullptr) == 0
        && cudaDeviceSynchronize() == cudaSuccess;
    return ran && (inPlace ? cache : apart).read() == expected && (inPlace || cache.read() == past);
}

std::unique_ptr<nvinfer1::IPluginV3> made(nvinfer1::IPluginCreatorV3One& creator)
{
    nvinfer1::PluginFieldCollection const none{0, nullptr};
    return std::unique_ptr<nvinfer1::IPluginV3>(
        creator.createPlugin("layer", &none, nvinfer1::TensorRTPhase::kBUILD));
}

} // namespace

void checkCacheWriteInterface(Creators const& creators, Logger& logger, Report& report)
{
    report.check("there is a creator for the op that writes the cache", creators.size() == 1);
    if (creators.size() != 1)
    {
        return;
    }
    nvinfer1::IPluginCreatorV3One& creator = *creators[0];
    report.check("CacheWrite is found by name, version and namespace",
        std::strcmp(creator.getPluginName(), "CacheWrite") == 0 && std::strcmp(creator.getPluginVersion(), "1") == 0
            && std::strcmp(creator.getPluginNamespace(), "skipcat") == 0);
    int32_t const four = 4;
    nvinfer1::PluginField const wrong{"axis", &four, nvinfer1::PluginFieldType::kINT32, 1};
    nvinfer1::PluginFieldCollection const fields{1, &wrong};
    report.check("CacheWrite refuses a field",
        creator.createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
    auto const plugin = made(creator);
    report.check("CacheWrite is made", plugin != nullptr);
    if (plugin != nullptr)
    {
        checkAlias(*plugin, report);
        checkTypes(*plugin, report);
        checkMisfits(*plugin, logger, report);
        checkCopies(creator, *plugin, report);
    }
}

void checkCacheWriteEnqueue(Creators const& creators, Report& report, unsigned seed)
{
    std::mt19937 random(seed);
    auto const plugin = creators.empty() ? nullptr : made(*creators[0]);
    for (auto const& [type, item] :
        {std::pair{DataType::kHALF, size_t{2}}, {DataType::kFLOAT, size_t{4}}, {DataType::kINT8, size_t{1}}})
    {
        bool const good = plugin != nullptr && writesOnDevice(*plugin, type, item, true, random)
            && writesOnDevice(*plugin, type, item, false, random);
        report.check("CacheWrite writes " + std::to_string(item) + " bytes a number, in place and apart", good);
    }
}

} // namespace harness
