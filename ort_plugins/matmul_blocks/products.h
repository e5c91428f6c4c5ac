// A product of rows of numbers with a matrix of low-bit codes, on the CPU:
//
//     y[r][j] = sum over k of x[r][k] w[j][k],  w[j][k] = (code - zero) scale + rest
//
// Codes have 2, 4 or 8 bits; scale, zero and rest belong to a block of neighbours of a row of w. As in
// ONNX Runtime's MatMulNBits with accuracy_level 4, each block of x is rounded to 8 bits with a scale of
// its own, and codes meet codes in integers; what a block's rest adds meets the sum of the numbers of x
// as they are. A row of y depends on its row of x alone, to the last bit: not on how many there are, nor
// on the threads.

#ifndef SKIPCAT_ORT_PRODUCTS_H
#define SKIPCAT_ORT_PRODUCTS_H

#include <cstddef>
#include <cstdint>
#include <memory>

namespace skipcat
{

// A matrix as MatMulNBits takes it.
struct Matrix
{
    int64_t rows;        // outputs
    int64_t columns;     // inputs
    int64_t bits;        // of a code: 2, 4 or 8
    int64_t block;       // columns that share a scale: a multiple of 16
    uint8_t const* codes;  // [rows, blocks, block * bits / 8], the first in the lowest bits
    float const* scales;   // [rows, blocks]
    uint8_t const* zeros;  // [rows, (blocks * bits + 7) / 8], packed likewise; null is the middle code
    float const* rests;    // [blocks, rows]; null is none

    int64_t blocks() const
    {
        return (columns + block - 1) / block;
    }
};

// A few rows of x, rounded, side by side: so that what a step reads of them lies together.
struct Tile
{
    int64_t rows;
    int8_t* codes;   // [blocks * block / 4, rows, 4]
    float* scales;   // [blocks, rows]
    int32_t* sums;   // of codes, [blocks, rows]
    float* wholes;   // sums of the numbers, [blocks, rows]
};

// The same matrix in the order of one kind of CPU, and its product. Packed for as many rows of w at a
// time as one register has numbers: their codes, then their scales, zeros and rests, block by block.
class Product
{
public:
    virtual ~Product() = default;

    // Groups of rows of w, which threads may take in any order.
    virtual int64_t groups() const = 0;

    // y[r][j] for the rows of a tile, whose first is at y, and the rows j of w of groups [first, last).
    virtual void compute(
        Tile const& x, int64_t first, int64_t last, float const* bias, float* y) const
        = 0;

    // Row j of w as numbers, [columns].
    virtual void row(int64_t j, int64_t columns, float* numbers) const = 0;
};

// Round a row of x into its place of a tile.
void roundRow(float const* x, int64_t columns, int64_t block, Tile const& tile, int64_t row);

constexpr int64_t kTileRows[] = {12, 8, 6, 4, 3, 2, 1};

// A kind of CPU that the kernels are compiled for.
struct Instructions
{
    char const* name;
    bool (*available)();
    int64_t mostRows; // of a tile; there are products for tiles of all kTileRows up to it
    std::unique_ptr<Product> (*pack)(Matrix const& matrix);
};

// The kinds of this architecture, the quickest first.
#ifdef __aarch64__
extern Instructions const kNeon; // with dot products
inline constexpr Instructions const* kKinds[] = {&kNeon};
#else
extern Instructions const kAvx512; // with VNNI
extern Instructions const kAvxVnni;
extern Instructions const kAvx2;
inline constexpr Instructions const* kKinds[] = {&kAvx512, &kAvxVnni, &kAvx2};
#endif

// The first of them that this CPU has, or the one that SKIPCAT_KERNELS names; null if there is none.
Instructions const* instructions();

} // namespace skipcat

#endif
