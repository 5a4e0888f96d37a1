/* Rows of the alignment loss for one dtype; see each_dtype.h and mmbal/alignment.h. Elements are taken in float64: no
 * square of a float32 over- or underflows there. */

/* Sums of <a, a>, <a, b> and <b, b>. */
static void NAME(products_of)(const STORED *a, const STORED *b, int64_t n, double *aa, double *ab, double *bb) {
    double side_aa[PARTS] = {0}, side_ab[PARTS] = {0}, side_bb[PARTS] = {0};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            const double x = (double)LOAD(a[i + part]), y = (double)LOAD(b[i + part]);
            side_aa[part] += x * x, side_ab[part] += x * y, side_bb[part] += y * y;
        }
    for (int part = 0; i < n; i++, part++) {
        const double x = (double)LOAD(a[i]), y = (double)LOAD(b[i]);
        side_aa[part] += x * x, side_ab[part] += x * y, side_bb[part] += y * y;
    }
    *aa = sum_of_parts(side_aa), *ab = sum_of_parts(side_ab), *bb = sum_of_parts(side_bb);
}

static double NAME(norm_of)(const STORED *x, int64_t n) {
    double side[PARTS] = {0};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) side[part] += (double)LOAD(x[i + part]) * (double)LOAD(x[i + part]);
    for (int part = 0; i < n; i++, part++) side[part] += (double)LOAD(x[i]) * (double)LOAD(x[i]);
    return sqrt(sum_of_parts(side));
}

static mmbal_status NAME(unit_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const unit_rows *rows = context;
    for (int64_t a = begin; a < end; a++) {
        const STORED *x = (const STORED *)rows->x + a * rows->width;
        REAL *unit = (REAL *)rows->unit + a * rows->stride;
        const int counted = !rows->present || rows->present[a];
        const double norm = counted ? NAME(norm_of)(x, rows->width) : 0;
        const double factor = norm <= LEAST_NORM ? 1 / LEAST_NORM : 1 / norm;
        rows->inverse[a] = norm <= LEAST_NORM ? 0 : 1 / norm;
        for (int64_t i = 0; i < rows->width && counted; i++) unit[i] = (REAL)((double)LOAD(x[i]) * factor);
        for (int64_t i = counted ? rows->width : 0; i < rows->stride; i++) unit[i] = 0;
    }
    return MMBAL_OK;
}

/* x's gradient from that of its unit vector. */
static void NAME(unit_gradient)(const unit_rows *rows, int64_t a, const void *dunit) {
    const REAL *unit = (const REAL *)rows->unit + a * rows->stride, *d = dunit;
    STORED *dx = (STORED *)rows->dx + a * rows->width;
    const double inverse = rows->inverse[a];
    double side[PARTS] = {0};
    int64_t at = 0;
    for (; at + PARTS <= rows->width && inverse != 0; at += PARTS)
        for (int part = 0; part < PARTS; part++) side[part] += (double)unit[at + part] * (double)d[at + part];
    for (int part = 0; at < rows->width && inverse != 0; at++, part++) side[part] += (double)unit[at] * (double)d[at];
    const double along = sum_of_parts(side);
    for (int64_t i = 0; i < rows->width; i++)
        dx[i] = STORE(inverse == 0 ? 0 : (REAL)(inverse * ((double)d[i] - along * (double)unit[i])));
}

static double NAME(sum_of_distances)(const mmbal_alignment *t, const STORED *pred, const STORED *target) {
    const double beta = t->beta, half_inverse = beta > 0 ? 0.5 / beta : 0;
    const int squared = t->regression != MMBAL_REGRESSION_SMOOTH_L1;
    double side[PARTS] = {0};
    for (int64_t i = 0; i < t->D; i += PARTS) {
        const int64_t here = t->D - i < PARTS ? t->D - i : PARTS;
        for (int64_t part = 0; part < here; part++) {
            const double d = (double)LOAD(pred[i + part]) - (double)LOAD(target[i + part]), size = fabs(d);
            side[part] += squared ? d * d : size < beta ? d * d * half_inverse : size - 0.5 * beta;
        }
    }
    return sum_of_parts(side);
}

