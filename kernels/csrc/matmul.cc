#include "matmul.h"

namespace ktd {

void linear(Cpu&, const Weight&, Rows<const float>, int64_t, Rows<float>, bool) {}

}  // namespace ktd
