#include "fibres.h"

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "memory.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Saves what a call must leave as it was and goes on with another stack: swapcontext also asks the system for the
// signal mask, and takes ten times as long.
extern "C" void mmbal_switch_stack(void **saved, void *other);
asm(R"(
.text
.globl mmbal_switch_stack
.type mmbal_switch_stack, @function
mmbal_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size mmbal_switch_stack, .-mmbal_switch_stack
)");
#endif

namespace cuda_shim {
namespace {

// Where a fibre, or the scheduler, goes on.
#ifdef __x86_64__
using Context = void *;
void switch_context(Context *from, Context *to) { mmbal_switch_stack(from, *to); }
void begin_context(Context *context, char *stack, size_t size, void (*function)()) {
    constexpr int SAVED = 6;
    void **top = reinterpret_cast<void **>(stack + size) - 2; // as after a call: 8 bytes off a multiple of 16
    top[0] = reinterpret_cast<void *>(function), top[1] = nullptr;
    *context = top - SAVED;
}
#else
using Context = ucontext_t;
void switch_context(Context *from, Context *to) { swapcontext(from, to); }
void begin_context(Context *context, char *stack, size_t size, void (*function)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack, context->uc_stack.ss_size = size, context->uc_link = nullptr;
    makecontext(context, function, 0);
}
#endif

enum class State { READY, AT_BARRIER, AT_PRIMITIVE, EXITED };

constexpr size_t STACK = size_t{256} << 10; // of a fibre: AddressSanitizer's frames are large

struct Fibre {
    Context context{};
    char *stack = nullptr;
    uint3 index{};
    State state = State::READY;
    int site = 0;
    unsigned mask = 0;
    uint64_t given = 0;
    bool orders_memory = false;
    Gathered gathered{};
    std::deque<Copy> copies;
    int64_t groups = 0; // that ended
};

struct Block {
    std::vector<Fibre> fibres; // grows only: stacks are used again
    std::vector<uint32_t> warp_epochs;
    Context scheduler{};
    const std::function<void()> *body = nullptr;
    uint32_t threads = 0, launch = 0, number = 0, epoch = 0;
    int current = -1;
    bool given_up = false;
    const void *scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
};

Block block;
std::vector<std::string> reports;

Fibre &me() { return block.fibres[block.current]; }

void switch_to_scheduler(bool for_good) {
    Fibre &fibre = me();
#ifdef __SANITIZE_ADDRESS__
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, block.scheduler_stack, block.scheduler_stack_size);
    switch_context(&fibre.context, &block.scheduler);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    (void)for_good;
    switch_context(&fibre.context, &block.scheduler);
#endif
}

void resume(int thread) {
    Fibre &fibre = block.fibres[thread];
    block.current = thread;
    threadIdx = fibre.index;
#ifdef __SANITIZE_ADDRESS__
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibre.stack, STACK);
    switch_context(&block.scheduler, &fibre.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    switch_context(&block.scheduler, &fibre.context);
#endif
    block.current = -1;
}

void wait(State state) {
    me().state = state;
    while (me().state == state) switch_to_scheduler(false);
}

// Lets the block's threads go on when all that have not exited are at the barrier.
void release_barrier() {
    int first = -1;
    for (uint32_t t = 0; t < block.threads; t++) {
        const Fibre &fibre = block.fibres[t];
        if (fibre.state == State::EXITED) continue;
        if (fibre.state != State::AT_BARRIER) return;
        if (first < 0) first = static_cast<int>(t);
        if (fibre.site != block.fibres[first].site) {
            report("divergent barrier: thread " + std::to_string(first) + " of block " + std::to_string(block.number) +
                   " is at line " + std::to_string(block.fibres[first].site) + ", thread " + std::to_string(t) +
                   " at line " + std::to_string(fibre.site));
            block.given_up = true;
            return;
        }
    }
    if (first < 0) return;
    block.epoch++;
    for (uint32_t t = 0; t < block.threads; t++)
        if (block.fibres[t].state == State::AT_BARRIER) block.fibres[t].state = State::READY;
}

// Lets the lanes named in a mask go on when all of them that have not exited are there.
void release_primitive(uint32_t warp) {
    const uint32_t begin = warp * 32, end = std::min(begin + 32, block.threads);
    for (uint32_t t = begin; t < end; t++) {
        const Fibre &one = block.fibres[t];
        if (one.state != State::AT_PRIMITIVE) continue;
        Gathered gathered{};
        bool complete = true;
        for (uint32_t u = begin; u < end; u++) {
            const Fibre &other = block.fibres[u];
            if (!(one.mask >> (u - begin) & 1) || other.state == State::EXITED) continue;
            if (other.state != State::AT_PRIMITIVE) {
                complete = false;
                continue;
            }
            if (other.mask != one.mask || other.site != one.site) {
                report("divergent warp primitive: threads " + std::to_string(t) + " and " + std::to_string(u) +
                       " of block " + std::to_string(block.number) + " name each other at lines " +
                       std::to_string(one.site) + " and " + std::to_string(other.site) +
                       (other.mask != one.mask ? " with different masks" : ""));
                block.given_up = true;
                return;
            }
            gathered.present |= 1u << (u - begin);
            gathered.values[u - begin] = other.given;
        }
        if (!complete) continue;
        block.warp_epochs[warp] += one.orders_memory;
        for (uint32_t u = begin; u < end; u++)
            if (gathered.present >> (u - begin) & 1)
                block.fibres[u].gathered = gathered, block.fibres[u].state = State::READY;
    }
}

void enter() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
    (*block.body)();
    me().state = State::EXITED;
    release_primitive(block.current / 32);
    release_barrier();
    switch_to_scheduler(true);
}

