// MatMulBlocks[Zeros|Rests][Bias]: y = x W^T + bias.

#ifndef SKIPCAT_ORT_MATMUL_NODE_H
#define SKIPCAT_ORT_MATMUL_NODE_H

#include "call.h"
#include "multiply.h"

namespace skipcat
{

class MatMulNode
{
public:
    // Inputs: x, those of the matrix, then the bias, if there is one.
    static Status* make(Api const& api, KernelInfo const* info, Zero zero, bool bias, MatMulNode* node)
    {
        MatrixAttributes const names{"N", "K", "bits", "block_size"};
        node->mApi = &api;
        if (Status* const status = readMatrix(api, info, names, zero, 1, &node->mMatrix))
        {
            return status;
        }
        if (bias)
        {
            void* numbers = nullptr;
            if (Status* const status = constantData(api, info, 1 + inputsOf(zero), node->mMatrix.rows, &numbers))
            {
                return status;
            }
            auto const* const first = static_cast<float const*>(numbers);
            node->mMatrix.bias.assign(first, first + node->mMatrix.rows);
        }
        return nullptr;
    }

    Api const& api() const
    {
        return *mApi;
    }

    Status* compute(KernelContext* context) const
    {
        Call call{};
        Status* const status = openCall(*mApi, context, mMatrix.columns, mMatrix.rows, &call);
        if (status != nullptr || call.rows == 0)
        {
            return status;
        }
        return multiply(*mApi, context, mMatrix, call.x, call.rows, call.y);
    }

private:
    Api const* mApi{nullptr};
    StoredMatrix mMatrix{};
};

} // namespace skipcat

#endif
