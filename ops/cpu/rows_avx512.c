#define VECTOR_BYTES 64
#define ROW_TASKS mmbal_row_tasks_avx512
#include "rows_body.h"
