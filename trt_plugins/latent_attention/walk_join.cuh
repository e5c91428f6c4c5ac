// The blocks' shares of a row, joined in their order.

#ifndef SKIPCAT_LATENT_WALK_JOIN_CUH
#define SKIPCAT_LATENT_WALK_JOIN_CUH

#include "walk_values.cuh"

namespace skipcat::latent
{

// 32 numbers of a row: each warp a part of the splits, the parts in their order.
template <typename T>
__global__ void __launch_bounds__(32 * kJoinWarps) joinWalks(WalkArguments p)
{
    awaitPrevious();
    releaseNext();
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const warp = static_cast<int>(threadIdx.x) / 32;
    Problem const& problem = p.problem;
    int const rank = rankOf(problem.values);
    int const vector = static_cast<int>(blockIdx.x); // batch, head, query
    int const perUnit = problem.heads / p.units;
    int const head = vector / problem.queries % problem.heads;
    int const batch = vector / problem.queries / problem.heads;
    int const row = head % perUnit * problem.queries + vector % problem.queries;
    int64_t const block = (static_cast<int64_t>(batch) * p.rowTiles + row / p.rows) * p.units + head / perUnit;
    int64_t const first = block * p.splits * p.rows + row % p.rows;
    float largest = kNothing;
    for (int s = lane; s < p.splits; s += 32)
    {
        largest = fmaxf(largest, p.maximum[first + static_cast<int64_t>(s) * p.rows]);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
    {
        largest = fmaxf(largest, shuffleXor(largest, distance));
    }
    int const each = (p.splits + kJoinWarps - 1) / kJoinWarps;
    int const end = (warp + 1) * each < p.splits ? (warp + 1) * each : p.splits;
    int const column = 32 * static_cast<int>(blockIdx.y) + lane;
    float sum = 0.0f;
    float total = 0.0f;
#pragma unroll 4
    for (int s = warp * each; s < end; ++s)
    {
        int64_t const share = first + static_cast<int64_t>(s) * p.rows;
        float const factor = powerOf2((p.maximum[share] - largest) * kLog2e);
        total += factor * p.total[share];
        sum += column < rank ? factor * p.shares[share * rank + column] : 0.0f;
    }
    float* const parts = reinterpret_cast<float*>(sharedMemory()); // [warps][sums, totals][32]
    parts[64 * warp + lane] = sum;
    parts[64 * warp + 32 + lane] = total;
    __syncthreads();
    if (warp == 0 && column < rank)
    {
        sum = 0.0f;
        total = 0.0f;
        for (int w = 0; w < kJoinWarps; ++w)
        {
            sum += parts[64 * w + lane];
            total += parts[64 * w + 32 + lane];
        }
        fromFloat(total > 0.0f ? sum / total : 0.0f,
            static_cast<T*>(p.pointers.mixed)[static_cast<int64_t>(vector) * rank + column]);
    }
}

} // namespace skipcat::latent

#endif
