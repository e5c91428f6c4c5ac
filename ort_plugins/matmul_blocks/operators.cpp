// The operators MatMulBlocks..., as ONNX Runtime calls them.

#include "products.h"
#include "runtime_api.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace skipcat
{
namespace
{

// Inputs: x, codes, scales, then zeros, or rests and what sums the blocks in the body, then a bias.
struct Operator : CustomOp
{
    char const* name;
    bool zeros;
    bool rests;
    bool bias;

    size_t biasPlace() const
    {
        return 3 + (zeros ? 1 : 0) + (rests ? 2 : 0);
    }
};

Operator const& of(CustomOp const* op)
{
    return *static_cast<Operator const*>(op);
}

// Below so many products of codes, threads cost more than they give.
constexpr int64_t kWorthThreads = 1 << 17;
constexpr int64_t kRowsWorthThreads = 8;

// A node: its matrix, packed.
struct Kernel
{
    Api api;
    int64_t rows;
    int64_t columns;
    int64_t block;
    std::unique_ptr<Product> product;
    std::vector<float> bias;

    int64_t blocks() const
    {
        return (columns + block - 1) / block;
    }
};

// The data of an input that must be a constant of so many elements.
Status* constantData(Api const& api, KernelInfo const* info, size_t index, int64_t expected, void** data)
{
    int isConstant = 0;
    Value const* value = nullptr;
    if (Status* const status = api.constant(info, index, &isConstant, &value))
    {
        return status;
    }
    if (isConstant == 0)
    {
        return api.fail("skipcat: the matrix of MatMulBlocks must be an initializer");
    }
    ShapeInfo* shape = nullptr;
    if (Status* const status = api.shape(value, &shape))
    {
        return status;
    }
    size_t elements = 0;
    Status* const status = api.elements(shape, &elements);
    api.release(shape);
    if (status != nullptr)
    {
        return status;
    }
    if (static_cast<int64_t>(elements) != expected)
    {
        return api.fail("skipcat: the sizes of a matrix of MatMulBlocks are not those of its attributes");
    }
    return api.data(value, data);
}

Status* readSizes(Api const& api, KernelInfo const* info, Matrix* matrix)
{
    struct
    {
        char const* name;
        int64_t* value;
    } const attributes[] = {
        {"K", &matrix->columns}, {"N", &matrix->rows}, {"bits", &matrix->bits}, {"block_size", &matrix->block}};
    for (auto const& attribute : attributes)
    {
        if (Status* const status = api.attribute(info, attribute.name, attribute.value))
        {
            return status;
        }
    }
    bool const knownBits = matrix->bits == 2 || matrix->bits == 4 || matrix->bits == 8;
    bool const knownBlock = matrix->block % 16 == 0 && matrix->block >= 16 && matrix->block <= 256;
    if (!knownBits || !knownBlock || matrix->rows < 1 || matrix->columns < 1)
    {
        return api.fail("skipcat: MatMulBlocks has codes of 2, 4 or 8 bits, in blocks of 16 to 256");
    }
    return nullptr;
}

Status* readMatrix(Api const& api, Operator const& op, KernelInfo const* info, Matrix* matrix)
{
    if (Status* const status = readSizes(api, info, matrix))
    {
        return status;
    }
    int64_t const blocks = matrix->blocks();
    void* codes = nullptr;
    void* scales = nullptr;
    void* third = nullptr;
    int64_t const bytes = matrix->rows * blocks * matrix->block * matrix->bits / 8;
    Status* status = constantData(api, info, 1, bytes, &codes);
    status = status != nullptr ? status : constantData(api, info, 2, matrix->rows * blocks, &scales);
    if (status == nullptr && (op.zeros || op.rests))
    {
        int64_t const inRow = op.zeros ? (blocks * matrix->bits + 7) / 8 : blocks;
        status = constantData(api, info, 3, matrix->rows * inRow, &third);
    }
    matrix->codes = static_cast<uint8_t const*>(codes);
    matrix->scales = static_cast<float const*>(scales);
    matrix->zeros = op.zeros ? static_cast<uint8_t const*>(third) : nullptr;
    matrix->rests = op.rests ? static_cast<float const*>(third) : nullptr;
    return status;
}

Status* createKernel(CustomOp const* custom, void const* table, KernelInfo const* info, void** made)
{
    Api const api{table};
    Operator const& op = of(custom);
    Matrix matrix{};
    if (Status* const status = readMatrix(api, op, info, &matrix))
    {
        return status;
    }
    void* bias = nullptr;
    if (op.bias)
    {
        if (Status* const status = constantData(api, info, op.biasPlace(), matrix.rows, &bias))
        {
            return status;
        }
    }
    try
    {
        auto kernel = std::make_unique<Kernel>(
            Kernel{api, matrix.rows, matrix.columns, matrix.block, instructions()->pack(matrix), {}});
        if (bias != nullptr)
        {
            auto const* const numbers = static_cast<float const*>(bias);
            kernel->bias.assign(numbers, numbers + matrix.rows);
        }
        *made = kernel.release();
    }
    catch (std::bad_alloc const&)
    {
        return api.fail("skipcat: no memory for a matrix of MatMulBlocks");
    }
    return nullptr;
}

// Rows of x, rounded, in memory that a thread keeps for its next call.
class RoundedRows
{
public:
    // Tiles of the sizes that there are products for, the largest first.
    std::vector<Tile> const& resize(int64_t rows, int64_t blocks, int64_t block)
    {
        size_t const count = static_cast<size_t>(rows * blocks);
        mCodes.resize(count * static_cast<size_t>(block));
        mScales.resize(count);
        mSums.resize(count);
        mWholes.resize(count);
        mTiles.clear();
        int64_t first = 0;
        for (int64_t size : kTileRows)
        {
            for (; size <= instructions()->mostRows && first + size <= rows; first += size)
            {
                int64_t const at = first * blocks;
                mTiles.push_back({size, &mCodes[static_cast<size_t>(at * block)], &mScales[static_cast<size_t>(at)],
                    &mSums[static_cast<size_t>(at)], &mWholes[static_cast<size_t>(at)]});
            }
        }
        return mTiles;
    }

private:
    std::vector<int8_t> mCodes;
    std::vector<float> mScales;
    std::vector<int32_t> mSums;
    std::vector<float> mWholes;
    std::vector<Tile> mTiles;
};

// One call, as its tasks see it.
struct Call
{
    Kernel const* kernel;
    float const* x;
    float* y;
    int64_t rows;
    std::vector<Tile> const* tiles;
    int64_t groupsATask;
};

void roundTask(void* user, size_t index)
{
    Call const& call = *static_cast<Call const*>(user);
    Kernel const& kernel = *call.kernel;
    Tile const& tile = (*call.tiles)[index];
    int64_t first = 0;
    for (size_t before = 0; before < index; ++before)
    {
        first += (*call.tiles)[before].rows;
    }
    for (int64_t row = 0; row < tile.rows; ++row)
    {
        roundRow(call.x + (first + row) * kernel.columns, kernel.columns, kernel.block, tile, row);
    }
}

// Group by group all tiles: the codes of a group stay near.
void productTask(void* user, size_t task)
{
    Call const& call = *static_cast<Call const*>(user);
    Kernel const& kernel = *call.kernel;
    int64_t const first = static_cast<int64_t>(task) * call.groupsATask;
    int64_t const last = std::min(first + call.groupsATask, kernel.product->groups());
    float const* const bias = kernel.bias.empty() ? nullptr : kernel.bias.data();
    int64_t const step = call.tiles->size() == 1 ? last - first : 1;
    for (int64_t group = first; group < last; group += step)
    {
        float* y = call.y;
        for (Tile const& tile : *call.tiles)
        {
            kernel.product->compute(tile, group, group + step, bias, y);
            y += tile.rows * kernel.rows;
        }
    }
}

Status* multiply(Call& call, KernelContext const* context)
{
    Kernel const& kernel = *call.kernel;
    size_t const tiles = call.tiles->size();
    if (call.rows >= kRowsWorthThreads)
    {
        if (Status* const status = kernel.api.parallelFor(context, roundTask, tiles, &call))
        {
            return status;
        }
    }
    else
    {
        for (size_t tile = 0; tile < tiles; ++tile)
        {
            roundTask(&call, tile);
        }
    }
    int64_t const groups = kernel.product->groups();
    if (call.rows * kernel.rows * kernel.columns < kWorthThreads)
    {
        call.groupsATask = groups;
        productTask(&call, 0);
        return nullptr;
    }
    constexpr int64_t kTasks = 16; // as evenly as most numbers of threads can have them
    call.groupsATask = (groups + kTasks - 1) / kTasks;
    auto const tasks = static_cast<size_t>((groups + call.groupsATask - 1) / call.groupsATask);
    return kernel.api.parallelFor(context, productTask, tasks, &call);
}

Status* computeKernel(void* made, KernelContext* context)
{
    Kernel const& kernel = *static_cast<Kernel const*>(made);
    Api const& api = kernel.api;
    Value const* input = nullptr;
    ShapeInfo* shape = nullptr;
    size_t dimensions = 0;
    Status* status = api.input(context, 0, &input);
    status = status != nullptr ? status : api.shape(input, &shape);
    if (status != nullptr)
    {
        return status;
    }
    std::array<int64_t, 8> sizes{};
    status = api.dimensions(shape, &dimensions);
    if (status == nullptr && (dimensions == 0 || dimensions > sizes.size()))
    {
        status = api.fail("skipcat: MatMulBlocks takes an x of one to eight dimensions");
    }
    status = status != nullptr ? status : api.sizes(shape, sizes.data(), dimensions);
    api.release(shape);
    if (status != nullptr)
    {
        return status;
    }
    if (sizes[dimensions - 1] != kernel.columns)
    {
        return api.fail("skipcat: the last dimension of x is not the K of MatMulBlocks");
    }
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dimensions; ++i)
    {
        rows *= sizes[i];
    }
    sizes[dimensions - 1] = kernel.rows;
    Value* output = nullptr;
    void* x = nullptr;
    void* y = nullptr;
    status = api.output(context, 0, sizes.data(), dimensions, &output);
    status = status != nullptr ? status : api.data(input, &x);
    status = status != nullptr ? status : api.data(output, &y);
    if (status != nullptr || rows == 0)
    {
        return status;
    }
    thread_local RoundedRows kept;
    Call call{&kernel, static_cast<float const*>(x), static_cast<float*>(y), rows, nullptr, 0};
    call.tiles = &kept.resize(rows, kernel.blocks(), kernel.block);
    return multiply(call, context);
}

Operator makeOperator(char const* name, bool zeros, bool rests, bool bias)
{
    Operator op{};
    op.name = name;
    op.zeros = zeros;
    op.rests = rests;
    op.bias = bias;
    op.getName = [](CustomOp const* self) { return of(self).name; };
    op.getProvider = [](CustomOp const*) -> char const* { return nullptr; };
    op.getInputCount = [](CustomOp const* self) { return of(self).biasPlace() + (of(self).bias ? 1 : 0); };
    op.getInputType = [](CustomOp const* self, size_t index)
    { return index == 1 || (index == 3 && of(self).zeros) ? kUint8 : kFloat32; };
    op.getOutputCount = [](CustomOp const*) -> size_t { return 1; };
    op.getOutputType = [](CustomOp const*, size_t) { return kFloat32; };
    op.getInputCharacteristic = [](CustomOp const*, size_t) { return kRequired; };
    op.getOutputCharacteristic = [](CustomOp const*, size_t) { return kRequired; };
    op.getInputMemory = [](CustomOp const*, size_t) { return 0; };
    op.createKernelV2 = createKernel;
    op.computeV2 = computeKernel;
    op.destroy = [](void* made) { delete static_cast<Kernel*>(made); };
    op.getStartVersion = [](CustomOp const*) { return 1; };
    op.getEndVersion = [](CustomOp const*) { return 1; };
    return op;
}

Operator const kOperators[] = {
    makeOperator("MatMulBlocks", false, false, false),
    makeOperator("MatMulBlocksBias", false, false, true),
    makeOperator("MatMulBlocksZeros", true, false, false),
    makeOperator("MatMulBlocksZerosBias", true, false, true),
    makeOperator("MatMulBlocksRests", false, true, false),
    makeOperator("MatMulBlocksRestsBias", false, true, true),
};

} // namespace
} // namespace skipcat

extern "C"
{

// Which instructions the kernels take on this CPU; null where they run not at all.
__attribute__((visibility("default"))) char const* skipcatInstructions()
{
    skipcat::Instructions const* const found = skipcat::instructions();
    return found == nullptr ? nullptr : found->name;
}

// What ONNX Runtime looks for in a library of operators.
__attribute__((visibility("default"))) skipcat::Status* RegisterCustomOps(
    skipcat::SessionOptions* options, skipcat::ApiBase const* base)
{
    skipcat::Api const api{base->getApi(skipcat::kApiVersion)};
    if (skipcat::instructions() == nullptr)
    {
        return api.fail("skipcat: no kernels for this CPU");
    }
    skipcat::Domain* domain = nullptr;
    if (skipcat::Status* const status = api.createDomain("skipcat", &domain))
    {
        return status;
    }
    for (skipcat::Operator const& op : skipcat::kOperators)
    {
        if (skipcat::Status* const status = api.addOp(domain, &op))
        {
            return status;
        }
    }
    return api.addDomain(options, domain);
}

} // extern "C"
