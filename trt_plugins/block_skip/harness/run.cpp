// Checks that need a device: the numbers.

#include "harness.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

namespace harness
{

nvinfer1::IPluginV3* make(nvinfer1::IPluginCreatorV3One& creator, skipcat::Op const& op, skipcat::Blocks const& blocks)
{
    std::vector<nvinfer1::PluginField> const fields = skipcat::fieldsOf(op, blocks);
    nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator.createPlugin("layer", &collection, nvinfer1::TensorRTPhase::kBUILD);
}

skipcat::Problem problemOf(
    skipcat::Op const& op, skipcat::Blocks const& blocks, int32_t rows, int32_t n, int32_t rank, int32_t m)
{
    skipcat::Problem problem;
    problem.rows = rows;
    problem.n = op.mixes ? n : rank;
    problem.rank = rank;
    problem.m = m;
    problem.a = {static_cast<skipcat::WeightType>(op.aBits), op.aBits > 0 ? blocks.a : 0};
    problem.b = {static_cast<skipcat::WeightType>(op.bBits), op.bBits > 0 ? blocks.b : 0};
    problem.indexed = op.indexed;
    return problem;
}

nvinfer1::PluginTensorDesc tensor(std::vector<int32_t> const& dims, nvinfer1::DataType type)
{
    nvinfer1::PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<int32_t>(dims.size());
    for (size_t i = 0; i < dims.size(); ++i)
    {
        desc.dims.d[i] = dims[i];
    }
    desc.type = type;
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    desc.scale = 1.0f;
    return desc;
}

std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(std::vector<nvinfer1::PluginTensorDesc> const& tensors)
{
    std::vector<nvinfer1::DynamicPluginTensorDesc> out;
    for (auto const& one : tensors)
    {
        out.push_back({one, one.dims, one.dims, one.dims});
    }
    return out;
}

int32_t configure(nvinfer1::IPluginV3& plugin, std::vector<nvinfer1::PluginTensorDesc> const& tensors)
{
    auto const ranges = dynamic(tensors);
    int32_t const inputs = static_cast<int32_t>(tensors.size()) - 1;
    int32_t const built = buildOf(plugin)->configurePlugin(ranges.data(), inputs, &ranges.back(), 1);
    int32_t const run = runtimeOf(plugin)->onShapeChange(tensors.data(), inputs, &tensors.back(), 1);
    return built == run ? built : 1;
}

std::vector<nvinfer1::PluginTensorDesc> describe(skipcat::Op const& op, skipcat::Problem const& problem)
{
    nvinfer1::DataType const type
        = problem.type == skipcat::Float::kFP16 ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kBF16;
    std::vector<nvinfer1::PluginTensorDesc> tensors{tensor({problem.rows, 1, problem.n}, type)};
    auto const matrix = [&](skipcat::WeightFormat const& format, int32_t rows, int32_t columns)
    {
        bool const numbers = format.type == skipcat::WeightType::kFloat;
        int32_t const stored = format.type == skipcat::WeightType::kInt4 ? (columns + 1) / 2 : columns;
        tensors.push_back(tensor({rows, stored}, numbers ? type : nvinfer1::DataType::kINT8));
        if (!numbers)
        {
            tensors.push_back(tensor({(rows + format.groupSize - 1) / format.groupSize, columns}, type));
        }
    };
    if (op.mixes)
    {
        matrix(problem.a, problem.n - problem.rank, problem.rank);
    }
    matrix(problem.b, problem.rank, problem.m);
    if (op.indexed)
    {
        tensors.push_back(tensor({problem.n}, nvinfer1::DataType::kINT32));
    }
    tensors.push_back(tensor({problem.rows, 1, problem.m}, type));
    return tensors;
}

namespace
{

// Numbers of one tensor: what lies in device memory, and what it stands for.
struct Tensor
{
    std::vector<unsigned char> bytes;
    std::vector<double> values;
    void* device{nullptr};

    void upload()
    {
        if (cudaMalloc(&device, std::max<size_t>(bytes.size(), 1)) != cudaSuccess
            || cudaMemcpy(device, bytes.data(), bytes.size(), cudaMemcpyHostToDevice) != cudaSuccess)
        {
            std::fprintf(stderr, "device memory: %s\n", cudaGetErrorString(cudaGetLastError()));
            std::exit(1);
        }
    }

