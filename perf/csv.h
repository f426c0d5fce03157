/* The lexer under the trace readers: cells of digits or letters between commas, with line and column. */
#ifndef ULTRAEP_PERF_CSV_H_
#define ULTRAEP_PERF_CSV_H_

#include "options.h"

#include <stdio.h>

#define CSV_CELL_BYTES 32

typedef enum { CSV_COMMA, CSV_LINE_END, CSV_FILE_END } csvEnd_t;

typedef struct {
  FILE *stream;
  const char *name;
  int64_t line, column;         /* of the next character, from 1 */
  int64_t cellLine, cellColumn; /* of the last cell's first character */
  char cell[CSV_CELL_BYTES];    /* the last cell, terminated */
  csvEnd_t end;                 /* what ended it */
  size_t bufferUsed, bufferNext;
  unsigned char buffer[4096];
} csv_t;

void csvInit(csv_t *csv, FILE *stream, const char *name);
/* Reads one cell. Fails on an unreadable stream, on a cell of CSV_CELL_BYTES characters or more and on a
 * character that is no digit, letter, '-' or '_'. */
int csvCell(csv_t *csv, perfError_t *error);
/* Skips blank lines. 1: a line follows; 0: the file ends here; -1: the stream cannot be read. */
int csvNextLine(csv_t *csv, perfError_t *error);
/* Reads one cell as a whole number in [min, max]. */
int csvNumber(csv_t *csv, const char *what, int64_t min, int64_t max, int64_t *value, perfError_t *error);
void csvErrorFormat(const csv_t *csv, perfError_t *error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Sets a message that starts with name:line:column of the last cell, and is -1. */
#define csvError(csv, error, ...) (csvErrorFormat((csv), (error), __VA_ARGS__), perfFailed())

#endif
