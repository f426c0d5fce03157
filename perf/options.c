#include "options.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void perfErrorFormat(perfError_t *error, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error->text, sizeof(error->text), format, arguments);
  va_end(arguments);
}

int optionInt(const char *what, const char *text, int64_t min, int64_t max, int64_t *value,
              perfError_t *error) {
  char *end = NULL;
  errno = 0;
  long long parsed = strtoll(text, &end, 10);
  if (end == text || *end != '\0' || isspace((unsigned char)text[0])) {
    return perfErrorSet(error, "%s: '%s' is not a whole number", what, text);
  }
  if (errno == ERANGE || parsed < min || parsed > max) {
    return perfErrorSet(error, "%s: %s is outside %lld..%lld", what, text, (long long)min, (long long)max);
  }
  *value = parsed;
  return 0;
}

int optionInt32(const char *what, const char *text, int32_t min, int32_t max, int32_t *value,
                perfError_t *error) {
  int64_t wide = 0;
  if (optionInt(what, text, min, max, &wide, error) != 0) return -1;
  *value = (int32_t)wide;
  return 0;
}

int optionDouble(const char *what, const char *text, double min, double max, double *value,
                 perfError_t *error) {
  char *end = NULL;
  double parsed = strtod(text, &end);
  if (end == text || *end != '\0' || isspace((unsigned char)text[0])) {
    return perfErrorSet(error, "%s: '%s' is not a number", what, text);
  }
  if (!isfinite(parsed) || parsed < min || parsed > max) {
    return perfErrorSet(error, "%s: %s is outside %g..%g", what, text, min, max);
  }
  *value = parsed;
  return 0;
}

int optionBytes(const char *what, const char *text, int64_t min, int64_t max, int64_t *bytes,
                perfError_t *error) {
  static const char suffixes[] = "KMG";
  char digits[32];
  size_t length = strlen(text);
  int shift = 0;
  const char *suffix = length > 1 ? strchr(suffixes, toupper((unsigned char)text[length - 1])) : NULL;
  if (suffix != NULL && *suffix != '\0') {
    shift = 10 * (int)(suffix - suffixes + 1);
    length--;
  }
  if (length == 0 || length >= sizeof(digits))
    return perfErrorSet(error, "%s: '%s' is not a size", what, text);
  memcpy(digits, text, length);
  digits[length] = '\0';
  int64_t number = 0;
  if (optionInt(what, digits, 0, INT64_MAX >> shift, &number, error) != 0) return -1;
  if (number << shift < min || number << shift > max) {
    return perfErrorSet(error, "%s: %s is outside %lld..%lld bytes", what, text, (long long)min,
                        (long long)max);
  }
  *bytes = number << shift;
  return 0;
}

int optionName(const char *what, const char *text, const char *const *names, int count, int32_t *index,
               perfError_t *error) {
  char known[256] = "";
  for (int i = 0; i < count; i++) {
    if (strcmp(text, names[i]) == 0) {
      *index = i;
      return 0;
    }
    size_t used = strlen(known);
    snprintf(known + used, sizeof(known) - used, "%s%s", i == 0 ? "" : ", ", names[i]);
  }
  return perfErrorSet(error, "%s: '%s' is not one of %s", what, text, known);
}

double perfSeconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int options_double_compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double perfMedian(double *values, int count) {
  qsort(values, (size_t)count, sizeof(values[0]), options_double_compare);
  int middle = count / 2;
  return count % 2 != 0 ? values[middle] : 0.5 * (values[middle - 1] + values[middle]);
}

double perfImbalance(const int64_t *loads, int count) {
  int64_t total = 0, max = 0;
  for (int i = 0; i < count; i++) {
    total += loads[i];
    if (loads[i] > max) max = loads[i];
  }
  return total == 0 ? 1.0 : (double)max * count / (double)total;
}
