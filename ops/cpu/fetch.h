/* Rows of memory on their way into a cache while something else is computed. Few lines at a time: a core
 * waits once it has some twenty on the way. */
#ifndef MMBAL_CPU_FETCH_H
#define MMBAL_CPU_FETCH_H

#include <stdint.h>

#include "arena.h"
#include "blocks.h"

/* Rows that packing and epilogues have on the way from memory. */
enum { FETCH_AHEAD = 8 };

typedef struct fetch {
    const char *first;
    int64_t stride, rows, lines; /* bytes between rows, rows, cache lines of a row */
    int64_t row, line;           /* the next one */
    int64_t pace;                /* lines for each of the steps that they are spread over */
} fetch;

static inline fetch make_fetch(const void *first, int64_t stride, int64_t rows, int64_t width) {
    const fetch made = {(const char *)first, stride, rows, ceil_div(width, CACHE_LINE), 0, 0, 0};
    return made;
}

/* Spreads all lines over so many steps. */
static inline void set_pace(fetch *f, int64_t steps) { f->pace = steps ? ceil_div(f->rows * f->lines, steps) : 0; }

/* Part of a row that is soon read or written, into the first-level cache. */
static inline void fetch_span(const void *first, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch((const char *)first + i, 1, 3);
}

static inline const char *next_line(fetch *f) {
    const char *line = f->first + f->row * f->stride + f->line * CACHE_LINE;
    if (++f->line == f->lines) f->line = 0, f->row++;
    return line;
}

/* The next `count` lines into the second-level cache: what another step of the depth reads. */
static inline void fetch_lines(fetch *f, int64_t count) {
    for (; count > 0 && f->row < f->rows; count--) __builtin_prefetch(next_line(f), 0, 2);
}

/* The same into the first-level cache: what is read at once. */
static inline void fetch_lines_now(fetch *f, int64_t count) {
    for (; count > 0 && f->row < f->rows; count--) __builtin_prefetch(next_line(f), 0, 3);
}

#endif