    ~Tensor()
    {
        cudaFree(device);
    }
};

void append(Tensor& tensor, double value, skipcat::Float type)
{
    uint16_t bits = 0;
    if (type == skipcat::Float::kFP16)
    {
        __half const number = __float2half_rn(static_cast<float>(value));
        bits = reinterpret_cast<uint16_t const&>(number);
        tensor.values.push_back(__half2float(number));
    }
    else
    {
        __nv_bfloat16 const number = __float2bfloat16_rn(static_cast<float>(value));
        bits = reinterpret_cast<uint16_t const&>(number);
        tensor.values.push_back(__bfloat162float(number));
    }
    tensor.bytes.push_back(static_cast<unsigned char>(bits & 255));
    tensor.bytes.push_back(static_cast<unsigned char>(bits >> 8));
}

double decoded(unsigned char const* bytes, skipcat::Float type)
{
    uint16_t const bits = static_cast<uint16_t>(bytes[0] | bytes[1] << 8);
    return type == skipcat::Float::kFP16 ? __half2float(reinterpret_cast<__half const&>(bits))
                                         : __bfloat162float(reinterpret_cast<__nv_bfloat16 const&>(bits));
}

void fillFloats(Tensor& tensor, size_t count, double scale, skipcat::Float type, std::mt19937& random)
{
    std::normal_distribution<double> normal(0.0, scale);
    for (size_t i = 0; i < count; ++i)
    {
        append(tensor, normal(random), type);
    }
}

// Random codes, and as `values` the numbers they stand for.
void fillCodes(Tensor& codes, Tensor& scales, int rows, int columns, skipcat::WeightFormat const& format,
    skipcat::Float type, std::mt19937& random)
{
    int const groups = (rows + format.groupSize - 1) / format.groupSize;
    for (int i = 0; i < groups * columns; ++i)
    {
        append(scales, 0.001 + 0.001 * static_cast<double>(random() % 100) / 100.0, type);
    }
    bool const four = format.type == skipcat::WeightType::kInt4;
    codes.bytes.assign(static_cast<size_t>(rows) * (four ? (columns + 1) / 2 : columns), 0);
    for (int k = 0; k < rows; ++k)
    {
        for (int j = 0; j < columns; ++j)
        {
            int const code = four ? static_cast<int>(random() % 16) - 8 : static_cast<int>(random() % 255) - 127;
            size_t const at = static_cast<size_t>(k) * (four ? (columns + 1) / 2 : columns) + (four ? j / 2 : j);
            codes.bytes[at] = static_cast<unsigned char>(
                four ? codes.bytes[at] | (code & 15) << (j % 2 * 4) : static_cast<uint8_t>(static_cast<int8_t>(code)));
            codes.values.push_back(code * scales.values[static_cast<size_t>(k / format.groupSize) * columns + j]);
        }
    }
}

// One problem with its data on the device.
struct Layer
{
    Layer(skipcat::Op const& op, skipcat::Problem const& p, std::mt19937& random)
        : op(op)
        , problem(p)
        , tensors(static_cast<size_t>(op.inputs()) + 1)
    {
        fillFloats(tensors[0], static_cast<size_t>(p.rows) * p.n, 1.0, p.type, random);
        if (op.mixes)
        {
            fill(op.a(), op.aScale(), p.n - p.rank, p.rank, p.a, random);
        }
        fill(op.b(), op.bScale(), p.rank, p.m, p.b, random);
        order.resize(static_cast<size_t>(p.n));
        for (int j = 0; j < p.n; ++j)
        {
            order[static_cast<size_t>(j)] = j;
        }
        if (op.indexed)
        {
            std::shuffle(order.begin(), order.end(), random);
            auto const* const bytes = reinterpret_cast<unsigned char const*>(order.data());
            tensors[static_cast<size_t>(op.index())].bytes.assign(bytes, bytes + order.size() * 4);
        }
        tensors.back().bytes.assign(static_cast<size_t>(p.rows) * p.m * 2, 0xff);
        for (Tensor& tensor : tensors)
        {
            tensor.upload();
        }
    }

