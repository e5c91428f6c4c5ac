// The matrix of a node, from its constant inputs and attributes.

#ifndef SKIPCAT_ORT_STORED_MATRIX_H
#define SKIPCAT_ORT_STORED_MATRIX_H

#include "products.h"
#include "runtime_api.h"

#include <memory>
#include <vector>

namespace skipcat
{

// What codes are counted from.
enum class Zero
{
    kMiddle, // and nothing else
    kZeros,  // zero points
    kRests   // the middle, and every block adds a number of its own
};

// Inputs that hold such a matrix: codes, scales, then zeros, or rests and what sums the blocks in the body.
constexpr size_t inputsOf(Zero zero)
{
    return zero == Zero::kMiddle ? 2 : zero == Zero::kZeros ? 3 : 4;
}

// A matrix, packed.
struct StoredMatrix
{
    int64_t rows;
    int64_t columns;
    int64_t block;
    std::shared_ptr<Product> product;
    std::vector<float> bias;

    int64_t blocks() const
    {
        return (columns + block - 1) / block;
    }
};

// The data of an input that must be a constant of so many elements.
Status* constantData(Api const& api, KernelInfo const* info, size_t index, int64_t expected, void** data);

// Names of the attributes of one matrix.
struct MatrixAttributes
{
    char const* rows;
    char const* columns;
    char const* bits;
    char const* block;
};

// Its sizes, from those attributes.
Status* readSizes(Api const& api, KernelInfo const* info, MatrixAttributes const& names, Matrix* matrix);

// Read the matrix whose codes are input `first`, and pack it; without a bias. Throws std::bad_alloc.
Status* readMatrix(Api const& api, KernelInfo const* info, MatrixAttributes const& names, Zero zero, size_t first,
    StoredMatrix* stored);

// The product that was packed from codes at an address; null where there is none any more.
std::shared_ptr<Product const> packedFrom(void const* codes);

} // namespace skipcat

#endif
