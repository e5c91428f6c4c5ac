// Runs the kernels on the CPU and compares with double precision, over shapes that a GPU would see.
//
//     compare [CASES [SEED]]      exit status 0 when every case is within its bound
//
// Inputs are fresh with every seed and lie in allocations of their exact size; outputs and scratch memory hold NaN.

#include <cstdio>
#include <cstdlib>

#include "random_call.h"

namespace
{

using namespace skipcat::latent;

double relativeError(Problem const& p, Random& random)
{
    Call const call(p, random);
    // A small chip and a large one: a context that is hardly split, and one of many stretches.
    int const multiprocessors = random() % 2 == 0 ? 4 : 132;
    Buffer<unsigned char> workspace(workspaceBytes(p, multiprocessors));
    bool const rebuilt = call.tables.rebuilt;
    auto const steps = [](RandomSide const& side) { return side.steps.bytes > 0 ? side.steps.data : nullptr; };
    Pointers const pointers{call.query.held.data, call.mask.data, call.keys.stored(), steps(call.keys),
        call.values.stored(), steps(call.values), rebuilt ? call.tables.up.held.data : nullptr,
        rebuilt ? call.tables.mean.held.data : nullptr, rebuilt ? call.tables.cos.data : nullptr,
        rebuilt ? call.tables.sin.data : nullptr, call.mixed.data};
    if (latentAttention(p, pointers, multiprocessors, workspace.data, nullptr) != cudaSuccess)
    {
        return INFINITY;
    }
    return call.relativeError();
}

} // namespace

int main(int argc, char** argv)
{
    int const cases = argc > 1 ? std::atoi(argv[1]) : 40;
    Random random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : std::random_device{}());
    int beyond = 0;
    for (int i = 0; i < cases; ++i)
    {
        Problem const p = randomProblem(random, true);
        double const error = relativeError(p, random);
        bool const good = error <= boundOf(p);
        beyond += good ? 0 : 1;
        std::printf("%s %s batch %d heads %2d queries %d slots %3d width %3d %s keys %d x %3d (%d) values %d x %3d (%d): %.2e\n",
            good ? "ok  " : "FAIL", p.bf16 ? "bf16" : "fp16", p.batch, p.heads, p.queries, p.slots, p.width,
            p.headsPerGroup > 0 ? "rebuilt" : "narrow ", p.keys.groups, p.keys.held, static_cast<int>(p.keys.form),
            p.values.groups, p.values.held, static_cast<int>(p.values.form), error);
    }
    std::printf("%d cases, %d beyond their bound\n", cases, beyond);
    return beyond == 0 ? 0 : 1;
}
