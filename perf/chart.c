#include "chart.h"

#include <inttypes.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { CHART_LABEL_COLUMNS = 11, CHART_VALUE_COLUMNS = 13, CHART_MIN_BAR = 10 };

static int64_t chart_max(const int64_t *loads, int32_t first, int32_t last) {
  int64_t max = 0;
  for (int32_t i = first; i < last; i++) {
    if (loads[i] > max) max = loads[i];
  }
  return max;
}

/* One bar of `columns` columns with the mean's mark; an empty column where the bar has ended. */
static void chart_bar_print(FILE *stream, const chart_t *chart, int64_t load, int64_t top, int32_t meanColumn,
                            int32_t columns, bool after) {
  const char *full = chart->unicode ? (after ? "\u2588" : "\u2592") : (after ? "=" : "#");
  const char *mark = chart->unicode ? "\u2502" : "|";
  int32_t length = top == 0 ? 0 : (int32_t)(((double)load / (double)top) * columns + 0.5);
  for (int32_t i = 0; i < columns; i++) {
    fputs(i < length ? full : i == meanColumn ? mark : " ", stream);
  }
  fprintf(stream, " %" PRId64 "\n", load);
}

void chartPrint(FILE *stream, const chart_t *chart) {
  int32_t perRow = (chart->nRanks + CHART_MAX_ROWS - 1) / CHART_MAX_ROWS;
  int32_t columns = chart->width - CHART_LABEL_COLUMNS - CHART_VALUE_COLUMNS;
  if (columns < CHART_MIN_BAR) columns = CHART_MIN_BAR;
  int64_t topBefore = chart_max(chart->before, 0, chart->nRanks);
  int64_t topAfter = chart_max(chart->after, 0, chart->nRanks);
  int64_t top = topBefore > topAfter ? topBefore : topAfter;
  double total = 0;
  for (int32_t rank = 0; rank < chart->nRanks; rank++) total += (double)chart->before[rank];
  double mean = total / chart->nRanks;
  int32_t meanColumn = top == 0 ? 0 : (int32_t)(mean / (double)top * columns);
  for (int32_t first = 0; first < chart->nRanks; first += perRow) {
    int32_t last = first + perRow < chart->nRanks ? first + perRow : chart->nRanks;
    char label[32];
    if (perRow == 1) {
      snprintf(label, sizeof(label), "rank %d", first);
    } else {
      snprintf(label, sizeof(label), "%d-%d", first, last - 1);
    }
    fprintf(stream, "%-*s", CHART_LABEL_COLUMNS, label);
    chart_bar_print(stream, chart, chart_max(chart->before, first, last), top, meanColumn, columns, false);
    fprintf(stream, "%*s", CHART_LABEL_COLUMNS, "");
    chart_bar_print(stream, chart, chart_max(chart->after, first, last), top, meanColumn, columns, true);
  }
  fprintf(stream, "%*s%s before  %s after  %s mean %.0f%s\n", CHART_LABEL_COLUMNS, "",
          chart->unicode ? "\u2592" : "#", chart->unicode ? "\u2588" : "=", chart->unicode ? "\u2502" : "|",
          mean, perRow == 1 ? "" : " (most loaded rank of each row)");
}

int32_t chartTerminalWidth(FILE *stream) {
  struct winsize size;
  if (ioctl(fileno(stream), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col < 40 ? 40 : size.ws_col > 160 ? 160 : size.ws_col;
}
