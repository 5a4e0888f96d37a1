/* Cross entropies and entropies of rows for one dtype; see each_dtype.h and significance.h. */

static REAL NAME(largest_of_row)(const STORED *row, int64_t n) {
    REAL parts[PARTS], largest;
    for (int part = 0; part < PARTS; part++) parts[part] = -(REAL)INFINITY;
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            const REAL x = LOAD(row[i + part]);
            parts[part] = x > parts[part] ? x : parts[part];
        }
    largest = parts[0];
    for (int part = 1; part < PARTS; part++) largest = parts[part] > largest ? parts[part] : largest;
    for (; i < n; i++) largest = LOAD(row[i]) > largest ? LOAD(row[i]) : largest;
    return largest;
}

/* With d = x - largest: the sum of exp(d), and that of d exp(d), whose term is 0 where exp(d) is. */
static void NAME(exponential_sums)(const STORED *row, int64_t n, REAL largest, double *sum, double *moment) {
    REAL sums[PARTS] = {0}, moments[PARTS] = {0};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            const REAL d = LOAD(row[i + part]) - largest, e = OF_REAL(exp_nonpositive)(d);
            sums[part] += e;
            moments[part] += e == 0 ? 0 : d * e;
        }
    for (int part = 0; i < n; i++, part++) {
        const REAL d = LOAD(row[i]) - largest, e = OF_REAL(exp_nonpositive)(d);
        sums[part] += e;
        moments[part] += e == 0 ? 0 : d * e;
    }
    *sum = *moment = 0;
    for (int part = 0; part < PARTS; part++) *sum += (double)sums[part], *moment += (double)moments[part];
}

static mmbal_status NAME(cross_entropy_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const labelled_rows *t = context;
    for (int64_t b = begin; b < end; b++) {
        t->result[b] = 0;
        if (t->targets[b] == t->ignore_index) continue;
        const STORED *row = (const STORED *)t->values + b * t->width;
        const REAL largest = NAME(largest_of_row)(row, t->width);
        double sum, moment;
        NAME(exponential_sums)(row, t->width, largest, &sum, &moment);
        t->result[b] = log(sum) + ((double)largest - (double)LOAD(row[t->targets[b]]));
    }
    return MMBAL_OK;
}

static mmbal_status NAME(softmax_entropy_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const labelled_rows *t = context;
    for (int64_t b = begin; b < end; b++) {
        t->result[b] = 0;
        if (t->targets[b] == t->ignore_index) continue;
        const STORED *row = (const STORED *)t->values + b * t->width;
        double sum, moment;
        NAME(exponential_sums)(row, t->width, NAME(largest_of_row)(row, t->width), &sum, &moment);
        t->result[b] = log(sum) - moment / sum;
    }
    return MMBAL_OK;
}
