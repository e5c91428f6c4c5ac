// BlockSkipBlocks[A...][B...][Indexed]: y = (x1 + x2 A^T) B^T, [x1 x2] = x[..., index].

#ifndef SKIPCAT_ORT_BLOCK_SKIP_NODE_H
#define SKIPCAT_ORT_BLOCK_SKIP_NODE_H

#include "call.h"
#include "multiply.h"

#include <cstring>

namespace skipcat
{

class BlockSkipNode
{
public:
    // Inputs: x, the index, if there is one, those of A, those of B.
    static Status* make(Api const& api, KernelInfo const* info, Zero a, Zero b, bool indexed, BlockSkipNode* node)
    {
        MatrixAttributes const namesOfA{"rank", "rest", "bits_a", "block_a"};
        MatrixAttributes const namesOfB{"N", "rank", "bits_b", "block_b"};
        size_t const first = indexed ? 2 : 1;
        node->mApi = &api;
        Status* status = readMatrix(api, info, namesOfA, a, first, &node->mDown);
        status = status != nullptr ? status : readMatrix(api, info, namesOfB, b, first + inputsOf(a), &node->mUp);
        return status != nullptr || !indexed ? status : node->readIndex(info);
    }

    Api const& api() const
    {
        return *mApi;
    }

    Status* compute(KernelContext* context) const
    {
        Call call{};
        Status* status = openCall(*mApi, context, columns(), mUp.rows, &call);
        if (status != nullptr || call.rows == 0)
        {
            return status;
        }
        thread_local std::vector<float> kept;
        int64_t const rank = mDown.rows;
        kept.resize(static_cast<size_t>(call.rows * (columns() + rank)));
        float* const skipped = kept.data();
        float* const mixed = skipped + call.rows * rank;
        float* const latent = mixed + call.rows * mDown.columns;
        status = forRows(*mApi, context, call.rows,
            [this, &call, skipped, mixed](int64_t row)
            {
                float const* const x = call.x + row * columns();
                order(x, 0, mDown.rows, skipped + row * mDown.rows);
                order(x, mDown.rows, mDown.columns, mixed + row * mDown.columns);
            });
        status = status != nullptr ? status : multiply(*mApi, context, mDown, mixed, call.rows, latent);
        if (status != nullptr)
        {
            return status;
        }
        for (int64_t i = 0; i < call.rows * rank; ++i)
        {
            latent[i] += skipped[i];
        }
        return multiply(*mApi, context, mUp, latent, call.rows, call.y);
    }

private:
    int64_t columns() const
    {
        return mDown.rows + mDown.columns;
    }

    Status* readIndex(KernelInfo const* info)
    {
        void* numbers = nullptr;
        if (Status* const status = constantData(*mApi, info, 1, columns(), &numbers))
        {
            return status;
        }
        auto const* const first = static_cast<int32_t const*>(numbers);
        mIndex.assign(first, first + columns());
        for (int32_t const place : mIndex)
        {
            if (place < 0 || place >= columns())
            {
                return mApi->fail("skipcat: an index of BlockSkipBlocks is outside of x");
            }
        }
        return nullptr;
    }

    // Numbers `first` to `first + count` of x in the order of the index.
    void order(float const* x, int64_t first, int64_t count, float* into) const
    {
        if (mIndex.empty())
        {
            std::memcpy(into, x + first, static_cast<size_t>(count) * sizeof(float));
            return;
        }
        int32_t const* const index = mIndex.data() + first;
        for (int64_t i = 0; i < count; ++i)
        {
            into[i] = x[index[i]];
        }
    }

    Api const* mApi{nullptr};
    StoredMatrix mDown{};
    StoredMatrix mUp{};
    std::vector<int32_t> mIndex;
};

} // namespace skipcat

#endif
