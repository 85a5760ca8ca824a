#include "moe.h"

namespace ktd {

void moe(Cpu&, const MoeArgs&) {}

}  // namespace ktd
