/* A bar chart of rank loads before and after, for a terminal. */
#ifndef ULTRAEP_PERF_CHART_H_
#define ULTRAEP_PERF_CHART_H_

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define CHART_MAX_ROWS 32

typedef struct {
  int32_t nRanks;
  const int64_t *before; /* [R] */
  const int64_t *after;  /* [R] */
  int32_t width;         /* columns of the terminal, 40 or more */
  bool unicode;          /* block characters, else # and = */
} chart_t;

/* Two bars a rank, scaled to the largest load, and the mean as a line through them. Above CHART_MAX_ROWS
 * ranks a row stands for several neighbours and shows the most loaded of them. */
void chartPrint(FILE *stream, const chart_t *chart);

/* Columns of the terminal behind a stream, 80 where it does not tell. */
int32_t chartTerminalWidth(FILE *stream);

#endif
