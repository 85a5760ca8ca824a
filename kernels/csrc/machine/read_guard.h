// Mapped files that may be cut short, or become unreadable, while kernels read them.
#pragma once

#include <cstddef>

namespace ktd {

// While one lives, reading a page of its mapping that the file no longer has (the system sends SIGBUS) turns
// that page and the rest of the mapping into zeros and sets `broken`, instead of ending the process. Other
// faults take the way they had when the first guard was made.
class ReadGuard {
 public:
  // `data` is where a mapping of `bytes` bytes begins: a whole page. Throws std::length_error beyond 16,384
  // guards at once.
  ReadGuard(const void* data, size_t bytes);
  ~ReadGuard();
  ReadGuard(const ReadGuard&) = delete;
  ReadGuard& operator=(const ReadGuard&) = delete;

  bool broken() const;

 private:
  size_t slot_;
};

}  // namespace ktd
