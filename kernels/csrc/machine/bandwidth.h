// How fast this machine reads memory: the wall of every decode step.
#pragma once

namespace ktd {

// Bytes a second that `threads` threads read together from buffers far larger than the caches, each its own,
// over about `seconds`.
double memory_bandwidth(int threads, double seconds);

}  // namespace ktd
