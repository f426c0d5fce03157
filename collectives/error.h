/* The calling thread's last error message. */
#ifndef ULTRAEP_ERROR_H_
#define ULTRAEP_ERROR_H_

#include "ultraep.h"

#define ERROR_TEXT_BYTES 512

/* Records the message for ultraepGetLastError and returns code, so that a check is one line:
 *   return error_set(ultraepInvalidArgument, "rank %d is not in 0..%d", rank, nRanks - 1);
 * Whoever detects an error records it; callers only pass the code on. */
ultraepResult_t error_set(ultraepResult_t code, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* The text itself, for records that outlive the thread's next error. Never null. */
const char *error_text(void);

#endif
