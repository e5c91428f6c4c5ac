// Products of many rows, shared by the threads of a session.

#ifndef SKIPCAT_ORT_MULTIPLY_H
#define SKIPCAT_ORT_MULTIPLY_H

#include "runtime_api.h"
#include "stored_matrix.h"

namespace skipcat
{

// y [rows, w.rows] = x [rows, w.columns] w^T, and the bias.
Status* multiply(Api const& api, KernelContext const* context, StoredMatrix const& w, float const* x, int64_t rows,
    float* y);

// task(row) for every row; by several threads where there are enough of them.
template <typename Task>
Status* forRows(Api const& api, KernelContext const* context, int64_t rows, Task const& task)
{
    constexpr int64_t kWorthThreads = 8;
    if (rows >= kWorthThreads)
    {
        auto const call = [](void* user, size_t row)
        { (*static_cast<Task const*>(user))(static_cast<int64_t>(row)); };
        return api.parallelFor(context, call, static_cast<size_t>(rows), const_cast<Task*>(&task));
    }
    for (int64_t row = 0; row < rows; ++row)
    {
        task(row);
    }
    return nullptr;
}

} // namespace skipcat

#endif
