/* Cuts a workspace into aligned pieces. From NULL it only adds up what is needed. */
#ifndef MMBAL_CPU_ARENA_H
#define MMBAL_CPU_ARENA_H

#include <stdint.h>

enum { CACHE_LINE = 64 };

typedef struct arena {
    uintptr_t next;
} arena;

static inline void *carve(arena *from, int64_t bytes) {
    const uintptr_t start = (from->next + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    from->next = start + (uintptr_t)bytes;
    return (void *)start;
}

/* What an arena that began at NULL has handed out, with room to align any first byte. */
static inline int64_t bytes_carved(const arena *from) { return (int64_t)from->next + CACHE_LINE; }

#endif
