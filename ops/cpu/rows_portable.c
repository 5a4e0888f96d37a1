#define VECTOR_BYTES 16
#define ROW_TASKS mmbal_row_tasks_portable
#include "rows_body.h"
