/* The logistic function of float32 with AVX-512: a division of sixteen numbers takes as long as all the rest of it, so
 * the reciprocal comes from its estimate and one step of Newton's method. Errors as those of the division. */
#include <immintrin.h>

/* 1 / (1 + exp(-z)) */
static inline __m512 sigmoid_sixteen(__m512 z) {
    /* -z, where exp(-z) is neither 0 nor infinite for sure; of a NaN and a number, min and max give the second */
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-104.0f),
                                   _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_sub_ps(_mm512_setzero_ps(), z)));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts, and the series of exp to order 7: elementary.h */
    const __m512 r =
        _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), y));
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    const __m512 one_and_exp = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, n));
    const __m512 estimate = _mm512_rcp14_ps(one_and_exp);
    const __m512 error = _mm512_fnmadd_ps(one_and_exp, estimate, _mm512_set1_ps(1.0f));
    const __m512 reciprocal = _mm512_fmadd_ps(estimate, error, estimate);
    const __mmask16 infinite = _mm512_cmp_ps_mask(one_and_exp, _mm512_set1_ps(INFINITY), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(reciprocal, infinite, _mm512_setzero_ps());
}
