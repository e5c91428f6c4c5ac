// The product, for any kind of CPU. Included by one source file for each, inside its own anonymous
// namespace and compiled with its flags, after that file has defined
//
//     Lanes       kCount numbers in registers, as kinds Ints and Floats, and what can be done with them
//     kMostRows   rows of x, at most, that a step multiplies with codes it has loaded once
//
// Nothing here may be shared between kinds: a function compiled for wider instructions would be linked
// into the others.

// A number rounded to the bits of a float16, and widened.
#ifdef __aarch64__
inline uint16_t toHalf(float number)
{
    auto const half = static_cast<__fp16>(number);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline float fromHalf(uint16_t bits)
{
    __fp16 half;
    std::memcpy(&half, &bits, 2);
    return half;
}
#else
inline uint16_t toHalf(float number)
{
    return _cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT);
}

inline float fromHalf(uint16_t bits)
{
    return _cvtsh_ss(bits);
}
#endif

// How one matrix is held; a product of its own is compiled for each.
template <int kBits, bool kZeros, bool kRests, bool kHalves>
class Packed final : public Product
{
public:
    explicit Packed(Matrix const& matrix)
        : mRows{matrix.rows}
        , mBlocks{matrix.blocks()}
        , mBlock{matrix.block}
        , mGroups{(matrix.rows + kLanes - 1) / kLanes}
        , mCodeBytes{kLanes * matrix.block * kBits / 8}
    {
        mStep = mCodeBytes + kLanes * (kScaleBytes * (kRests ? 2 : 1) + (kZeros ? 4 : 0));
        mData = allocateWeights(static_cast<size_t>(mGroups * mBlocks * mStep));
        for (int64_t group = 0; group < mGroups; ++group)
        {
            for (int64_t block = 0; block < mBlocks; ++block)
            {
                packBlock(matrix, group, block);
            }
        }
    }

    int64_t groups() const override
    {
        return mGroups;
    }

    void row(int64_t j, int64_t columns, float* numbers) const override
    {
        int64_t const lane = j % kLanes;
        uint8_t const* at = mData.get() + j / kLanes * mBlocks * mStep;
        for (int64_t first = 0; first < columns; first += mBlock, at += mStep)
        {
            int64_t const count = columns - first < mBlock ? columns - first : mBlock;
            uint8_t const* const behind = at + mCodeBytes;
            float const scale = read<kHalves>(behind, lane);
            float counted = static_cast<float>(kMiddle);
            if constexpr (kZeros)
            {
                constexpr float kAway = static_cast<float>(Lanes::kCounted<kBits>);
                counted = read<false>(behind + kLanes * kScaleBytes, lane) + kAway;
            }
            [[maybe_unused]] float rest = 0;
            if constexpr (kRests)
            {
                rest = read<kHalves>(behind + kLanes * kScaleBytes, lane);
                rest = kHalves ? rest + kMiddle * scale : rest;
            }
            for (int64_t place = 0; place < count; ++place)
            {
                uint8_t const byte = at[(place / (4 * kPerByte) * kLanes + lane) * 4 + place % 4];
                int32_t const code = (byte >> (place / 4 % kPerByte * kBits)) & ((1 << kBits) - 1);
                float const number = (static_cast<float>(code) - counted) * scale;
                numbers[first + place] = kRests ? number + rest : number;
            }
        }
    }

    void compute(Tile const& x, int64_t first, int64_t last, float const* bias, float* y) const override
    {
        computeRows<0>(x, first, last, bias, y);
    }

private:
    static constexpr int64_t kLanes = Lanes::kCount;
    static constexpr int64_t kScaleBytes = kHalves ? 2 : 4;
    static constexpr int kPerByte = 8 / kBits;
    static constexpr int32_t kMiddle = 1 << (kBits - 1);

    // A function for each number of rows that a tile may have, from place kIndex of kTileRows on.
    template <size_t kIndex>
    void computeRows(Tile const& x, int64_t first, int64_t last, float const* bias, float* y) const
    {
        constexpr int64_t kRows = kTileRows[kIndex];
        if constexpr (kRows <= kMostRows)
        {
            if (x.rows == kRows)
            {
                for (int64_t group = first; group < last; ++group)
                {
                    computeGroup<kRows>(x, group, bias, y);
                }
                return;
            }
        }
        if constexpr (kIndex + 1 < std::size(kTileRows))
        {
            computeRows<kIndex + 1>(x, first, last, bias, y);
        }
    }

