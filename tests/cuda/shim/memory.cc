#include "memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#include "fibres.h"

namespace cuda_shim {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t GUARD = 0; // AddressSanitizer watches both ends
#else
constexpr size_t GUARD = 4096;
#endif
constexpr size_t ALIGNMENT = 256; // of cudaMalloc

// The accesses of one byte that a later one can conflict with. Of several readers two are enough: a writer is at most
// one of them.
struct Byte {
    Moment write, reads[2];
    bool written = false;
};

struct Region {
    char *memory, *begin;
    size_t size;
    std::string name;
    std::vector<Byte> bytes;
};

std::map<const char *, Region> regions; // by their first byte of guard: a call may have thousands
Region *shared = nullptr;

Region *find(const char *address) {
    auto next = regions.upper_bound(address);
    if (next == regions.begin()) return nullptr;
    Region &region = (--next)->second;
    return address < region.begin + region.size + GUARD ? &region : nullptr;
}

Region *make(size_t bytes, const char *name) {
    Region region;
    // Under AddressSanitizer the end matters to the byte; a multiple of the alignment would hide it.
    void *memory = nullptr;
    if (posix_memalign(&memory, ALIGNMENT, bytes + 2 * GUARD + (bytes + GUARD == 0)) != 0) abort();
    region.memory = static_cast<char *>(memory);
    region.begin = region.memory + GUARD, region.size = bytes, region.name = name;
    memset(region.memory, options.poison, bytes + 2 * GUARD);
    region.bytes.resize(bytes);
    return &(regions[region.memory] = region);
}

void drop(const Region *region) {
    char *memory = region->memory;
    regions.erase(memory);
    free(memory);
}

bool happened_before(const Moment &before, const Moment &after) {
    if (before.launch != after.launch) return true;
    if (before.block != after.block) return false;
    if (before.thread == after.thread || before.block_epoch != after.block_epoch) return true;
    return before.thread / 32 == after.thread / 32 && before.warp_epoch != after.warp_epoch;
}

std::string place(const Region &region, const char *address) {
    return region.name + ", byte " + std::to_string(address - region.begin) + " of " + std::to_string(region.size);
}

std::string who(const Moment &moment) {
    return "thread " + std::to_string(moment.thread) + " of block " + std::to_string(moment.block);
}

void check_race(const Region &region, const char *address, const Moment &earlier, const Moment &moment,
                const char *what) {
    if (earlier.launch && !happened_before(earlier, moment))
        report(std::string("race (") + what + ") at " + place(region, address) + ": " + who(earlier) + " and " +
               who(moment));
}

[[maybe_unused]] void access(const void *data, size_t size, bool writes) {
    const char *address = static_cast<const char *>(data);
    if (on_fibre_stack(address)) return;
    Region *region = find(address);
    if (!region) return; // constants, and what belongs to the shim
    const char *kind = writes ? "write" : "read";
    const bool outside = address < region->begin || address + size > region->begin + region->size;
    const bool misaligned = size <= 16 && reinterpret_cast<uintptr_t>(address) % size != 0;
    if (outside || misaligned) {
        report(std::string(outside ? "out of bounds: " : "misaligned: ") + kind + " of " + std::to_string(size) +
               " bytes at " + place(*region, address) + " by " + where_am_i());
        abandon();
    }
    const Moment moment = now();
    for (size_t i = 0; i < size; i++) {
        Byte &byte = region->bytes[address - region->begin + i];
        if (!writes && !byte.written) {
            report("uninitialised read at " + place(*region, address + i) + " by " + who(moment));
            byte.written = true; // said once
        }
        check_race(*region, address, byte.write, moment, writes ? "write after write" : "read after write");
        if (writes) {
            for (const Moment &read : byte.reads) check_race(*region, address, read, moment, "write after read");
            byte.write = moment, byte.written = true;
            continue;
        }
        for (Moment &read : byte.reads) {
            const bool mine = read.block == moment.block && read.thread == moment.thread;
            if (!read.launch || mine || happened_before(read, moment)) {
                read = moment;
                break;
            }
        }
    }
}

} // namespace

void *allocate(size_t bytes, const char *name) { return make(bytes, name)->begin; }

void release(void *data) {
    const auto found = regions.find(static_cast<const char *>(data) - GUARD);
    if (data && found != regions.end()) drop(&found->second);
}

void mark_written(const void *data, size_t bytes) {
    const char *address = static_cast<const char *>(data);
    Region *region = find(address);
    for (size_t i = 0; region && i < bytes; i++) region->bytes[address - region->begin + i].written = true;
}

bool all_written(const void *data, size_t bytes) {
    const char *address = static_cast<const char *>(data);
    const Region *region = find(address);
    for (size_t i = 0; region && i < bytes; i++)
        if (!region->bytes[address - region->begin + i].written) return false;
    return true;
}

namespace {

template <typename T>
void check_atomic(T *address) {
    const char *byte = reinterpret_cast<const char *>(address);
    Region *region = find(byte);
    if (region && (byte < region->begin || byte + sizeof *address > region->begin + region->size)) {
        report("out of bounds: atomic at " + place(*region, byte) + " by " + where_am_i());
        abandon();
    }
    if (checks_accesses() && !all_written(address, sizeof *address))
        report("uninitialised read at " + (region ? place(*region, byte) : "unknown memory") + " by " + where_am_i());
    mark_written(address, sizeof *address);
}

template <typename T>
T fetch_and_add(T *address, T value) {
    check_atomic(address);
    const T before = *address;
    *address = before + value;
    return before;
}

} // namespace

int exchange(int *address, int value) {
    check_atomic(address);
    const int before = *address;
    *address = value;
    return before;
}

unsigned add(unsigned *address, unsigned value) { return fetch_and_add(address, value); }
unsigned long long add(unsigned long long *address, unsigned long long value) { return fetch_and_add(address, value); }

void new_shared_memory(size_t bytes) {
    if (shared) drop(shared);
    shared = bytes ? make(bytes, "shared memory") : nullptr;
}

void *shared_memory() {
    if (!shared) {
        report("shared memory was not asked for at the launch, " + where_am_i());
        abandon();
    }
    return shared->begin;
}

} // namespace cuda_shim

// What g++ -fsanitize=thread calls before every access to memory that is not a thread's own. The names are its
// interface (gcc/sanitizer.def).
#ifndef __SANITIZE_ADDRESS__
bool cuda_shim::checks_accesses() { return true; }

#define SHIM_ACCESS(size)                                                                                              \
    void __tsan_read##size(void *data) { cuda_shim::access(data, size, false); }                                       \
    void __tsan_write##size(void *data) { cuda_shim::access(data, size, true); }                                       \
    void __tsan_unaligned_read##size(void *data) { cuda_shim::access(data, size, false); }                             \
    void __tsan_unaligned_write##size(void *data) { cuda_shim::access(data, size, true); }                             \
    void __tsan_volatile_read##size(void *data) { cuda_shim::access(data, size, false); }                              \
    void __tsan_volatile_write##size(void *data) { cuda_shim::access(data, size, true); }

extern "C" {
SHIM_ACCESS(1)
SHIM_ACCESS(2)
SHIM_ACCESS(4)
SHIM_ACCESS(8)
SHIM_ACCESS(16)
void __tsan_read_range(void *data, size_t size) { cuda_shim::access(data, size, false); }
void __tsan_write_range(void *data, size_t size) { cuda_shim::access(data, size, true); }
void __tsan_init(void) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
}
#else
bool cuda_shim::checks_accesses() { return false; }
#endif
