// The block-skip linear layer on a CUDA stream:
//
//     y = (x1 + x2 a) b,  [x1 x2] = x[..., index]
//
// x [rows, n], a [n - rank, rank], b [rank, m], y [rows, m], index [n], all row-major. With rank = n
// there is no a, and it is the dense layer y = x b, in one product. Each of a and b is of the type of x,
// or int8 or int4 codes with one scale for every group of rows in each column:
//
//     w[k][j] = code[k][j] * scale[k / groupSize][j]
//
// int8 codes are signed bytes [rows, columns]. int4 codes are signed halves of bytes, two columns to a
// byte, the even column in the low half: [rows, (columns + 1) / 2] bytes, which for even columns are the
// bytes of ONNX's INT4. Scales are of the type of x, [(rows + groupSize - 1) / groupSize, columns]: a
// group of all rows and more is one scale to a column. Sums are float32; z = x1 + x2 a is rounded to
// the type of x between the two products, as the ONNX function body does.

#ifndef SKIPCAT_BLOCK_SKIP_H
#define SKIPCAT_BLOCK_SKIP_H

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace skipcat
{

enum class Float : int32_t
{
    kFP16 = 0,
    kBF16 = 1
};

// The value is the number of bits, but for kFloat.
enum class WeightType : int32_t
{
    kFloat = 0,
    kInt4 = 4,
    kInt8 = 8
};

// How one of the two matrices is held.
struct WeightFormat
{
    WeightType type{WeightType::kFloat};
    int32_t groupSize{0}; // a multiple of 16 with int8 and int4, else 0
};

// A way to split the decode step over the chip.
struct Tactic
{
    int32_t blocks; // wanted on each multiprocessor, 1 or 2: all must be on it at once
    int32_t stages; // of 16 rows of w (32 of 4 bits), that each warp should have at least
};

constexpr Tactic kTactic[] = {{1, 1}, {2, 1}, {1, 3}, {2, 3}};
constexpr int32_t kTactics = sizeof(kTactic) / sizeof(kTactic[0]);
constexpr int32_t kMaxRows = 4096;

struct Problem
{
    int32_t rows{1};
    int32_t n{0};
    int32_t m{0};
    int32_t rank{0};
    Float type{Float::kFP16};
    WeightFormat a{}; // of no matter when rank == n
    WeightFormat b{};
    bool indexed{false};
    int32_t tactic{0}; // index into kTactic
};

struct Pointers
{
    void const* x{nullptr};
    int32_t const* index{nullptr}; // null unless indexed
    void const* a{nullptr};        // may be null when rank == n
    void const* aScale{nullptr};   // null unless a is int8 or int4
    void const* b{nullptr};
    void const* bScale{nullptr};
    void* y{nullptr};
};

struct Device
{
    int32_t multiprocessors{0};
    int32_t capability{0}; // 87, 90, ...
};

// Why a problem cannot be computed, in words for a user; null when it can.
char const* whyRefused(Problem const& problem) noexcept;

// Bytes of scratch memory, 256-aligned, that a call needs. Grows with rows, never shrinks.
size_t workspaceBytes(Problem const& problem, Device const& device) noexcept;

// Bytes of counters: zero before the first call, and each call leaves them zero. Calls that may
// overlap need counters of their own.
size_t counterBytes(Problem const& problem) noexcept;

// Puts the layer on `stream`: no allocation, no synchronisation, safe to capture in a graph.
// Returns cudaErrorInvalidValue for a problem that is refused.
cudaError_t blockSkipLinear(Problem const& problem, Pointers const& pointers, Device const& device,
    void* workspace, uint32_t* counters, cudaStream_t stream) noexcept;

} // namespace skipcat

#endif
