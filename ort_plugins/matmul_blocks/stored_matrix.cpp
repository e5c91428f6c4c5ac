#include "stored_matrix.h"

#include <map>
#include <mutex>

namespace skipcat
{
namespace
{

// Products by the address of the codes that they were packed from: an embedding that shares them with
// the head is looked up in what the head has in memory.
struct Packed
{
    std::mutex lock;
    std::map<void const*, std::weak_ptr<Product const>> products;
};

Packed& packed()
{
    static Packed all;
    return all;
}

} // namespace

Status* readSizes(Api const& api, KernelInfo const* info, MatrixAttributes const& names, Matrix* matrix)
{
    struct
    {
        char const* name;
        int64_t* value;
    } const attributes[] = {{names.rows, &matrix->rows}, {names.columns, &matrix->columns},
        {names.bits, &matrix->bits}, {names.block, &matrix->block}};
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
        return api.fail("skipcat: the kernels have codes of 2, 4 or 8 bits, in blocks of 16 to 256");
    }
    return nullptr;
}

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
        return api.fail("skipcat: the matrices of a node must be initializers");
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
        return api.fail("skipcat: the sizes of a matrix are not those of the node's attributes");
    }
    return api.data(value, data);
}

Status* readMatrix(Api const& api, KernelInfo const* info, MatrixAttributes const& names, Zero zero, size_t first,
    StoredMatrix* stored)
{
    Matrix matrix{};
    if (Status* const status = readSizes(api, info, names, &matrix))
    {
        return status;
    }
    int64_t const blocks = matrix.blocks();
    int64_t const bytes = matrix.rows * blocks * matrix.block * matrix.bits / 8;
    void* codes = nullptr;
    void* scales = nullptr;
    void* third = nullptr;
    Status* status = constantData(api, info, first, bytes, &codes);
    status = status != nullptr ? status : constantData(api, info, first + 1, matrix.rows * blocks, &scales);
    if (status == nullptr && zero != Zero::kMiddle)
    {
        int64_t const inRow = zero == Zero::kZeros ? (blocks * matrix.bits + 7) / 8 : blocks;
        status = constantData(api, info, first + 2, matrix.rows * inRow, &third);
    }
    if (status != nullptr)
    {
        return status;
    }
    matrix.codes = static_cast<uint8_t const*>(codes);
    matrix.scales = static_cast<float const*>(scales);
    matrix.zeros = zero == Zero::kZeros ? static_cast<uint8_t const*>(third) : nullptr;
    matrix.rests = zero == Zero::kRests ? static_cast<float const*>(third) : nullptr;
    *stored = {matrix.rows, matrix.columns, matrix.block, instructions()->pack(matrix), {}};
    std::lock_guard<std::mutex> const guard{packed().lock};
    packed().products[codes] = stored->product;
    return nullptr;
}

std::shared_ptr<Product const> packedFrom(void const* codes)
{
    std::lock_guard<std::mutex> const guard{packed().lock};
    auto const found = packed().products.find(codes);
    return found == packed().products.end() ? nullptr : found->second.lock();
}

} // namespace skipcat
