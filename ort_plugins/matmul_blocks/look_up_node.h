// LookUpBlocks[Zeros]: y = W[ids], rows of an embedding as numbers.

#ifndef SKIPCAT_ORT_LOOK_UP_NODE_H
#define SKIPCAT_ORT_LOOK_UP_NODE_H

#include "call.h"
#include "multiply.h"

namespace skipcat
{

class LookUpNode
{
public:
    // Inputs: ids, codes [N, blocks, bytes], scales and zeros [N, blocks, 1].
    static Status* make(Api const& api, KernelInfo const* info, Zero zero, LookUpNode* node)
    {
        node->mApi = &api;
        node->mZero = zero;
        MatrixAttributes const names{"N", "K", "bits", "block_size"};
        if (Status* const status = readSizes(api, info, names, &node->mMatrix))
        {
            return status;
        }
        Matrix const& matrix = node->mMatrix;
        int64_t const bytes = matrix.rows * matrix.blocks() * matrix.block * matrix.bits / 8;
        void* data = nullptr;
        Status* status = constantData(api, info, 1, bytes, &data);
        for (size_t index = 2; status == nullptr && index <= inputsOf(zero); ++index)
        {
            status = constantData(api, info, index, matrix.rows * matrix.blocks(), &data);
        }
        return status;
    }

    Api const& api() const
    {
        return *mApi;
    }

    Status* compute(KernelContext* context) const
    {
        void const* inputs[4]{};
        for (size_t index = 0; index <= inputsOf(mZero); ++index)
        {
            Value const* value = nullptr;
            void* data = nullptr;
            Status* status = mApi->input(context, index, &value);
            status = status != nullptr ? status : mApi->data(value, &data);
            if (status != nullptr)
            {
                return status;
            }
            inputs[index] = data;
        }
        int64_t rows = 0;
        float* y = nullptr;
        if (Status* const status = openLookUp(*mApi, context, mMatrix.columns, &rows, &y))
        {
            return status;
        }
        auto const* const ids = static_cast<int64_t const*>(inputs[0]);
        std::shared_ptr<Product const> const product = packedFrom(inputs[1]);
        for (int64_t row = 0; row < rows; ++row, y += mMatrix.columns)
        {
            int64_t const id = ids[row] < 0 ? ids[row] + mMatrix.rows : ids[row];
            if (id < 0 || id >= mMatrix.rows)
            {
                return mApi->fail("skipcat: an id of LookUpBlocks is outside of the table");
            }
            if (product != nullptr)
            {
                product->row(id, mMatrix.columns, y);
            }
            else
            {
                rowOf(inputs, id, y);
            }
        }
        return nullptr;
    }

private:
    // Out of the codes themselves.
    void rowOf(void const* const* inputs, int64_t id, float* y) const
    {
        int64_t const blocks = mMatrix.blocks();
        int64_t const aByte = 8 / mMatrix.bits;
        int32_t const mask = (1 << mMatrix.bits) - 1;
        auto const* const codes = static_cast<uint8_t const*>(inputs[1]) + id * blocks * mMatrix.block / aByte;
        auto const* const scales = static_cast<float const*>(inputs[2]) + id * blocks;
        auto const* const zeros = static_cast<uint8_t const*>(inputs[3]);
        for (int64_t column = 0; column < mMatrix.columns; ++column)
        {
            int64_t const block = column / mMatrix.block;
            int32_t const code = (codes[column / aByte] >> (column % aByte * mMatrix.bits)) & mask;
            int32_t const zero = zeros == nullptr ? 1 << (mMatrix.bits - 1) : zeros[id * blocks + block];
            y[column] = static_cast<float>(code - zero) * scales[block];
        }
    }

    Api const* mApi{nullptr};
    Matrix mMatrix{};
    Zero mZero{Zero::kMiddle};
};

} // namespace skipcat

#endif