static mmbal_status NAME(regression_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const regression_rows *rows = context;
    const mmbal_alignment *t = rows->alignment;
    for (int64_t b = begin; b < end; b++) {
        const STORED *pred = (const STORED *)t->pred + b * t->D, *target = (const STORED *)t->target + b * t->D;
        rows->losses[b] = 0;
        if (t->present && !t->present[t->offset + b]) continue;
        if (t->regression == MMBAL_REGRESSION_COSINE) {
            double pp, pt, tt;
            NAME(products_of)(pred, target, t->D, &pp, &pt, &tt);
            rows->losses[b] = 1 - pt / (fmax(sqrt(pp), LEAST_NORM) * fmax(sqrt(tt), LEAST_NORM));
            if (isnan(pt)) rows->losses[b] = NAN; /* fmax hides one */
            continue;
        }
        rows->losses[b] = NAME(sum_of_distances)(t, pred, target);
        if (t->regression != MMBAL_REGRESSION_L2) rows->losses[b] /= (double)t->D;
    }
    return MMBAL_OK;
}

/* d cos(x, y) / dx = (y / |y| - cos x / |x|) / |x|, times scale */
static void NAME(cosine_gradient)(const STORED *x, const STORED *y, int64_t n, double xx, double xy, double yy,
                                  double scale, STORED *dx) {
    const double of_x = fmax(sqrt(xx), LEAST_NORM), of_y = fmax(sqrt(yy), LEAST_NORM);
    const double to_y = scale / (of_x * of_y), to_x = scale * xy / (of_x * of_y) / (of_x * of_x);
    const int clamped = sqrt(xx) <= LEAST_NORM;
    for (int64_t i = 0; i < n; i++)
        dx[i] = STORE(clamped ? 0 : (REAL)(to_y * (double)LOAD(y[i]) - to_x * (double)LOAD(x[i])));
}

static mmbal_status NAME(regression_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const regression_rows *rows = context;
    const mmbal_alignment *t = rows->alignment;
    const int64_t D = t->D;
    const double beta = t->beta, inverse = beta > 0 ? 1 / beta : 0;
    const int squared = t->regression != MMBAL_REGRESSION_SMOOTH_L1;
    const double scale = t->regression == MMBAL_REGRESSION_L2 ? rows->scale : rows->scale / (double)D;
    for (int64_t b = begin; b < end; b++) {
        const STORED *pred = (const STORED *)t->pred + b * D, *target = (const STORED *)t->target + b * D;
        STORED *dpred = rows->dpred ? (STORED *)rows->dpred + b * D : NULL;
        STORED *dtarget = rows->dtarget ? (STORED *)rows->dtarget + b * D : NULL;
        const int counted = !t->present || t->present[t->offset + b];
        if (!counted || rows->scale == 0) {
            for (int64_t i = 0; i < D && dpred; i++) dpred[i] = STORE((REAL)0);
            for (int64_t i = 0; i < D && dtarget; i++) dtarget[i] = STORE((REAL)0);
            continue;
        }
        if (t->regression == MMBAL_REGRESSION_COSINE) {
            double pp, pt, tt;
            NAME(products_of)(pred, target, D, &pp, &pt, &tt);
            if (dpred) NAME(cosine_gradient)(pred, target, D, pp, pt, tt, -rows->scale, dpred);
            if (dtarget) NAME(cosine_gradient)(target, pred, D, tt, pt, pp, -rows->scale, dtarget);
            continue;
        }
        for (int64_t i = 0; i < D; i++) {
            const double d = (double)LOAD(pred[i]) - (double)LOAD(target[i]), size = fabs(d);
            const double sign = d > 0 ? 1 : d < 0 ? -1 : d; /* 0 at 0, NaN at NaN */
            const double slope = scale * (squared ? 2 * d : size < beta ? d * inverse : sign);
            if (dpred) dpred[i] = STORE((REAL)slope);
            if (dtarget) dtarget[i] = STORE((REAL)-slope);
        }
    }
    return MMBAL_OK;
}
