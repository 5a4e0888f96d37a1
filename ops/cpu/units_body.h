/* Squares of units and their products for one dtype; see each_dtype.h and units.h. */

/* In float64, where no square of a float32 over- or underflows. */
static double NAME(squares_of_run)(const STORED *x, int64_t n, int64_t stride) {
    double parts[PARTS] = {0}, sum = 0;
    int64_t i = 0;
    if (stride == 1 && n >= PARTS) {
        for (; i + PARTS <= n; i += PARTS)
            for (int part = 0; part < PARTS; part++) {
                const double value = LOAD(x[i + part]);
                parts[part] += value * value;
            }
        for (int part = 0; part < PARTS; part++) sum += parts[part];
    }
    for (; i < n; i++) {
        const double value = LOAD(x[i * stride]);
        sum += value * value;
    }
    return sum;
}

static void NAME(squares_of_neighbours)(const STORED *x, int64_t n, int64_t stride, double *sums) {
    if (stride == 1) {
        for (int64_t u = 0; u < n; u++) {
            const double value = LOAD(x[u]);
            sums[u] += value * value;
        }
        return;
    }
    for (int64_t u = 0; u < n; u++) {
        const double value = LOAD(x[u * stride]);
        sums[u] += value * value;
    }
}

static void NAME(squares)(const unit_block *b, double *sums) {
    for (int64_t u = 0; u < b->units; u++) sums[u] = 0;
    for (int64_t row = b->first_row; row < b->end_row; row++) {
        const int64_t first = row % b->parts * ROW_PART, left = b->inner - first;
        const int64_t n = left < ROW_PART ? left : ROW_PART;
        const STORED *x = (const STORED *)b->data + row / b->parts * b->outer_stride + first * b->inner_stride;
        if (n == 1) {
            NAME(squares_of_neighbours)(x, b->units, b->unit_stride, sums);
            continue;
        }
        for (int64_t u = 0; u < b->units; u++)
            sums[u] += NAME(squares_of_run)(x + u * b->unit_stride, n, b->inner_stride);
    }
}

static void NAME(multiply_run)(STORED *x, int64_t n, int64_t stride, const STORED *base, int64_t base_stride,
                               REAL scale) {
    if (!base && scale == 0 && stride == 1) {
        memset(x, 0, (size_t)n * sizeof *x); /* what it holds is not read */
    } else if (!base && stride == 1) {
        for (int64_t i = 0; i < n; i++) x[i] = STORE(scale * LOAD(x[i]));
    } else if (!base) {
        for (int64_t i = 0; i < n; i++)
            x[i * stride] = scale == 0 ? STORE((REAL)0) : STORE(scale * LOAD(x[i * stride]));
    } else if (scale == 0) {
        for (int64_t i = 0; i < n; i++) x[i * stride] = base[i * base_stride];
    } else {
        for (int64_t i = 0; i < n; i++) {
            const REAL from = LOAD(base[i * base_stride]);
            x[i * stride] = STORE(from + scale * (LOAD(x[i * stride]) - from));
        }
    }
}

static void NAME(multiply)(const unit_block *b, const double *scale) {
    for (int64_t row = b->first_row; row < b->end_row; row++) {
        const int64_t outer = row / b->parts, first = row % b->parts * ROW_PART, left = b->inner - first;
        const int64_t n = left < ROW_PART ? left : ROW_PART;
        STORED *x = (STORED *)b->data + outer * b->outer_stride + first * b->inner_stride;
        const STORED *base = b->base;
        if (base) base += outer * b->base_outer_stride + first * b->base_inner_stride;
        if (n == 1 && !base && b->unit_stride == 1) {
            for (int64_t u = 0; u < b->units; u++) {
                const STORED product = STORE((REAL)scale[u] * LOAD(x[u]));
                x[u] = scale[u] == 1 ? x[u] : scale[u] == 0 ? STORE((REAL)0) : product;
            }
            continue;
        }
        for (int64_t u = 0; u < b->units; u++)
            if (scale[u] != 1)
                NAME(multiply_run)(x + u * b->unit_stride, n, b->inner_stride,
                                   base ? base + u * b->base_unit_stride : NULL, b->base_inner_stride, (REAL)scale[u]);
    }
}
