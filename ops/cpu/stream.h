/* Stores that go around the caches: memory that is only written need not be read first, which halves the traffic. */
#ifndef MMBAL_CPU_STREAM_H
#define MMBAL_CPU_STREAM_H

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* Less than this may still be in a third-level cache when it is read again. */
enum { STREAMED_BYTES = 8 << 20 };

static inline void stream_bytes(void *to, const void *from, int64_t bytes) {
#ifdef __SSE2__
    if ((uintptr_t)to % sizeof(__m128i) == 0) {
        const int64_t whole = bytes / (int64_t)sizeof(__m128i);
        for (int64_t i = 0; i < whole; i++)
            _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
        const int64_t done = whole * (int64_t)sizeof(__m128i);
        memcpy((char *)to + done, (const char *)from + done, (size_t)(bytes - done));
        return;
    }
#endif
    memcpy(to, from, (size_t)bytes);
}

/* Makes what was streamed visible to other threads like any other store. */
static inline void stream_end(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

#endif
