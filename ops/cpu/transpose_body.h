/* Transposition for one width of element: WORD, an unsigned integer, which any element of that width may alias. */

typedef WORD NAME(word) __attribute__((aligned(2), may_alias)); /* two 16-bit elements may be a word */
typedef WORD NAME(four) __attribute__((vector_size(4 * sizeof(WORD))));
typedef NAME(four) NAME(unaligned_four) __attribute__((aligned(2), may_alias));

static inline void NAME(transpose_four)(const NAME(word) * from, int64_t from_stride, NAME(word) * to,
                                        int64_t to_stride) {
    const NAME(four) a = *(const NAME(unaligned_four) *)from;
    const NAME(four) b = *(const NAME(unaligned_four) *)(from + from_stride);
    const NAME(four) c = *(const NAME(unaligned_four) *)(from + 2 * from_stride);
    const NAME(four) d = *(const NAME(unaligned_four) *)(from + 3 * from_stride);
    const NAME(four) ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
    const NAME(four) cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
    *(NAME(unaligned_four) *)to = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
    *(NAME(unaligned_four) *)(to + to_stride) = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    *(NAME(unaligned_four) *)(to + 2 * to_stride) = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
    *(NAME(unaligned_four) *)(to + 3 * to_stride) = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

/* to[j, i] = from[i, j], 0 <= i < rows, 0 <= j < cols; strides in elements. Goes by stretches of four lines of each
 * row; the next stretch is fetched meanwhile, as so many rows are more streams than the processor would follow by
 * itself. */
static void NAME(transpose)(const void *from, int64_t from_stride, int64_t rows, int64_t cols, void *to,
                            int64_t to_stride) {
    enum { A_LINE = CACHE_LINE / sizeof(WORD), ACROSS = 4 * A_LINE };
    for (int64_t left = 0; left < cols; left += ACROSS) {
        const int64_t across = least(ACROSS, cols - left), whole = across / 4 * 4;
        for (int64_t i = 0; i < rows; i += 4) {
            const int64_t down = least(4, rows - i), fast = down == 4 ? whole : 0;
            const NAME(word) *source = (const NAME(word) *)from + i * from_stride + left;
            NAME(word) *target = (NAME(word) *)to + left * to_stride + i;
            for (int64_t k = 0; k < down; k++)
                for (int64_t j = ACROSS; j < least(2 * ACROSS, cols - left); j += A_LINE)
                    __builtin_prefetch(source + k * from_stride + j);
            for (int64_t j = 0; j < fast; j += 4)
                NAME(transpose_four)(source + j, from_stride, target + j * to_stride, to_stride);
            for (int64_t j = fast; j < across; j++)
                for (int64_t k = 0; k < down; k++) target[j * to_stride + k] = source[k * from_stride + j];
        }
    }
}