    void fill(int32_t place, int32_t scalePlace, int rows, int columns, skipcat::WeightFormat const& format,
        std::mt19937& random)
    {
        Tensor& stored = tensors[static_cast<size_t>(place)];
        if (scalePlace < 0)
        {
            fillFloats(stored, static_cast<size_t>(rows) * columns, 0.05, problem.type, random);
            return;
        }
        fillCodes(stored, tensors[static_cast<size_t>(scalePlace)], rows, columns, format, problem.type, random);
    }

    int32_t enqueue(nvinfer1::IPluginV3& plugin, void* workspace, cudaStream_t stream)
    {
        std::vector<nvinfer1::PluginTensorDesc> const descs = describe(op, problem);
        std::vector<void const*> inputs;
        for (int32_t i = 0; i < op.inputs(); ++i)
        {
            inputs.push_back(tensors[static_cast<size_t>(i)].device);
        }
        void* outputs[] = {tensors.back().device};
        return runtimeOf(plugin)->enqueue(descs.data(), &descs.back(), inputs.data(), outputs, workspace, stream);
    }

    void poison()
    {
        cudaMemset(tensors.back().device, 0xff, tensors.back().bytes.size());
    }

    double relativeError()
    {
        Tensor& y = tensors.back();
        cudaMemcpy(y.bytes.data(), y.device, y.bytes.size(), cudaMemcpyDeviceToHost);
        std::vector<double> const& a = tensors[static_cast<size_t>(op.mixes ? op.a() : op.b())].values;
        std::vector<double> const& b = tensors[static_cast<size_t>(op.b())].values;
        double error = 0.0;
        double norm = 0.0;
        std::vector<double> z(static_cast<size_t>(problem.rank));
        // All rows of a large problem would take the CPU minutes.
        int const step = std::max(1, problem.rows / 64);
        for (int row = 0; row < problem.rows; row += step)
        {
            double const* const x = tensors[0].values.data() + static_cast<size_t>(row) * problem.n;
            for (int j = 0; j < problem.rank; ++j)
            {
                z[j] = x[order[j]];
            }
            for (int k = 0; k < problem.n - problem.rank; ++k)
            {
                for (int j = 0; j < problem.rank; ++j)
                {
                    z[j] += x[order[problem.rank + k]] * a[static_cast<size_t>(k) * problem.rank + j];
                }
            }
            std::vector<double> exact(static_cast<size_t>(problem.m), 0.0);
            for (int k = 0; k < problem.rank; ++k)
            {
                for (int j = 0; j < problem.m; ++j)
                {
                    exact[j] += z[k] * b[static_cast<size_t>(k) * problem.m + j];
                }
            }
            for (int j = 0; j < problem.m; ++j)
            {
                double const got
                    = decoded(&y.bytes[(static_cast<size_t>(row) * problem.m + j) * 2], problem.type);
                error += (got - exact[j]) * (got - exact[j]);
                norm += exact[j] * exact[j];
            }
        }
        return std::sqrt(error / norm);
    }

    skipcat::Op op;
    skipcat::Problem problem;
    std::vector<Tensor> tensors;
    std::vector<int32_t> order;
};

size_t workspaceOf(nvinfer1::IPluginV3& plugin, Layer const& layer)
{
    auto const ranges = dynamic(describe(layer.op, layer.problem));
    return buildOf(plugin)->getWorkspaceSize(ranges.data(), layer.op.inputs(), &ranges.back(), 1);
}

// A plugin attached to a context of its own, with its stream and scratch memory.
struct Context
{
    Context(nvinfer1::IPluginV3& built, Layer& layer, int32_t tactic)
        : plugin(runtimeOf(built)->attachToContext(nullptr))
    {
        auto const descs = describe(layer.op, layer.problem);
        good = runtimeOf(*plugin)->setTactic(tactic) == 0
            && runtimeOf(*plugin)->onShapeChange(descs.data(), layer.op.inputs(), &descs.back(), 1) == 0
            && cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess
            && cudaMalloc(&workspace, workspaceOf(built, layer)) == cudaSuccess
            && cudaMemset(workspace, 0xff, workspaceOf(built, layer)) == cudaSuccess;
    }