    template <int kRows>
    void computeGroup(Tile const& x, int64_t group, float const* bias, float* y) const
    {
        uint8_t const* at = mData.get() + group * mBlocks * mStep;
        typename Lanes::Floats sums[kRows];
        for (auto& sum : sums)
        {
            sum = Lanes::zero();
        }
        int8_t const* codes = x.codes;
        for (int64_t block = 0; block < mBlocks; ++block, at += mStep, codes += mBlock * kRows)
        {
            int64_t const first = block * kRows;
            addBlock<kRows>(codes, x.scales + first, x.sums + first, x.wholes + first, at, sums);
        }
        int64_t const start = group * kLanes;
        int64_t const width = mRows - start < kLanes ? mRows - start : kLanes;
        for (int row = 0; row < kRows; ++row)
        {
            if (bias != nullptr)
            {
                sums[row] = sums[row] + Lanes::loadSome(bias + start, width);
            }
            Lanes::storeSome(sums[row], y + row * mRows + start, width);
        }
    }

    // What one block of the group's rows of w adds to each row of x.
    template <int kRows>
    inline void addBlock(int8_t const* codes, float const* scales, int32_t const* codeSums, float const* wholes,
        uint8_t const* at, typename Lanes::Floats* sums) const
    {
        // Codes are counted from the middle, or from the zeros; the kernels multiply them as they are.
        constexpr int32_t kAway = kZeros ? 0 : kMiddle - Lanes::kCounted<kBits>;
        typename Lanes::Ints dots[kRows];
        for (int row = 0; row < kRows; ++row)
        {
            dots[row] = Lanes::splat(-kAway * codeSums[row]);
        }
        for (int64_t byte = 0; byte < mCodeBytes; byte += kLanes * 4, codes += 4 * kPerByte * kRows)
        {
            auto const loaded = Lanes::template load<kBits>(at + byte);
            for (int row = 0; row < kRows; ++row)
            {
                dots[row] = Lanes::template dot<kBits, 4 * kRows>(dots[row], loaded, codes + 4 * row);
            }
        }
        uint8_t const* const behind = at + mCodeBytes;
        auto const steps = Lanes::template loadNumbers<kHalves>(behind);
        [[maybe_unused]] typename Lanes::Floats rests;
        if constexpr (kRests)
        {
            rests = Lanes::template loadNumbers<kHalves>(behind + kLanes * kScaleBytes);
            if constexpr (kHalves)
            {
                rests = Lanes::multiplyAdd(steps, Lanes::splatFloat(static_cast<float>(kMiddle)), rests);
            }
        }
        [[maybe_unused]] typename Lanes::Floats zeros;
        if constexpr (kZeros)
        {
            zeros = Lanes::template loadNumbers<false>(behind + kLanes * kScaleBytes);
        }
        for (int row = 0; row < kRows; ++row)
        {
            auto whole = Lanes::toFloats(dots[row]);
            if constexpr (kZeros)
            {
                // Of integers below 2^24: exact.
                whole = Lanes::multiplySubtract(
                    zeros, Lanes::splatFloat(static_cast<float>(codeSums[row])), whole);
            }
            auto const both = steps * Lanes::splatFloat(scales[row]);
            sums[row] = Lanes::multiplyAdd(whole, both, sums[row]);
            if constexpr (kRests)
            {
                sums[row] = Lanes::multiplyAdd(rests, Lanes::splatFloat(wholes[row]), sums[row]);
            }
        }
    }

    static uint8_t codeOf(uint8_t const* codes, int64_t place)
    {
        return (codes[place / kPerByte] >> (place % kPerByte * kBits)) & ((1 << kBits) - 1);
    }

    // Four neighbours of each row of w to 32 bits; of two and four bits, the next four in the bits above.
    void packBlock(Matrix const& matrix, int64_t group, int64_t block)
    {
        uint8_t* const at = mData.get() + (group * mBlocks + block) * mStep;
        std::memset(at, 0, static_cast<size_t>(mStep));
        int64_t const bytes = mBlock * kBits / 8;
        for (int64_t lane = 0; lane < kLanes && group * kLanes + lane < mRows; ++lane)
        {
            int64_t const row = group * kLanes + lane;
            uint8_t const* const codes = matrix.codes + (row * mBlocks + block) * bytes;
            for (int64_t place = 0; place < mBlock; ++place)
            {
                int64_t const word = place / (4 * kPerByte);
                int64_t const above = place / 4 % kPerByte;
                at[(word * kLanes + lane) * 4 + place % 4] |= codeOf(codes, place) << (above * kBits);
            }
            packNumbers(matrix, row, block, at + mCodeBytes, lane);
        }
    }

