/* What attribution_linear.c needs of each sample, for one dtype; see each_dtype.h and mmbal/attribution.h. */

/* Coefficients of the weights' rows in the score's gradient, of samples begin .. end; the embeddings as real. */
static mmbal_status NAME(linear_scores_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const mmbal_linear_head *head = t->head;
    const int64_t C = head->C;
    for (int64_t b = begin; b < end; b++) {
        const STORED *z = (const STORED *)head->logits + b * C;
        REAL *coefficient = (REAL *)t->coefficients + b * C;
        int64_t chosen = head->classes ? head->classes[b] : 0;
        for (int64_t c = 1; c < C && !head->classes; c++)
            if (LOAD(z[c]) > LOAD(z[chosen])) chosen = c;
        REAL largest = -(REAL)INFINITY, sum = 0;
        for (int64_t c = 0; c < C; c++) {
            coefficient[c] = 0;
            if (c != chosen && (LOAD(z[c]) > largest || isnan(LOAD(z[c])))) largest = LOAD(z[c]);
        }
        /* Where no other class is left the odds are the logit, but for a constant. */
        const int odds = head->score == MMBAL_SCORE_ODDS && largest != -(REAL)INFINITY;
        for (int64_t c = 0; c < C && odds; c++) {
            coefficient[c] = c == chosen ? 0 : OF_REAL(exp_nonpositive)(LOAD(z[c]) - largest);
            sum += coefficient[c];
        }
        for (int64_t c = 0; c < C && sum != 0; c++)
            coefficient[c] =
                coefficient[c] < (REAL)(sizeof(REAL) == 4 ? negligible : 0) * sum ? 0 : -coefficient[c] / sum;
        coefficient[chosen] = C == 1 && head->score == MMBAL_SCORE_ODDS && LOAD(z[0]) < 0 ? -1 : 1;
        for (int64_t m = 0; m < t->attribution->M; m++) {
            const mmbal_attributed *of = &t->attribution->modalities[m];
            const STORED *e = (const STORED *)of->embedding + b * of->d;
            REAL *real = (REAL *)t->embeddings[m] + b * of->d;
            for (int64_t i = 0; i < of->d && (const void *)real != (const void *)e; i++) real[i] = LOAD(e[i]);
        }
    }
    return MMBAL_OK;
}
