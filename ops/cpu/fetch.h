/* Rows of memory on their way into the second-level cache while something else is computed. */
#ifndef MMBAL_CPU_FETCH_H
#define MMBAL_CPU_FETCH_H

#include <stdint.h>

#include "arena.h"
#include "blocks.h"

/* Rows that packing has on the way from memory. */
enum { FETCH_AHEAD = 8 };

typedef struct fetch {
    const char *first;
    int64_t stride, rows, lines; /* bytes between rows, rows, cache lines of a row */
    int64_t row, line;           /* the next one */
} fetch;

static inline fetch make_fetch(const void *first, int64_t stride, int64_t rows, int64_t width) {
    const fetch made = {(const char *)first, stride, rows, ceil_div(width, CACHE_LINE), 0, 0};
    return made;
}

static inline void fetch_lines(fetch *f, int64_t count) {
    for (; count > 0 && f->row < f->rows; count--) {
        __builtin_prefetch(f->first + f->row * f->stride + f->line * CACHE_LINE, 0, 2);
        if (++f->line == f->lines) f->line = 0, f->row++;
    }
}

#endif
