// The kernels, for the shim that precedes. Included inside an instruction set's namespace.

#include "generic/simd.h"
#include "generic/exp2.h"
#include "generic/activations.h"
#include "generic/map.h"
#include "generic/softmax.h"
#include "generic/softmax_columns.h"
#include "generic/softmax_masked.h"
#include "generic/attention.h"
#include "generic/table.h"
