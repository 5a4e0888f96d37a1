// The memory of the CUDA shim, and what is checked about it: every access of a kernel where it was compiled with
// -fsanitize=thread (the calls that g++ inserts then end in memory.cc and not in ThreadSanitizer); under
// AddressSanitizer the bounds alone, by exact allocations.
#pragma once

#include <stddef.h>

namespace cuda_shim {

// Global memory, poisoned; `written` says that all of it holds what the host put there. `name` is for reports.
void *allocate(size_t bytes, const char *name);
void release(void *data);
void mark_written(const void *data, size_t bytes);
// Whether a kernel wrote anything there, or the host (mark_written).
bool all_written(const void *data, size_t bytes);

// Atomics by a thread of a kernel; each returns what was there. They are no race with other atomics.
int exchange(int *address, int value);
unsigned add(unsigned *address, unsigned value);
unsigned long long add(unsigned long long *address, unsigned long long value);

// Whether accesses are checked in this build.
bool checks_accesses();

// Exactly as much for the block that begins.
void new_shared_memory(size_t bytes);

} // namespace cuda_shim
