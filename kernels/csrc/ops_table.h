// Functions of one instruction set that ops-inl.h provides (norms, rope, attention, routing).
#pragma once

#include <stdint.h>

namespace ktd {

struct OpsTable {};

}  // namespace ktd
