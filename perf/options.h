/* What both tools share: messages, numbers from the command line, the clock, medians. */
#ifndef ULTRAEP_PERF_OPTIONS_H_
#define ULTRAEP_PERF_OPTIONS_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Exit codes of the tools. */
enum { PERF_EXIT_OK = 0, PERF_EXIT_FAILED = 1, PERF_EXIT_USAGE = 2 };

/* One message. Whoever finds the fault writes it; callers only pass it on. */
typedef struct {
  char text[512];
} perfError_t;

void perfErrorFormat(perfError_t *error, const char *format, ...) __attribute__((format(printf, 2, 3)));
static inline int perfFailed(void) {
  return -1;
}
/* Sets the message and is -1, so that a function can end with it. A macro, so that static analysis sees the
 * -1. */
#define perfErrorSet(error, ...) (perfErrorFormat((error), __VA_ARGS__), perfFailed())

/* Numbers in decimal, the whole text, within [min, max]: 0, or -1 and a message that names `what`. */
int optionInt(const char *what, const char *text, int64_t min, int64_t max, int64_t *value,
              perfError_t *error);
int optionInt32(const char *what, const char *text, int32_t min, int32_t max, int32_t *value,
                perfError_t *error);
int optionDouble(const char *what, const char *text, double min, double max, double *value,
                 perfError_t *error);
/* A size in bytes, with K, M or G (powers of 1024) behind the number where wanted. */
int optionBytes(const char *what, const char *text, int64_t min, int64_t max, int64_t *bytes,
                perfError_t *error);
/* The index of `text` in names[count]. */
int optionName(const char *what, const char *text, const char *const *names, int count, int32_t *index,
               perfError_t *error);

/* Seconds of a clock that never jumps. */
double perfSeconds(void);
/* The median of values[count], count >= 1; sorts them. */
double perfMedian(double *values, int count);
/* max / mean of count loads; 1 where all are zero. */
double perfImbalance(const int64_t *loads, int count);

#endif
