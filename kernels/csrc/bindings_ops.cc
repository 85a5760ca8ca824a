// Python methods of the ops in ops-inl.h.
#include "bindings.h"

namespace ktd {

void bind_ops(nb::class_<Cpu>&) {}

}  // namespace ktd