    ~Context()
    {
        cudaFree(workspace);
        cudaStreamDestroy(stream);
    }

    std::unique_ptr<nvinfer1::IPluginV3> plugin;
    cudaStream_t stream{nullptr};
    void* workspace{nullptr};
    bool good{false};
};

bool replayed(Context& context, Layer& layer)
{
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    bool good = cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess
        && layer.enqueue(*context.plugin, context.workspace, context.stream) == 0
        && cudaStreamEndCapture(context.stream, &graph) == cudaSuccess
        && cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess;
    for (int i = 0; good && i < 3; ++i)
    {
        good = cudaGraphLaunch(executable, context.stream) == cudaSuccess;
    }
    good = good && cudaStreamSynchronize(context.stream) == cudaSuccess;
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    return good;
}

void checkLayer(nvinfer1::IPluginCreatorV3One& creator, skipcat::Op const& op, skipcat::Problem const& problem,
    int32_t tactic, std::mt19937& random, Report& report)
{
    std::unique_ptr<nvinfer1::IPluginV3> const built(
        make(creator, op, {problem.a.groupSize, problem.b.groupSize}));
    Layer first(op, problem, random);
    Layer second(op, problem, random);
    Context one(*built, first, tactic);
    Context two(*built, second, tactic);
    double const bound = problem.type == skipcat::Float::kFP16 ? 1e-3 : 1e-2;
    char name[160];
    std::snprintf(name, sizeof(name), "%s %s blocks %d %d rows %d n %d rank %d m %d tactic %d", op.name.c_str(),
        problem.type == skipcat::Float::kFP16 ? "fp16" : "bf16", problem.a.groupSize, problem.b.groupSize, problem.rows,
        problem.n, problem.rank, problem.m, tactic);
    bool good = one.good && two.good;
    // Both at once, several times: what they share would show.
    for (int i = 0; good && i < 3; ++i)
    {
        good = first.enqueue(*one.plugin, one.workspace, one.stream) == 0
            && second.enqueue(*two.plugin, two.workspace, two.stream) == 0;
    }
    good = good && cudaDeviceSynchronize() == cudaSuccess;
    double const eager = std::max(first.relativeError(), second.relativeError());
    first.poison();
    cudaDeviceSynchronize();
    good = good && replayed(one, first);
    double const captured = first.relativeError();
    char observed[80];
    std::snprintf(observed, sizeof(observed), "relative error %.2e, captured %.2e", eager, captured);
    report.check(name, good && eager <= bound && captured <= bound, observed);
}

} // namespace

void checkEnqueue(Creators const& creators, Report& report, unsigned seed)
{
    std::mt19937 random(seed);
    struct Size
    {
        int rows, n, rank, m;
    };
    Size const sizes[] = {{1, 2048, 1024, 2048}, {1, 4096, 1536, 4096}, {1, 517, 133, 259}, {3, 100, 33, 51},
        {8, 1536, 1536, 576}, {9, 640, 200, 320}, {64, 576, 264, 960}, {100, 333, 101, 77}, {2048, 512, 200, 384},
        {4096, 256, 97, 129}, {1, 1, 1, 1}};
    for (size_t i = 0; i < creators.size(); ++i)
    {
        skipcat::Op const& op = skipcat::blockSkipOps()[i];
        for (Size const& size : sizes)
        {
            for (skipcat::Float const type : {skipcat::Float::kFP16, skipcat::Float::kBF16})
            {
                skipcat::Blocks const blocks{random() % 2 == 0 ? 32 : 4096, random() % 2 == 0 ? 64 : 4096};
                skipcat::Problem problem = problemOf(op, blocks, size.rows, size.n, size.rank, size.m);
                problem.type = type;
                int32_t const tactic = static_cast<int32_t>(random() % (skipcat::kTactics + 1));
                checkLayer(*creators[i], op, problem, tactic, random, report);
            }
        }
    }
}

} // namespace harness
