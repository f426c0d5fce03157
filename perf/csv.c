#include "csv.h"

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

void csvInit(csv_t *csv, FILE *stream, const char *name) {
  csv->stream = stream;
  csv->name = name;
  csv->line = csv->column = csv->cellLine = csv->cellColumn = 1;
  csv->cell[0] = '\0';
  csv->end = CSV_LINE_END;
  csv->bufferUsed = csv->bufferNext = 0;
}

void csvErrorFormat(const csv_t *csv, perfError_t *error, const char *format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  perfErrorFormat(error, "%s:%lld:%lld: %s", csv->name, (long long)csv->cellLine, (long long)csv->cellColumn,
                  text);
}

static int csv_stream_check(const csv_t *csv, perfError_t *error) {
  if (!ferror(csv->stream)) return 0;
  return perfErrorSet(error, "%s: cannot be read: %s", csv->name, strerror(errno != 0 ? errno : EIO));
}

static int csv_char_peek(csv_t *csv) {
  if (csv->bufferNext == csv->bufferUsed) {
    csv->bufferNext = 0;
    csv->bufferUsed = fread(csv->buffer, 1, sizeof(csv->buffer), csv->stream);
    if (csv->bufferUsed == 0) return EOF;
  }
  return csv->buffer[csv->bufferNext];
}

/* Takes one character; "\r\n" reads as "\n". */
static int csv_char_take(csv_t *csv) {
  int c = csv_char_peek(csv);
  if (c == EOF) return EOF;
  csv->bufferNext++;
  if (c == '\r' && csv_char_peek(csv) == '\n') {
    csv->bufferNext++;
    return '\n';
  }
  return c;
}

int csvNextLine(csv_t *csv, perfError_t *error) {
  int c = csv_char_peek(csv);
  while (c == '\n' || c == '\r') {
    csv->bufferNext++;
    if (c == '\n') csv->line++;
    c = csv_char_peek(csv);
  }
  csv->column = 1;
  csv->cellLine = csv->line;
  csv->cellColumn = 1;
  if (c == EOF) return csv_stream_check(csv, error);
  return 1;
}

int csvCell(csv_t *csv, perfError_t *error) {
  size_t length = 0;
  csv->cellLine = csv->line;
  csv->cellColumn = csv->column;
  for (;;) {
    int c = csv_char_take(csv);
    if (c == EOF) {
      if (csv_stream_check(csv, error) != 0) return -1;
      csv->end = CSV_FILE_END;
      break;
    }
    if (c == '\n') {
      csv->line++;
      csv->column = 1;
      csv->end = CSV_LINE_END;
      break;
    }
    csv->column++;
    if (c == ',') {
      csv->end = CSV_COMMA;
      break;
    }
    if (!(c < 128 && (isalnum(c) || c == '-' || c == '_'))) {
      csv->cellColumn = csv->column - 1;
      return isprint(c) ? csvError(csv, error, "unexpected character '%c'", c)
                        : csvError(csv, error, "unexpected byte 0x%02x", (unsigned)c);
    }
    if (length + 1 >= sizeof(csv->cell)) {
      return csvError(csv, error, "a cell of %d characters or more", CSV_CELL_BYTES);
    }
    csv->cell[length++] = (char)c;
  }
  csv->cell[length] = '\0';
  return 0;
}

int csvNumber(csv_t *csv, const char *what, int64_t min, int64_t max, int64_t *value, perfError_t *error) {
  if (csvCell(csv, error) != 0) return -1;
  if (csv->cell[0] == '\0') return csvError(csv, error, "empty cell where %s belongs", what);
  char *end = NULL;
  errno = 0;
  long long parsed = strtoll(csv->cell, &end, 10);
  if (end == csv->cell || *end != '\0') {
    return csvError(csv, error, "'%s' is not a whole number (%s)", csv->cell, what);
  }
  if (errno == ERANGE || parsed < min || parsed > max) {
    return csvError(csv, error, "%s %s is outside %lld..%lld", what, csv->cell, (long long)min,
                    (long long)max);
  }
  *value = parsed;
  return 0;
}
