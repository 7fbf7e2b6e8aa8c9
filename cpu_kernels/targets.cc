#include "targets.h"

#include "attention/xla.h"
#include "dense/xla.h"
#include "elementwise/xla.h"
#include "rows/xla.h"

namespace quake {

FfiTargets ffi_targets() {
  FfiTargets all;
  for (const FfiTargets& family :
       {elementwise_targets(), rows_targets(), attention_targets(), dense_targets()}) {
    all.insert(all.end(), family.begin(), family.end());
  }
  return all;
}

}  // namespace quake
