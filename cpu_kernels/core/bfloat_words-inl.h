// bfloat16 for instruction sets that have no instructions for it: rounding, and no products. Included inside an
// instruction set's namespace, before vector-inl.h.

// The bits of x with the upper half rounded to a bfloat16, to nearest even, and the lower half left over. The
// NaNs that reach this have their low half clear (they come from a bfloat16 or from an invalid operation), so
// the addition cannot carry them into an infinity.
QUAKE_INLINE vi round_to_bfloat(vf x) {
  const vi bits = (vi)x;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

QUAKE_INLINE vh float_to_bfloat(vf x) { return narrow((round_to_bfloat(x) >> 16) & 0xffff); }

QUAKE_INLINE vi join_bfloats(vf even, vf odd) {
  return ((round_to_bfloat(even) >> 16) & 0xffff) | (round_to_bfloat(odd) & ~0xffff);
}
