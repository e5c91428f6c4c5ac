// Fibers: the threads of one CUDA block on one CPU thread.

#ifndef SKIPCAT_EMULATE_FIBER_H
#define SKIPCAT_EMULATE_FIBER_H

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include <ucontext.h>

namespace skipcat::emulate
{

[[noreturn]] inline void fail(char const* what)
{
    std::fprintf(stderr, "emulation: %s\n", what);
    std::exit(3);
}

inline std::mt19937& randomness()
{
    static std::mt19937 generator(
        std::getenv("SKIPCAT_EMULATE_SEED") != nullptr ? std::atoi(std::getenv("SKIPCAT_EMULATE_SEED")) : 1);
    return generator;
}

enum class Scope
{
    kWarp,
    kBlock
};

// Up to 16 bytes on their way to shared memory.
struct Copy
{
    void* to;
    size_t size;
    unsigned char bytes[16];
};

struct Fiber
{
    ucontext_t context{};
    std::vector<unsigned char> stack;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    bool ended{false};
};

// Who has come to a barrier, and how often it has opened.
struct Gate
{
    int arrived{0};
    int opened{0};
    int members{0};
};

class Block
{
public:
    Block(int threads, size_t sharedBytes, std::function<void()> body, std::function<void(int)> enter)
        : mBody(std::move(body))
        , mEnter(std::move(enter))
        , mFibers(static_cast<size_t>(threads))
        , mWarps(static_cast<size_t>(threads) / 32)
        , mLanes(static_cast<size_t>(threads) / 32)
        // One more line than asked, so that the start can be aligned; all NaN.
        , mShared(sharedBytes + 128, 0xff)
    {
        mAll.members = threads;
        for (Gate& gate : mWarps)
        {
            gate.members = 32;
        }
    }

    Fiber& current()
    {
        return mFibers[static_cast<size_t>(mCurrent)];
    }

    unsigned char* shared()
    {
        uintptr_t const address = reinterpret_cast<uintptr_t>(mShared.data());
        return mShared.data() + (128 - address % 128) % 128;
    }

    void barrier(Scope scope)
    {
        Gate& gate = scope == Scope::kBlock ? mAll : mWarps[static_cast<size_t>(mCurrent) / 32];
        int const seen = gate.opened;
        if (++gate.arrived == gate.members)
        {
            gate.arrived = 0;
            ++gate.opened;
            mMoved = true;
            return;
        }
        while (gate.opened == seen)
        {
            yield();
        }
    }

    // What each lane of this warp gives, by lane; valid until the warp's next barrier.
    std::array<std::array<unsigned char, 24>, 32>& exchange(void const* mine, size_t bytes)
    {
        auto& lanes = mLanes[static_cast<size_t>(mCurrent) / 32];
        std::memcpy(lanes[static_cast<size_t>(mCurrent) % 32].data(), mine, bytes);
        barrier(Scope::kWarp);
        return lanes;
    }

    void run();

private:
    void yield()
    {
        int const self = mCurrent;
        swapcontext(&mFibers[static_cast<size_t>(self)].context, &mScheduler);
    }

    static void start();

    std::function<void()> mBody;
    std::function<void(int)> mEnter;
    std::vector<Fiber> mFibers;
    std::vector<Gate> mWarps;
    std::vector<std::array<std::array<unsigned char, 24>, 32>> mLanes;
    std::vector<unsigned char> mShared;
    Gate mAll;
    ucontext_t mScheduler{};
    int mCurrent{0};
    bool mMoved{false};
};

inline Block*& running()
{
    static Block* block = nullptr;
    return block;
}

inline Block& block()
{
    return *running();
}

inline void Block::start()
{
    Block& self = block();
    self.mBody();
    self.current().ended = true;
    self.mMoved = true;
    self.yield();
}

inline void Block::run()
{
    running() = this;
    std::vector<int> order(mFibers.size());
    for (size_t i = 0; i < order.size(); ++i)
    {
        order[i] = static_cast<int>(i);
        Fiber& fiber = mFibers[i];
        fiber.stack.resize(64 * 1024);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Block::start, 0);
    }
    while (!order.empty())
    {
        std::shuffle(order.begin(), order.end(), randomness());
        mMoved = false;
        for (int const fiber : order)
        {
            mCurrent = fiber;
            mEnter(fiber);
            swapcontext(&mScheduler, &mFibers[static_cast<size_t>(fiber)].context);
        }
        order.erase(std::remove_if(order.begin(), order.end(),
                        [this](int fiber) { return mFibers[static_cast<size_t>(fiber)].ended; }),
            order.end());
        if (!mMoved && !order.empty())
        {
            fail("some threads wait at a barrier that the others do not come to");
        }
    }
}

inline void runBlock(
    int threads, size_t sharedBytes, std::function<void()> const& body, std::function<void(int)> const& enter)
{
    auto const made = std::make_unique<Block>(threads, sharedBytes, body, enter);
    made->run();
}

} // namespace skipcat::emulate

#endif
