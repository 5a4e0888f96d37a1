#ifndef MMBAL_STATUS_H
#define MMBAL_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mmbal_status {
    MMBAL_OK = 0,
    MMBAL_INVALID_ARGUMENT, /* a size or option outside the contract */
    MMBAL_INVALID_INDEX,    /* an entry of an index array outside its range */
    MMBAL_DUPLICATE_INDEX,  /* an entry of an index array that may name each row once, twice */
    MMBAL_UNSUPPORTED,      /* a dtype or instruction set this build lacks */
    MMBAL_DEVICE_ERROR,     /* a GPU refused a launch */
} mmbal_status;

/* A short English phrase for a status; never NULL. */
const char *mmbal_status_string(mmbal_status status);

#ifdef __cplusplus
}
#endif
#endif