void prepare(Fibre &fibre, uint32_t thread) {
    if (!fibre.stack) {
        void *memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) abort();
        fibre.stack = static_cast<char *>(memory);
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fibre.stack, STACK);
#endif
    begin_context(&fibre.context, fibre.stack, STACK, enter);
    fibre.copies.clear();
    fibre.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
    fibre.state = State::READY;
}

// Turns around until all threads have exited. The order of a turn is shuffled where there is a seed.
void run_block(std::mt19937 &random) {
    std::vector<int> order(block.threads);
    std::iota(order.begin(), order.end(), 0);
    for (;;) {
        if (options.seed) std::shuffle(order.begin(), order.end(), random);
        bool moved = false, waiting = false;
        for (const int thread : order) {
            if (block.fibres[thread].state == State::READY) {
                moved = true;
                resume(thread);
                if (block.given_up) return;
            }
            waiting |= block.fibres[thread].state != State::EXITED;
        }
        if (!waiting) return;
        if (moved) continue;
        std::string text = "deadlock in block " + std::to_string(block.number) + ": ";
        for (uint32_t t = 0; t < block.threads; t++) {
            if (block.fibres[t].state == State::EXITED) continue;
            text += "thread " + std::to_string(t) + " waits at line " + std::to_string(block.fibres[t].site);
            break;
        }
        report(text);
        block.given_up = true;
        return;
    }
}

} // namespace

std::vector<std::string> take_reports() {
    block.given_up = false;
    return std::exchange(reports, {});
}

void report(const std::string &text) {
    constexpr int MOST = 4; // of a kind: the first tell enough
    const std::string kind = text.substr(0, text.find(' '));
    const auto same = [&kind](const std::string &each) { return each.compare(0, kind.size(), kind) == 0; };
    if (std::count_if(reports.begin(), reports.end(), same) < MOST) reports.push_back(text);
}

void launch(dim3 grid, dim3 dimensions, size_t shared_bytes, const std::function<void()> &body) {
    constexpr uint64_t MOST_X = 0x7FFFFFFF, MOST_YZ = 65535, MOST_THREADS = 1024;
    const uint64_t threads = uint64_t{dimensions.x} * dimensions.y * dimensions.z;
    if (block.given_up) return; // as a GPU refuses all further work
    block.launch++;
    if (grid.x < 1 || grid.x > MOST_X || grid.y < 1 || grid.y > MOST_YZ || grid.z < 1 || grid.z > MOST_YZ ||
        threads < 1 || threads > MOST_THREADS) {
        report("launch refused: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
               std::to_string(grid.z) + " blocks of " + std::to_string(threads) + " threads");
        return;
    }
    blockDim = dimensions, gridDim = grid;
    block.body = &body, block.threads = static_cast<uint32_t>(threads);
    if (block.fibres.size() < threads) block.fibres.resize(threads);
    std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    std::mt19937 random(options.seed);
    if (options.seed) std::shuffle(order.begin(), order.end(), random);
    for (const uint64_t number : order) {
        blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                    static_cast<unsigned>(number / grid.x / grid.y)};
        block.number = static_cast<uint32_t>(number), block.epoch = 0;
        block.warp_epochs.assign((threads + 31) / 32, 0);
        new_shared_memory(shared_bytes);
        for (uint32_t t = 0; t < threads; t++) prepare(block.fibres[t], t);
        run_block(random);
        if (block.given_up) break;
    }
    new_shared_memory(0);
}

void abandon() {
    block.given_up = true;
    for (;;) switch_to_scheduler(true);
}

void block_barrier(int site) {
    me().site = site, me().state = State::AT_BARRIER;
    release_barrier();
    if (block.given_up) switch_to_scheduler(true);
    if (me().state == State::AT_BARRIER) wait(State::AT_BARRIER);
}

Gathered gather(unsigned mask, uint64_t value, int site, bool orders_memory) {
    if (!(mask >> lane() & 1)) {
        report("divergent warp primitive at line " + std::to_string(site) + ": the mask lacks its caller, " +
               where_am_i());
        abandon();
    }
    Fibre &fibre = me();
    fibre.site = site, fibre.mask = mask, fibre.given = value;
    fibre.orders_memory = orders_memory, fibre.state = State::AT_PRIMITIVE;
    release_primitive(block.current / 32);
    if (block.given_up) switch_to_scheduler(true);
    if (fibre.state == State::AT_PRIMITIVE) wait(State::AT_PRIMITIVE);
    return fibre.gathered;
}

void begin_copy(void *to, const void *from) { me().copies.push_back({to, from, me().groups}); }

void end_group_of_copies() { me().groups++; }

bool take_copy(int pending, Copy *copy) {
    Fibre &fibre = me();
    if (fibre.copies.empty() || fibre.copies.front().group >= fibre.groups - pending) return false;
    *copy = fibre.copies.front();
    fibre.copies.pop_front();
    return true;
}

int lane() { return block.current & 31; }

std::string where_am_i() {
    return "thread " + std::to_string(block.current) + " of block " + std::to_string(block.number);
}

Moment now() {
    const auto thread = static_cast<uint32_t>(block.current);
    return {block.launch, block.number, thread, block.epoch, block.warp_epochs[thread / 32]};
}

bool on_fibre_stack(const void *address) {
    if (block.current < 0) return true; // no kernel runs: whatever this is, it is not a thread's
    const char *stack = me().stack, *byte = static_cast<const char *>(address);
    return byte >= stack && byte < stack + STACK;
}

} // namespace cuda_shim