    void packNumbers(Matrix const& matrix, int64_t row, int64_t block, uint8_t* behind, int64_t lane) const
    {
        float const scale = matrix.scales[row * mBlocks + block];
        store(behind, lane, scale);
        if constexpr (kRests)
        {
            float const rest = matrix.rests[block * mRows + row];
            store(behind + kLanes * kScaleBytes, lane, kHalves ? rest - kMiddle * scale : rest);
        }
        if constexpr (kZeros)
        {
            uint8_t const* const zeros = matrix.zeros + row * ((mBlocks * kBits + 7) / 8);
            float const zero = static_cast<float>(codeOf(zeros, block) - Lanes::kCounted<kBits>);
            std::memcpy(behind + kLanes * kScaleBytes + lane * 4, &zero, 4);
        }
    }

    template <bool kShort>
    static float read(uint8_t const* numbers, int64_t lane)
    {
        if constexpr (kShort)
        {
            uint16_t half;
            std::memcpy(&half, numbers + lane * 2, 2);
            return fromHalf(half);
        }
        else
        {
            float number;
            std::memcpy(&number, numbers + lane * 4, 4);
            return number;
        }
    }

    static void store(uint8_t* numbers, int64_t lane, float number)
    {
        if constexpr (kHalves)
        {
            uint16_t const half = toHalf(number);
            std::memcpy(numbers + lane * 2, &half, 2);
        }
        else
        {
            std::memcpy(numbers + lane * 4, &number, 4);
        }
    }

    int64_t mRows;
    int64_t mBlocks;
    int64_t mBlock;
    int64_t mGroups;
    int64_t mCodeBytes; // of one block of a group
    int64_t mStep;      // from one block to the next
    std::shared_ptr<uint8_t> mData;
};

// Whether scales, and offsets (what is left of rests when codes count from 0), are float16 numbers: as
// those of our checkpoints and of GGUF files are. Held so they take half the memory; nothing is lost but
// what the rests themselves were rounded by when they were summed in float32.
inline bool areHalves(Matrix const& matrix)
{
    constexpr float kRoundings = 4 * std::numeric_limits<float>::epsilon();
    int64_t const blocks = matrix.blocks();
    float const middle = static_cast<float>(1 << (matrix.bits - 1));
    for (int64_t row = 0; row < matrix.rows; ++row)
    {
        for (int64_t block = 0; block < blocks; ++block)
        {
            float const scale = matrix.scales[row * blocks + block];
            if (fromHalf(toHalf(scale)) != scale)
            {
                return false;
            }
            if (matrix.rests != nullptr)
            {
                float const rest = matrix.rests[block * matrix.rows + row];
                float const offset = rest - middle * scale;
                float const lost = std::fabs(fromHalf(toHalf(offset)) - offset);
                if (!(lost <= kRoundings * (std::fabs(rest) + std::fabs(middle * scale))))
                {
                    return false;
                }
            }
        }
    }
    return true;
}

template <int kBits, bool kHalves>
std::unique_ptr<Product> packBits(Matrix const& matrix)
{
    if (matrix.zeros != nullptr)
    {
        return std::make_unique<Packed<kBits, true, false, kHalves>>(matrix);
    }
    if (matrix.rests != nullptr)
    {
        return std::make_unique<Packed<kBits, false, true, kHalves>>(matrix);
    }
    return std::make_unique<Packed<kBits, false, false, kHalves>>(matrix);
}

template <int kBits>
std::unique_ptr<Product> packWidth(Matrix const& matrix)
{
    return areHalves(matrix) ? packBits<kBits, true>(matrix) : packBits<kBits, false>(matrix);
}

inline std::unique_ptr<Product> pack(Matrix const& matrix)
{
    switch (matrix.bits)
    {
    case 2: return packWidth<2>(matrix);
    case 4: return packWidth<4>(matrix);
    default: return packWidth<8>(matrix);
    }
}
