/* The calling thread's last error message. */
#ifndef ULTRAEP_ERROR_H_
#define ULTRAEP_ERROR_H_

#include "ultraep.h"

#define ERROR_TEXT_BYTES 512

/* Records the message for ultraepGetLastError and is code, so that a check is one line:
 *   return error_set(ultraepInvalidArgument, "rank %d is not in 0..%d", rank, nRanks - 1);
 * Whoever detects an error records it; callers only pass the code on. A macro, so that compilers see which
 * code it is, and what is therefore not reached. */
#define error_set(code, ...) (error_record(__VA_ARGS__), (code))
void error_record(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The text itself, for records that outlive the thread's next error. Never null. */
const char *error_text(void);

#endif
