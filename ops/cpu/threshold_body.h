/* Which products of a block pass their column's threshold, for one REAL; few do. See retrieval_body.h. */

static int64_t NAME(at_least)(const void *z, int64_t rows, int64_t cols, int64_t stride, const void *thresholds,
                              int32_t *places) {
    enum { TOGETHER = 4 }; /* rows that are looked through at once where none passes */
    const REAL *least = thresholds;
    int64_t count = 0;
    for (int64_t first = 0; first < rows; first += TOGETHER) {
        const int64_t end = first + TOGETHER < rows ? first + TOGETHER : rows, whole = cols / PARTS * PARTS;
        NAME(lane_integer) pass[PARTS] = {0};
        for (int64_t i = first; i < end; i++) {
            const REAL *row = (const REAL *)z + i * stride;
            for (int64_t j = 0; j < whole; j += PARTS)
                for (int part = 0; part < PARTS; part++) pass[part] |= row[j + part] >= least[j + part] ? -1 : 0;
            for (int64_t j = whole; j < cols; j++) pass[0] |= row[j] >= least[j] ? -1 : 0;
        }
        NAME(lane_integer) any = 0;
        for (int part = 0; part < PARTS; part++) any |= pass[part];
        for (int64_t i = first; i < end && any; i++)
            for (int64_t j = 0; j < cols; j++)
                if (((const REAL *)z)[i * stride + j] >= least[j]) places[count++] = (int32_t)(i * stride + j);
    }
    return count;
}
