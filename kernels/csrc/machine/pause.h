// What a thread does between two looks at a word that another one will write.
#pragma once

namespace ktd {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");  // a YIELD is over at once
#else
#error "The kernels are for x86-64 and aarch64."
#endif
}

}  // namespace ktd
