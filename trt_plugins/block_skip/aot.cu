// The one kernel that aot.py has compiled to PTX, chosen by definitions. Arguments in TensorRT's order:
// inputs, integers, outputs.

#include "aot.cuh"

#if defined(SKIPCAT_AOT_INDEXED) && SKIPCAT_AOT_INDEXED
#define SKIPCAT_AOT_INPUTS SKIPCAT_AOT_TYPE const *in, SKIPCAT_AOT_TYPE const *w, int32_t const *index
#define SKIPCAT_AOT_INDEX index
#else
#define SKIPCAT_AOT_INPUTS SKIPCAT_AOT_TYPE const *in, SKIPCAT_AOT_TYPE const *w
#define SKIPCAT_AOT_INDEX nullptr
#endif

extern "C" __global__ void __launch_bounds__(256, 2)
    SKIPCAT_AOT_NAME(SKIPCAT_AOT_INPUTS, int rows, int reduction, int columns, SKIPCAT_AOT_TYPE* out)
{
    skipcat::aotProduct<SKIPCAT_AOT_TYPE, SKIPCAT_AOT_MIX, SKIPCAT_AOT_VECTOR, SKIPCAT_AOT_TILE_ROWS,
        SKIPCAT_AOT_GATHER>(in, w, SKIPCAT_AOT_INDEX, rows, reduction, columns, out);
}
