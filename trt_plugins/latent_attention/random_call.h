// Calls with random inputs, and what they should give in double precision: for the emulation and the harness.

#ifndef SKIPCAT_RANDOM_CALL_H
#define SKIPCAT_RANDOM_CALL_H

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "latent_attention.h"

#include "emulate/buffer.h"

namespace skipcat::latent
{

using emulate::Buffer;
using Random = std::mt19937;

inline size_t product(std::initializer_list<int> sizes)
{
    size_t out = 1;
    for (int const size : sizes)
    {
        out *= static_cast<size_t>(size);
    }
    return out;
}

constexpr uint16_t kNoNumber = 0x7fff; // in both types

inline uint16_t bitsOf(float value, bool bf16)
{
    __half const half = __float2half_rn(value);
    __nv_bfloat16 const brain = __float2bfloat16_rn(value);
    uint16_t bits;
    std::memcpy(&bits, bf16 ? static_cast<void const*>(&brain) : &half, 2);
    return bits;
}

inline double valueOf(uint16_t bits, bool bf16)
{
    __half half;
    __nv_bfloat16 brain;
    std::memcpy(static_cast<void*>(&half), &bits, 2);
    std::memcpy(static_cast<void*>(&brain), &bits, 2);
    return bf16 ? __bfloat162float(brain) : __half2float(half);
}

// Numbers of 16 bits and a spread, and what they are.
struct Numbers
{
    Numbers(size_t count, float spread, bool bf16, Random& random)
        : held(count)
        , values(count)
    {
        std::normal_distribution<float> normal(0.0f, spread);
        for (size_t i = 0; i < count; ++i)
        {
            held.data[i] = bitsOf(normal(random), bf16);
            values[i] = valueOf(held.data[i], bf16);
        }
    }

    Buffer<uint16_t> held;
    std::vector<double> values;
};

// A side of the cache as the op gets it, and what it stands for: [batch, groups, slots, rank].
struct RandomSide
{
    RandomSide(Problem const& p, Side const& side, Random& random)
        : rank(static_cast<size_t>(side.rank()))
        , tokens(product({p.batch, side.groups, p.slots}))
        , numbers(side.form == Form::kNumbers ? tokens * rank : 0, 1.0f, p.bf16, random)
        , codes(side.form == Form::kNumbers ? 0 : tokens * static_cast<size_t>(side.held))
        , steps(side.form == Form::kNumbers ? 0 : 2 * tokens)
        , values(tokens * rank)
    {
        if (side.form == Form::kNumbers)
        {
            values = numbers.values;
            return;
        }
        float const largest = side.form == Form::kNibbles ? 15.0f : 255.0f;
        std::uniform_real_distribution<float> spread(2.0f, 4.0f);
        for (size_t token = 0; token < tokens; ++token)
        {
            steps.data[2 * token] = __float2half_rn(spread(random) / largest);
            steps.data[2 * token + 1] = __float2half_rn(-spread(random) / 2.0f);
            decode(side, token, random);
        }
    }

    void decode(Side const& side, size_t token, Random& random)
    {
        double const step = __half2float(steps.data[2 * token]);
        double const low = __half2float(steps.data[2 * token + 1]);
        size_t const held = static_cast<size_t>(side.held);
        for (size_t j = 0; j < held; ++j)
        {
            unsigned const byte = random() % 256;
            codes.data[token * held + j] = static_cast<int8_t>(static_cast<int>(byte) - 128);
            bool const nibbles = side.form == Form::kNibbles;
            values[token * rank + j] = (nibbles ? byte % 16 : byte) * step + low;
            if (nibbles)
            {
                values[token * rank + held + j] = (byte / 16) * step + low;
            }
        }
    }

    // No numbers where nobody may look: what the memory held before it was used.
    void spoil(Problem const& p, Side const& side, int batch, int slot)
    {
        for (int group = 0; group < side.groups; ++group)
        {
            size_t const token = (static_cast<size_t>(batch) * side.groups + group) * p.slots + slot;
            if (side.form != Form::kNumbers)
            {
                std::memcpy(static_cast<void*>(steps.data + 2 * token), &kNoNumber, 2);
                std::memcpy(static_cast<void*>(steps.data + 2 * token + 1), &kNoNumber, 2);
                continue;
            }
            for (size_t j = 0; j < rank; ++j)
            {
                numbers.held.data[token * rank + j] = kNoNumber;
            }
        }
    }

    void const* stored() const
    {
        return codes.bytes > 0 ? static_cast<void const*>(codes.data) : numbers.held.data;
    }

