// How the op is cut into blocks, and where a block keeps what in shared memory.

#ifndef SKIPCAT_LATENT_BLOCKS_CUH
#define SKIPCAT_LATENT_BLOCKS_CUH

#include "device.cuh"

#include "latent_attention.h"

namespace skipcat::latent
{

constexpr int kThreads = 128;
constexpr int kRows = 16;
constexpr int kTokens = 64;
constexpr int kPiece = 64;
constexpr int kPieces = 8;       // of the values, that a block keeps sums for
constexpr int kColumns = 128;    // of rebuilt keys, made at once
constexpr int kStride = kPiece + 8;
constexpr int kColumnStride = kColumns + 8;
constexpr int kScoreStride = kTokens + 1;
constexpr int kPartners = kThreads / kRows; // threads that look after one row
constexpr float kClosed = -16384.0f;
constexpr float kNothing = -3.0e38f;

struct Arguments
{
    Problem problem;
    Pointers pointers;
    float* shares;  // [rows of blocks, splits, 16, 64 * pieces of the values]
    float* maximum; // [rows of blocks, splits, 16]
    float* total;   // likewise
    int units;      // groups of heads that share keys and values
    int rowTiles;
    int stretch; // tokens, a multiple of 64
    int splits;
    int slices; // of the values' pieces, kPieces each
};

__host__ __device__ inline int rankOf(Side const& side)
{
    return side.form == Form::kNibbles ? 2 * side.held : side.held;
}

__host__ __device__ inline int piecesOf(Side const& side)
{
    int const unit = side.form == Form::kNibbles ? kPiece / 2 : kPiece;
    return (side.held + unit - 1) / unit;
}

// Numbers of a staged query: in the order of the keys' pieces, or as they are.
__host__ __device__ inline int queryStride(Problem const& p)
{
    return (p.headsPerGroup > 0 ? p.width : kPiece * piecesOf(p.keys)) + 8;
}

struct Layout
{
    int query, piece, up, keys, scores, shares, state, bytes;
};

__host__ __device__ inline Layout layoutOf(Problem const& p)
{
    Layout at{};
    bool const rebuilt = p.headsPerGroup > 0;
    at.query = 0;
    at.piece = at.query + kRows * queryStride(p) * 2;
    at.up = at.piece + kTokens * kStride * 2;
    at.keys = at.up + (rebuilt ? kPiece * kColumnStride * 2 : 0);
    at.scores = at.keys + (rebuilt ? kTokens * (p.width + 8) * 2 : 0);
    at.shares = at.scores + (kRows * kScoreStride * 4 + 15) / 16 * 16;
    at.state = at.shares + kRows * kStride * 2;
    // Largest score, sum and factor of a row, what its threads find, and which tokens are open.
    at.bytes = at.state + (kRows * (3 + kPartners) + kTokens + 4) * 4;
    return at;
}

struct Place
{
    int batch, unit, rowTile, split, slice;
    int row;     // of blocks, for what they share
    int head;    // the first of the unit
    int perUnit; // heads of it
    int rows;    // of the tile that there are
};

// `rows`: of a block; `p`: arguments of either kernel.
template <typename Given>
__device__ __forceinline__ Place placeOf(Given const& p, int rows)
{
    Place at{};
    at.row = static_cast<int>(blockIdx.x);
    at.unit = at.row % p.units;
    at.rowTile = at.row / p.units % p.rowTiles;
    at.batch = at.row / p.units / p.rowTiles;
    at.split = static_cast<int>(blockIdx.y) / p.slices;
    at.slice = static_cast<int>(blockIdx.y) % p.slices;
    at.perUnit = p.problem.heads / p.units;
    at.head = at.unit * at.perUnit;
    int const left = at.perUnit * p.problem.queries - rows * at.rowTile;
    at.rows = left < rows ? left : rows;
    return at;
}

// Head and query of a row of a block of so many.
__device__ __forceinline__ int2 queryOf(Problem const& problem, Place const& at, int rows, int row)
{
    int const number = rows * at.rowTile + row;
    return {at.head + number / problem.queries, number % problem.queries};
}

} // namespace skipcat::latent

#endif
