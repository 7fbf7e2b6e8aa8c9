// The kernels of all families, for the shim that precedes. Included inside an instruction set's namespace.

#include "core/vector-inl.h"
#include "core/exponential-inl.h"
#include "core/tanh-inl.h"
#include "core/norm-inl.h"
#include "core/words-inl.h"
#include "core/product-inl.h"
#include "core/pack-inl.h"
#include "core/fill-inl.h"

#include "elementwise/activations-inl.h"
#include "elementwise/map-inl.h"
#include "elementwise/fill-inl.h"

#include "rows/softmax-inl.h"
#include "rows/columns-inl.h"
#include "rows/masked-inl.h"
#include "rows/norm-inl.h"
#include "rows/fill-inl.h"

#include "attention/tiles-inl.h"
#include "attention/softmax-inl.h"
#include "attention/scores-inl.h"
#include "attention/few_rows-inl.h"
#include "attention/fill-inl.h"

#include "dense/words-inl.h"
#include "dense/product-inl.h"
#include "dense/rows-inl.h"
#include "dense/finish-inl.h"
#include "dense/fill-inl.h"

// All slots for the types T; a set that extends another names its own instead.
template <class... T>
void fill_all(KernelTable& table) {
  fill_attention<T...>(table.attention);
  fill_elementwise<T...>(table.elementwise);
  fill_rows<T...>(table.rows);
  fill_dense<T...>(table.dense);
}
