#include "mmbal/status.h"

const char *mmbal_status_string(mmbal_status status) {
    switch (status) {
    case MMBAL_OK: return "ok";
    case MMBAL_INVALID_ARGUMENT: return "invalid argument";
    case MMBAL_INVALID_INDEX: return "index out of range";
    case MMBAL_DUPLICATE_INDEX: return "index names a row twice";
    case MMBAL_UNSUPPORTED: return "not supported by this build or machine";
    case MMBAL_DEVICE_ERROR: return "the GPU refused a launch";
    }
    return "unknown status";
}
