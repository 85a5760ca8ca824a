#include "machine/read_guard.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>

namespace ktd {
namespace {

// A split has 9,999 files at most.
constexpr size_t kSlots = 16384;

// The handler may interrupt anything, so it takes no lock and needs no memory: it reads these. `end` is 0 in
// a free slot, and set last.
struct Slot {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> broken{false};
};
static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

Slot slots[kSlots];
std::mutex making;  // guards the claiming of slots and `installed`
bool installed = false;
uintptr_t page_size = 0;
struct sigaction previous;

// Whether the page at `address` lies in a guarded mapping, whose rest is now zeros. All of it at once: page
// by page, a large file would take more mappings than a process may have.
bool replace(uintptr_t address) {
  for (Slot& slot : slots) {
    const uintptr_t end = slot.end.load(std::memory_order_acquire);
    if (address >= end || address < slot.begin.load(std::memory_order_relaxed)) continue;
    const uintptr_t page = address & ~(page_size - 1);
    slot.broken.store(true, std::memory_order_release);  // before anybody can read a zero
    return mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
  }
  return false;
}

void on_bus_error(int number, siginfo_t* info, void*) {
  const int error = errno;
  const bool sent = info->si_code <= 0;  // by kill() and the like, which name no address
  if (sent || !replace(reinterpret_cast<uintptr_t>(info->si_addr))) {
    // As if this handler were not there: the access is made again, what was sent is sent again.
    sigaction(number, &previous, nullptr);
    if (sent) raise(number);
  }
  errno = error;
}

void install() {
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &previous);
}

}  // namespace

ReadGuard::ReadGuard(const void* data, size_t bytes) {
  const std::lock_guard<std::mutex> lock(making);
  if (!installed) install();
  installed = true;
  for (slot_ = 0; slot_ < kSlots; ++slot_) {
    Slot& slot = slots[slot_];
    if (slot.end.load(std::memory_order_relaxed)) continue;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    slot.broken.store(false, std::memory_order_relaxed);
    slot.begin.store(begin, std::memory_order_relaxed);
    slot.end.store((begin + bytes + page_size - 1) & ~(page_size - 1), std::memory_order_release);
    return;
  }
  throw std::length_error("more than 16384 mapped files are guarded at once");
}

ReadGuard::~ReadGuard() { slots[slot_].end.store(0, std::memory_order_release); }

bool ReadGuard::broken() const { return slots[slot_].broken.load(std::memory_order_acquire); }

}  // namespace ktd
