#pragma once  // within one instruction set
// Five trits in a byte b as the fraction b / 256 in base 3 (packed.h; any b means some trits).

// In the two high bits: trit + 1.
inline VecI trit_bits(VecI code) { return average_u8(code, average_u8(code, set_i8(-3))); }
inline VecI next_trit(VecI code) { return add_i8(add_i8(code, code), code); }
