// The scheduler of the CUDA shim: a block's threads as fibres, their barriers and warp primitives.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>
#include <vector>

namespace cuda_shim {

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

struct Options {
    unsigned seed = 0;           // 0: threads and blocks in ascending order; others shuffle both
    unsigned char poison = 0xFF; // what uninitialised memory holds: 0xFF is a NaN, or -1
};
inline Options options;

// What was found since the last call, in words; empty where nothing was.
std::vector<std::string> take_reports();
void report(const std::string &text);

// Runs body once for every thread of the grid. A launch that fails is given up, its report says where, and later ones
// do nothing until the reports are taken.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &body);

// For a thread of a running launch:
[[noreturn]] void abandon(); // ends the launch; the stacks of its threads are not unwound
void block_barrier(int site);
struct Gathered {
    uint64_t values[32];
    unsigned present; // lanes of the mask that have not exited
};
// A rendezvous of the lanes named in mask. orders_memory: what they wrote before is there after, as __syncwarp promises
// and a shuffle does not.
Gathered gather(unsigned mask, uint64_t value, int site, bool orders_memory = false);
int lane();
void *shared_memory();
std::string where_am_i();

// A thread's copies that nobody has waited for, of 16 bytes, in groups.
struct Copy {
    void *to;
    const void *from;
    int64_t group;
};
void begin_copy(void *to, const void *from);
void end_group_of_copies();
// Whether one of its groups but the last `pending` has a copy left; it is given out once, to be made now: as late as a
// GPU may.
bool take_copy(int pending, Copy *copy);

// When something happened in a launch; memory.h asks whether a barrier lies between two accesses.
struct Moment {
    uint32_t launch = 0, block = 0, thread = 0, block_epoch = 0, warp_epoch = 0;
};
Moment now();
bool on_fibre_stack(const void *address);

} // namespace cuda_shim
