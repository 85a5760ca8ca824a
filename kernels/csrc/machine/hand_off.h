// How fast a pool gets all its threads to work.
#pragma once

#include "machine/pool.h"

namespace ktd {

// Seconds of one parallel loop in which every thread waits for all others to have come, as the median of
// `loops` with a pause of `gap` seconds between two. A gap longer than the workers spin shows the cost of
// waking them.
double hand_off(Pool& pool, int loops, double gap);

}  // namespace ktd
