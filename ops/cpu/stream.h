/* Stores that go around the caches: memory that is only written need not be read first, which halves the traffic. */
#ifndef MMBAL_CPU_STREAM_H
#define MMBAL_CPU_STREAM_H

#include <stdint.h>
#include <string.h>

#include "arena.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

/* Less than this may still be in a third-level cache when it is read again. */
enum { STREAMED_BYTES = 8 << 20 };

/* One cache line, aligned at `to`. */
static inline void stream_line(void *to, const void *from) {
#if defined __AVX512F__
    _mm512_stream_si512(to, _mm512_loadu_si512(from));
#elif defined __SSE2__
    for (int i = 0; i < CACHE_LINE / (int)sizeof(__m128i); i++)
        _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
#else
    memcpy(to, from, CACHE_LINE);
#endif
}

static inline void stream_bytes(void *to, const void *from, int64_t bytes) {
    char *target = (char *)to;
    const char *source = (const char *)from;
    const int64_t before = (int64_t)(-(uintptr_t)to % CACHE_LINE), head = before < bytes ? before : bytes;
    const int64_t whole = (bytes - head) / CACHE_LINE * CACHE_LINE, tail = bytes - head - whole;
    if (head) memcpy(target, source, (size_t)head);
    for (int64_t i = head; i < head + whole; i += CACHE_LINE) stream_line(target + i, source + i);
    if (tail) memcpy(target + head + whole, source + head + whole, (size_t)tail);
}

/* Makes what was streamed visible to other threads like any other store. */
static inline void stream_end(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

#endif