    size_t rank, tokens;
    Numbers numbers;
    Buffer<int8_t> codes;
    Buffer<__half> steps;
    std::vector<double> values;
};

struct Tables
{
    Tables(Problem const& p, Random& random)
        : rebuilt(p.headsPerGroup > 0)
        , heads(static_cast<size_t>(p.keys.groups) * (rebuilt ? p.headsPerGroup : 0))
        , up(heads * p.keys.rank() * p.width, 1.0f / std::sqrt(static_cast<float>(p.keys.rank())), p.bf16, random)
        , mean(heads * p.width, 0.5f, p.bf16, random)
        , cos(rebuilt ? product({p.slots, p.width / 2}) : 0)
        , sin(rebuilt ? product({p.slots, p.width / 2}) : 0)
    {
        std::uniform_real_distribution<double> draw(0.0, 1.0);
        size_t const half = static_cast<size_t>(p.width) / 2;
        for (size_t pair = 0; rebuilt && pair < half; ++pair)
        {
            // Any scaling of the angles, and of what is turned: YaRN has such.
            double const angle = std::pow(1e4, -draw(random));
            double const factor = 0.8 + 0.4 * draw(random);
            for (size_t slot = 0; slot < static_cast<size_t>(p.slots); ++slot)
            {
                cos.data[slot * half + pair] = static_cast<float>(factor * std::cos(angle * slot));
                sin.data[slot * half + pair] = static_cast<float>(factor * std::sin(angle * slot));
            }
        }
    }

    bool rebuilt;
    size_t heads;
    Numbers up, mean;
    Buffer<float> cos, sin;
};

// A key of one head and slot, in double.
inline std::vector<double> keyOf(Problem const& p, RandomSide const& side, Tables const& tables, int batch, int head, int slot)
{
    int const perGroup = p.headsPerGroup > 0 ? p.headsPerGroup : 1;
    size_t const token = (static_cast<size_t>(batch) * p.keys.groups + head / perGroup) * p.slots + slot;
    double const* const latent = side.values.data() + token * side.rank;
    if (p.headsPerGroup == 0)
    {
        return {latent, latent + side.rank};
    }
    size_t const width = static_cast<size_t>(p.width);
    std::vector<double> plain(width);
    for (size_t d = 0; d < width; ++d)
    {
        plain[d] = tables.mean.values[head * width + d];
        for (size_t r = 0; r < side.rank; ++r)
        {
            plain[d] += latent[r] * tables.up.values[(head * side.rank + r) * width + d];
        }
    }
    std::vector<double> turned(width);
    for (size_t i = 0; i < width / 2; ++i)
    {
        double const c = tables.cos.data[slot * (width / 2) + i];
        double const s = tables.sin.data[slot * (width / 2) + i];
        turned[i] = plain[i] * c - plain[i + width / 2] * s;
        turned[i + width / 2] = plain[i + width / 2] * c + plain[i] * s;
    }
    return turned;
}

// Zeros where a query may look, -32768 elsewhere: a window, and the end of a static cache.
inline std::vector<double> fillMask(Problem const& p, Buffer<uint16_t>& mask, Random& random)
{
    int const used = 1 + static_cast<int>(random() % p.slots);
    int const window = random() % 3 == 0 ? 1 + static_cast<int>(random() % 100) : p.slots;
    int const rows = p.maskByRow ? p.batch : 1;
    std::vector<double> values;
    for (int row = 0; row < rows * p.queries; ++row)
    {
        int const last = used - 1 - (p.queries - 1 - row % p.queries) % used;
        for (int slot = 0; slot < p.slots; ++slot)
        {
            bool const open = slot <= last && slot > last - window;
            mask.data[values.size()] = bitsOf(open ? 0.0f : -32768.0f, p.bf16);
            values.push_back(open ? 0.0 : -32768.0);
        }
    }
    return values;
}

// A call with fresh inputs, each in memory of its exact size, and what should come of it.
struct Call
{
    Call(Problem const& problem, Random& random)
        : p(problem)
        , keys(p, p.keys, random)
        , values(p, p.values, random)
        , tables(p, random)
        , query(product({p.batch, p.heads, p.queries, p.width}), 1.5f / std::sqrt(static_cast<float>(p.width)), p.bf16,
              random)
        , mask(product({p.maskByRow ? p.batch : 1, p.queries, p.slots}))
        , mixed(product({p.batch, p.heads, p.queries, p.values.rank()}))
        , added(fillMask(p, mask, random))
    {
        for (int batch = 0; batch < p.batch; ++batch)
        {
            for (int slot = 0; slot < p.slots; ++slot)
            {
                if (isClosed(batch, slot))
                {
                    keys.spoil(p, p.keys, batch, slot);
                    values.spoil(p, p.values, batch, slot);
                }
            }
        }
    }

