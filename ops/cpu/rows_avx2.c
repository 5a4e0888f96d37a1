#define VECTOR_BYTES 32
#define ROW_TASKS mmbal_row_tasks_avx2
#include "rows_body.h"
