// What layer norm and RMS norm are told beyond the rows.

#ifndef QUAKE_CORE_NORM_H_
#define QUAKE_CORE_NORM_H_

namespace quake {

struct Norm {
  const float* scale;   // one for each column
  const float* offset;  // likewise, or null
  float epsilon;        // added to the mean of the squares
  bool centered;        // layer norm, which subtracts the mean; otherwise RMS norm
};

}  // namespace quake

#endif  // QUAKE_CORE_NORM_H_