    // The size of the error by the size that the output has when its terms have random signs. What a score is off by
    // counts with its weight, and has the size of the score's own terms.
    double relativeError() const
    {
        int const keyHeads = p.keys.groups * (p.headsPerGroup > 0 ? p.headsPerGroup : 1);
        double error = 0.0;
        double norm = 0.0;
        for (int batch = 0; batch < p.batch; ++batch)
        {
            for (int head = 0; head < p.heads; ++head)
            {
                std::vector<std::vector<double>> all;
                for (int slot = 0; slot < p.slots; ++slot)
                {
                    all.push_back(keyOf(p, keys, tables, batch, head / (p.heads / keyHeads), slot));
                }
                for (int s = 0; s < p.queries; ++s)
                {
                    compareRow(all, batch, head, s, error, norm);
                }
            }
        }
        return std::sqrt(error / norm);
    }

    Problem p;
    RandomSide keys, values;
    Tables tables;
    Numbers query;
    Buffer<uint16_t> mask, mixed;
    std::vector<double> added;

private:
    // To every query.
    bool isClosed(int batch, int slot) const
    {
        bool open = false;
        for (int s = 0; s < p.queries; ++s)
        {
            size_t const line = (p.maskByRow ? batch : 0) * static_cast<size_t>(p.queries) + s;
            open = open || added[line * p.slots + slot] == 0.0;
        }
        return !open;
    }

    std::vector<double> weightsOf(
        std::vector<std::vector<double>> const& all, int batch, size_t row, int s) const
    {
        std::vector<double> weights(static_cast<size_t>(p.slots));
        size_t const line = (p.maskByRow ? batch : 0) * static_cast<size_t>(p.queries) + s;
        double largest = -1e300;
        for (int slot = 0; slot < p.slots; ++slot)
        {
            weights[slot] = added[line * p.slots + slot];
            for (int d = 0; d < p.width; ++d)
            {
                weights[slot] += query.values[row * p.width + d] * all[slot][d];
            }
            largest = std::fmax(largest, weights[slot]);
        }
        double total = 0.0;
        for (double& weight : weights)
        {
            weight = std::exp(weight - largest);
            total += weight;
        }
        for (double& weight : weights)
        {
            weight /= total;
        }
        return weights;
    }

    void compareRow(std::vector<std::vector<double>> const& all, int batch, int head, int s, double& error,
        double& norm) const
    {
        size_t const row = (static_cast<size_t>(batch) * p.heads + head) * p.queries + s;
        size_t const group = static_cast<size_t>(batch) * p.values.groups + head / (p.heads / p.values.groups);
        std::vector<double> const weights = weightsOf(all, batch, row, s);
        std::vector<double> sizes(static_cast<size_t>(p.slots), 1.0);
        for (int slot = 0; slot < p.slots; ++slot)
        {
            for (int d = 0; d < p.width; ++d)
            {
                double const term = query.values[row * p.width + d] * all[slot][d];
                sizes[slot] += term * term;
            }
        }
        for (size_t r = 0; r < values.rank; ++r)
        {
            double exact = 0.0;
            for (int slot = 0; slot < p.slots; ++slot)
            {
                double const term = weights[slot] * values.values[(group * p.slots + slot) * values.rank + r];
                exact += term;
                norm += term * term * sizes[slot];
            }
            double const difference = valueOf(mixed.data[row * values.rank + r], p.bf16) - exact;
            error += difference * difference;
        }
    }
};

inline double boundOf(Problem const& p)
{
    return p.bf16 ? 1e-2 : 1e-3;
}

// `bf16`: whether some may be of that type.
inline Problem randomProblem(Random& random, bool bf16)
{
    auto const pick = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
    Form const forms[] = {Form::kNumbers, Form::kBytes, Form::kNibbles};
    Problem p;
    p.bf16 = bf16 && pick(0, 3) == 0;
    p.batch = pick(1, 2);
    int const kvHeads = pick(1, 4);
    p.heads = kvHeads * pick(1, 5);
    p.queries = pick(0, 2) == 0 ? pick(2, 9) : 1;
    int const length = pick(0, 19);
    p.slots = length < 6 ? pick(1, 64) : length < 19 ? pick(65, 300) : pick(301, 1500);
    p.maskByRow = pick(0, 1) == 1;
    bool const rebuilt = pick(0, 1) == 1;
    p.keys.form = forms[pick(0, 2)];
    p.values.form = forms[pick(0, 2)];
    int const unit = pick(0, 2) == 0 ? 1 : 16;
    p.keys.held = unit * pick(1, 160 / unit);
    p.values.held = unit * pick(1, (pick(0, 5) == 0 ? 600 : 100) / unit);
    p.keys.groups = pick(0, 1) == 0 ? 1 : kvHeads;
    p.values.groups = pick(0, 1) == 0 ? 1 : kvHeads;
    p.headsPerGroup = rebuilt ? kvHeads / p.keys.groups : 0;
    p.width = rebuilt ? 16 * pick(1, pick(0, 4) == 0 ? 16 : 8) : p.keys.rank();
    return p;
}

} // namespace skipcat::latent

#endif
