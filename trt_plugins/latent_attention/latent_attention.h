// Attention over a cache of latents, on a CUDA stream:
//
//     z     = codes * step + low, or numbers as they are
//     key   = turned(mean + z up), where keys are rebuilt; else z
//     mixed = softmax(query key^T + mask) z_value
//
// query [batch, heads, queries, width], scaled; mask [1 or batch, 1, queries, slots], added; keys and
// values [batch, groups, slots, rank]; mixed [batch, heads, queries, rank of the values]: what maps values
// back is outside. up [key groups, heads of a group, rank, width], mean [key groups, heads of a group, width],
// cos and sin [at least slots, width / 2]: number i turns with number i + width / 2, by an angle that is proportional
// to the slot, and is stretched by a factor of its own.
//
// Codes are int8, 128 less than what they mean: one to a byte, or two, number i in the low half of byte i and
// number i + bytes in the high half. Steps [batch, groups, slots, 2] are step and low of a token and group.
// Numbers are fp16 or bfloat16, steps and lows fp16, tables float, sums float.

#ifndef SKIPCAT_LATENT_ATTENTION_H
#define SKIPCAT_LATENT_ATTENTION_H

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace skipcat::latent
{

// How a side of the cache is held; the value is the bits of a number, but for kNumbers.
enum class Form : int32_t
{
    kNumbers = 0,
    kNibbles = 4,
    kBytes = 8
};

struct Side
{
    int32_t groups{1};
    int32_t held{0}; // numbers, or bytes, of a token and group
    Form form{Form::kNumbers};

    int32_t rank() const { return form == Form::kNibbles ? 2 * held : held; }
};

struct Problem
{
    int32_t batch{1};
    int32_t heads{1};
    int32_t queries{1};
    int32_t slots{1};
    int32_t width{0};         // of a query
    int32_t headsPerGroup{0}; // of keys that are rebuilt; 0 where they are taken as cached
    Side keys;
    Side values;
    bool maskByRow{false}; // the mask has as many rows as the batch
    bool bf16{false};      // numbers are bfloat16, steps and lows are not
};

struct Pointers
{
    void const* query{nullptr};
    void const* mask{nullptr};
    void const* keys{nullptr};
    void const* keySteps{nullptr}; // null of numbers, as valueSteps
    void const* values{nullptr};
    void const* valueSteps{nullptr};
    void const* up{nullptr}; // null unless keys are rebuilt, as mean, cos and sin
    void const* mean{nullptr};
    float const* cos{nullptr};
    float const* sin{nullptr};
    void* mixed{nullptr};
};

// Why a problem cannot be computed, in words for a user; null when it can.
char const* whyRefused(Problem const& problem) noexcept;

// Bytes of scratch memory that is enough for a call, and for any of fewer queries, slots or rows of the batch.
size_t workspaceBytes(Problem const& problem, int32_t multiprocessors) noexcept;

// Puts the op on `stream`: no allocation, no synchronisation, safe to capture in a graph. The context is split
// over blocks, whose shares a second launch puts together in order. 64 tokens that the mask closes (-16384 and
// below) to 16 queries that share a head are not read for these, so that the rest of a static cache costs
// nothing. What lies in tokens that are closed to all queries changes nothing, even where it is no number. What a
// query gets to which everything is closed means nothing, but is finite.
// Returns cudaErrorInvalidValue for a problem that is refused.
cudaError_t latentAttention(Problem const& problem, Pointers const& pointers, int32_t multiprocessors,
    void* workspace, cudaStream_t stream) noexcept;

} // namespace skipcat::latent

#endif
