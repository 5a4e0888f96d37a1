/* Rows of memory on their way into a cache while something else is computed. Few lines at a time: a core
 * waits once it has some twenty on the way. */
#ifndef MMBAL_CPU_FETCH_H
#define MMBAL_CPU_FETCH_H

#include <stdint.h>

#include "arena.h"
#include "blocks.h"

enum {
    FETCH_AHEAD = 8,  /* rows that packing and epilogues have on the way from memory */
    FETCH_STEPS = 4,  /* of its depth that a tile takes between two fetches */
    ROWS_TOGETHER = 4 /* pages that a core looks up at once */
};

/* `lines` cache lines, step bytes apart, `rows` times, and all of that as many times as there are groups. */
typedef struct fetch {
    const char *line;          /* the next one */
    int64_t step, lines, left; /* left: of this row */
    int64_t gap, rows, below;  /* bytes from behind the last line of a row to the next row; rows left of this group */
    int64_t group_gap, groups; /* the same between groups; groups left */
    int64_t pace;              /* lines for each FETCH_STEPS of the steps that they are spread over */
} fetch;

/* What a tile fetches on the way: soon into the first-level cache, later into the second. */
typedef struct fetches {
    fetch soon, later;
} fetches;

static inline fetch make_fetch(const void *first, int64_t stride, int64_t rows, int64_t width) {
    const int64_t lines = ceil_div(width, CACHE_LINE), gap = stride - lines * CACHE_LINE;
    const fetch made = {(const char *)first, CACHE_LINE, lines, lines, gap, rows, rows, 0, lines > 0 && rows > 0, 0};
    return made;
}

/* The same rows in groups of ROWS_TOGETHER, a line of each in turn: as many pages are under way as a core looks up at
 * once, and each is read from end to end. Rows that follow one another without a gap are taken in pieces as long as
 * a page. What is left of less than a group is not fetched: a step of 64 rows leaves nothing, or less than it reads of
 * the next one. */
static inline fetch fetch_together(fetch f) {
    const int64_t page = 4096;
    int64_t rows = f.rows, lines = f.lines, stride = lines * CACHE_LINE + f.gap;
    if (f.gap == 0) rows = rows * stride / page, lines = page / CACHE_LINE, stride = page;
    if (rows < ROWS_TOGETHER || f.groups == 0) return f;
    const int64_t back = CACHE_LINE - ROWS_TOGETHER * stride, onward = ROWS_TOGETHER * stride - lines * CACHE_LINE;
    const fetch made = {f.line, stride, ROWS_TOGETHER, ROWS_TOGETHER,        back,
                        lines,  lines,  onward,        rows / ROWS_TOGETHER, 0};
    return made;
}

static inline int64_t lines_left(const fetch *f) {
    return f->groups > 0 ? ((f->groups - 1) * f->rows + f->below - 1) * f->lines + f->left : 0;
}

/* Spreads the lines that are left over so many steps. */
static inline void set_pace(fetch *f, int64_t steps) {
    f->pace = steps > 0 ? ceil_div(FETCH_STEPS * lines_left(f), steps) : 0;
}

/* Rows, so many bytes apart, of which all lie in a second-level cache of 2048 sets: the sets that a power of two in the
 * distance leaves hold six lines of them each, beside what else there is. */
static inline int64_t rows_that_stay(int64_t stride) {
    const int64_t sets = 2048, lines_of_a_set = 6, lines = stride / CACHE_LINE, power_of_two = lines & -lines;
    const int spread = stride % CACHE_LINE != 0 || lines == 0;
    return lines_of_a_set * (spread ? sets : sets / least(power_of_two, sets));
}

/* Part of a row that is soon read or written, into the first-level cache. */
static inline void fetch_span(const void *first, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch((const char *)first + i, 1, 3);
}

static inline const char *next_line(fetch *f) {
    const char *line = f->line;
    f->line += f->step;
    if (--f->left == 0) {
        f->left = f->lines, f->line += f->gap;
        if (--f->below == 0) f->below = f->rows, f->line += f->group_gap, f->groups--;
    }
    return line;
}

/* The next `count` lines into the second-level cache: what another step of the depth reads. */
static inline void fetch_lines(fetch *f, int64_t count) {
    for (; count > 0 && f->groups > 0; count--) __builtin_prefetch(next_line(f), 0, 2);
}

/* The same into the first-level cache: what is read at once. */
static inline void fetch_lines_now(fetch *f, int64_t count) {
    for (; count > 0 && f->groups > 0; count--) __builtin_prefetch(next_line(f), 0, 3);
}

/* What a tile does before each FETCH_STEPS of its depth. */
static inline void fetch_next(fetches *f) {
    fetch_lines_now(&f->soon, f->soon.pace);
    fetch_lines(&f->later, f->later.pace);
}

#endif
