// Memory that is used again: new pages cost more than small products, as the system clears each when it is first
// written. Blocks that were given back are kept for whoever next needs about as much.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace mmbal {

constexpr int64_t LARGE_PAGE = int64_t{2} << 20;

// Asks for large pages, 512 times fewer faults where the system grants them, for the whole ones of [data, data +
// bytes).
inline void ask_for_large_pages(void *data, int64_t bytes) {
#if defined __linux__ && defined MADV_HUGEPAGE
    constexpr uintptr_t LARGE = LARGE_PAGE;
    const auto first = (reinterpret_cast<uintptr_t>(data) + LARGE - 1) / LARGE * LARGE;
    const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / LARGE * LARGE;
    if (data && first < end) madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Large pages that nobody has written to, or NULL; bytes is a multiple of LARGE_PAGE. Not from the heap: what somebody
// has freed there may lie in small pages, and stays so whatever is asked for.
inline void *fresh_pages(int64_t bytes) {
    constexpr uintptr_t LARGE = LARGE_PAGE;
    const auto size = static_cast<size_t>(bytes);
#if defined __linux__
    void *mapped = mmap(nullptr, size + LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    const auto begin = reinterpret_cast<uintptr_t>(mapped), first = (begin + LARGE - 1) / LARGE * LARGE;
    if (first > begin) munmap(mapped, first - begin);
    munmap(reinterpret_cast<void *>(first + size), begin + LARGE - first);
    ask_for_large_pages(reinterpret_cast<void *>(first), bytes);
    return reinterpret_cast<void *>(first);
#else
    return std::aligned_alloc(LARGE, size);
#endif
}

inline void free_pages(void *data, int64_t bytes) {
#if defined __linux__
    if (data) munmap(data, static_cast<size_t>(bytes));
#else
    (void)bytes;
    std::free(data);
#endif
}

struct Block {
    void *data = nullptr;
    int64_t bytes = 0;
    bool offered = false; // its pages, to the system
};

// Blocks are whole large pages.
class KeptMemory {
public:
    static constexpr int64_t PAGE = LARGE_PAGE;

    // limit: bytes that are kept at most; beyond it the oldest are freed. at_hand: as many bytes, of the newest, are
    // not offered to the system.
    explicit KeptMemory(int64_t limit, int64_t at_hand = int64_t{64} << 20) : limit_(limit), at_hand_(at_hand) {}
    ~KeptMemory() { free_all(); }
    KeptMemory(const KeptMemory &) = delete;
    KeptMemory &operator=(const KeptMemory &) = delete;

    // data is NULL where the memory cannot be had.
    Block take(int64_t bytes) {
        const int64_t wanted = rounded(bytes);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            auto best = blocks_.end();
            for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
                const bool fits = it->bytes >= wanted && it->bytes <= 2 * wanted;
                if (fits && (best == blocks_.end() || it->bytes <= best->bytes)) best = it;
            }
            if (best != blocks_.end()) {
                const Block found = *best;
                blocks_.erase(best);
                total_ -= found.bytes;
                if (!found.offered) not_offered_ -= found.bytes;
                return {found.data, found.bytes};
            }
        }
        Block made = {fresh_pages(wanted), wanted};
        if (!made.data) { // what is kept may be in the way
            free_all();
            made.data = fresh_pages(wanted);
        }
        return made;
    }

    // Until somebody takes a block that has lain for a while, the system may have its pages (MADV_FREE), should it run
    // short. Small ones go to and fro in every step, and the call would cost them more than their work.
    void give(Block block) noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        try {
            if (block.bytes <= limit_) {
                blocks_.push_back({block.data, block.bytes});
                total_ += block.bytes, not_offered_ += block.bytes, block.data = nullptr;
            }
        } catch (const std::bad_alloc &) { // freed below like one above the limit
        }
        free_pages(block.data, block.bytes);
        for (Block &oldest : blocks_)
            if (not_offered_ > at_hand_ && !oldest.offered) offer(&oldest);
        while (total_ > limit_) {
            total_ -= blocks_.front().bytes;
            if (!blocks_.front().offered) not_offered_ -= blocks_.front().bytes;
            free_pages(blocks_.front().data, blocks_.front().bytes);
            blocks_.erase(blocks_.begin());
        }
    }

    // Bytes kept, and those of them that the system may not have.
    int64_t kept() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return total_;
    }
    int64_t not_offered() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return not_offered_;
    }

private:
    void offer(Block *block) {
#if defined __linux__ && defined MADV_FREE
        madvise(block->data, static_cast<size_t>(block->bytes), MADV_FREE);
#endif
        block->offered = true;
        not_offered_ -= block->bytes;
    }

    void free_all() {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const Block &each : blocks_) free_pages(each.data, each.bytes);
        blocks_.clear();
        total_ = not_offered_ = 0;
    }

    // Whole large pages, in steps of an eighth, so that sizes that differ a little fit each other.
    static int64_t rounded(int64_t bytes) {
        int64_t step = PAGE;
        while (step <= bytes / 16) step *= 2;
        return (bytes < 1 ? 1 : (bytes + step - 1) / step) * step;
    }

    const int64_t limit_, at_hand_;
    mutable std::mutex mutex_;
    std::vector<Block> blocks_; // the oldest first
    int64_t total_ = 0, not_offered_ = 0;
};

} // namespace mmbal
