/* Sorts float64 numbers with the positions they came from. */
#ifndef MMBAL_CPU_RADIX_SORT_H
#define MMBAL_CPU_RADIX_SORT_H

#include <stdint.h>
#include <string.h>

enum { RADIX_BITS = 11, RADIX_DIGITS = 6, RADIX_BUCKETS = 1 << RADIX_BITS }; /* 66 bits cover the 64 of a number */

typedef struct {
    uint64_t key;
    int32_t from;
} sort_entry;

/* An unsigned number that orders as the float64 does; -0 as 0. NaN is not expected. */
static inline uint64_t sort_key(double value) {
    const double number = value + 0.0;
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits >> 63 ? ~bits : bits | UINT64_C(1) << 63;
}

static inline double sorted_number(uint64_t key) {
    const uint64_t bits = key >> 63 ? key & ~(UINT64_C(1) << 63) : ~key;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* By key, equal keys in the order they come; returns where the result lies: entries or spare, both [n]. */
static inline sort_entry *radix_sort(sort_entry *entries, sort_entry *spare, int64_t n) {
    int32_t starts[RADIX_DIGITS][RADIX_BUCKETS];
    memset(starts, 0, sizeof starts);
    for (int64_t i = 0; i < n; i++)
        for (int digit = 0; digit < RADIX_DIGITS; digit++)
            starts[digit][entries[i].key >> digit * RADIX_BITS & (RADIX_BUCKETS - 1)]++;
    for (int digit = 0; digit < RADIX_DIGITS; digit++) {
        int32_t *start = starts[digit], next = 0;
        const int shift = digit * RADIX_BITS;
        if (n > 0 && start[entries[0].key >> shift & (RADIX_BUCKETS - 1)] == n) continue; /* all the same: in order */
        for (int bucket = 0; bucket < RADIX_BUCKETS; bucket++) {
            const int32_t count = start[bucket];
            start[bucket] = next, next += count;
        }
        for (int64_t i = 0; i < n; i++) spare[start[entries[i].key >> shift & (RADIX_BUCKETS - 1)]++] = entries[i];
        sort_entry *sorted = spare;
        spare = entries, entries = sorted;
    }
    return entries;
}

#endif
