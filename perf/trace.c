#include "trace.h"

#include "csv.h"
#include "ultraep_balancer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TRACE_LABELS 4 /* step, layer, microbatch, src */

struct loadTrace {
  csv_t csv;
  char *name;
  int32_t nExperts;
  int32_t nRows;    /* rows of the record being read */
  int32_t rowsRoom; /* rows that counts has room for */
  int64_t *counts;  /* [rowsRoom][E], row s is source s */
  bool *present;    /* [ULTRAEP_MAX_RANKS] sources seen in this record */
  bool rowWaiting;  /* label and firstCount are those of the next record's first row */
  int64_t label[TRACE_LABELS];
  int64_t labelLine;
  int64_t *waiting; /* [ULTRAEP_MAX_EXPERTS] counts of that row, E used */
};

static const char *const traceLabelNames[TRACE_LABELS] = {"step", "layer", "microbatch", "src"};

/* Opens a file for reading, or says why not. A directory opens but cannot be read: that shows at the first
 * read. */
static FILE *trace_file_open(const char *path, perfError_t *error) {
  FILE *stream = fopen(path, "rb");
  if (stream == NULL) perfErrorSet(error, "%s: cannot be opened: %s", path, strerror(errno));
  return stream;
}

/* ---- load traces ---- */

static int load_trace_header_read(loadTrace_t *trace, perfError_t *error) {
  csv_t *csv = &trace->csv;
  int more = csvNextLine(csv, error);
  if (more < 0) return -1;
  if (more == 0)
    return csvError(csv, error, "empty file where the header step,layer,microbatch,src,e0.. belongs");
  for (int column = 0;; column++) {
    char expected[CSV_CELL_BYTES];
    if (column < TRACE_LABELS) {
      snprintf(expected, sizeof(expected), "%s", traceLabelNames[column]);
    } else {
      snprintf(expected, sizeof(expected), "e%d", column - TRACE_LABELS);
    }
    if (csvCell(csv, error) != 0) return -1;
    if (strcmp(csv->cell, expected) != 0) {
      return csvError(csv, error, "header column %d is '%s', expected '%s'", column + 1, csv->cell, expected);
    }
    if (column - TRACE_LABELS >= ULTRAEP_MAX_EXPERTS) {
      return csvError(csv, error, "more than %d experts", ULTRAEP_MAX_EXPERTS);
    }
    if (csv->end != CSV_COMMA) {
      trace->nExperts = column - TRACE_LABELS + 1;
      if (trace->nExperts < 1) return csvError(csv, error, "the header names no expert");
      return 0;
    }
  }
}

/* Reads the next row into label and waiting. 1: read; 0: end of file. */
static int load_trace_row_read(loadTrace_t *trace, perfError_t *error) {
  csv_t *csv = &trace->csv;
  int more = csvNextLine(csv, error);
  if (more <= 0) return more;
  trace->labelLine = csv->line;
  int columns = TRACE_LABELS + trace->nExperts;
  int64_t sum = 0;
  for (int column = 0; column < columns; column++) {
    int64_t *value = column < TRACE_LABELS ? &trace->label[column] : &trace->waiting[column - TRACE_LABELS];
    int status = 0;
    if (column < TRACE_LABELS - 1) {
      status = csvNumber(csv, traceLabelNames[column], INT64_MIN, INT64_MAX, value, error);
    } else if (column == TRACE_LABELS - 1) {
      status = csvNumber(csv, "src", -1, ULTRAEP_MAX_RANKS - 1, value, error);
    } else {
      status = csvNumber(csv, "count", 0, INT64_MAX, value, error);
      if (status == 0 && __builtin_add_overflow(sum, *value, &sum)) {
        return csvError(csv, error, "the row's counts add up to more than 2^63-1");
      }
    }
    if (status != 0) return -1;
    if (csv->end != CSV_COMMA && column + 1 < columns) {
      return csvError(csv, error, "the row ends after %d of %d columns", column + 1, columns);
    }
  }
  if (csv->end == CSV_COMMA) return csvError(csv, error, "the row has more than %d columns", columns);
  return 1;
}

/* Gives counts room for `rows` rows. */
static int load_trace_rows_reserve(loadTrace_t *trace, int32_t rows, perfError_t *error) {
  if (rows <= trace->rowsRoom) return 0;
  int32_t room = trace->rowsRoom == 0 ? 1 : trace->rowsRoom;
  while (room < rows) room *= 2;
  size_t rowBytes = (size_t)trace->nExperts * sizeof(int64_t);
  int64_t *counts = realloc(trace->counts, (size_t)room * rowBytes);
  if (counts == NULL) return perfErrorSet(error, "no memory for a record of %d sources", rows);
  trace->counts = counts;
  trace->rowsRoom = room;
  return 0;
}

/* Puts the waiting row into the record. */
static int load_trace_row_keep(loadTrace_t *trace, bool summed, perfError_t *error) {
  csv_t *csv = &trace->csv;
  int64_t src = trace->label[TRACE_LABELS - 1];
  csv->cellLine = trace->labelLine;
  csv->cellColumn = 1;
  if (summed && trace->nRows > 0) {
    return csvError(csv, error, "a record with src -1 has one row, this is another of the same record");
  }
  if (!summed && src < 0) return csvError(csv, error, "src -1 in a record that has rows for single sources");
  int32_t row = summed ? 0 : (int32_t)src;
  if (trace->present[row]) return csvError(csv, error, "source %d occurs twice in one record", row);
  if (load_trace_rows_reserve(trace, row + 1, error) != 0) return -1;
  memcpy(trace->counts + (size_t)row * (size_t)trace->nExperts, trace->waiting,
         (size_t)trace->nExperts * sizeof(int64_t));
  trace->present[row] = true;
  trace->nRows++;
  return 0;
}

int loadTraceNext(loadTrace_t *trace, loadRecord_t *record, perfError_t *error) {
  if (!trace->rowWaiting) {
    int more = load_trace_row_read(trace, error);
    if (more <= 0) return more;
  }
  trace->rowWaiting = false;
  trace->nRows = 0;
  memset(trace->present, 0, ULTRAEP_MAX_RANKS * sizeof(trace->present[0]));
  loadRecord_t next = {.step = trace->label[0],
                       .layer = trace->label[1],
                       .microbatch = trace->label[2],
                       .line = trace->labelLine,
                       .nExperts = trace->nExperts};
  bool summed = trace->label[3] == -1;
  for (;;) {
    if (load_trace_row_keep(trace, summed, error) != 0) return -1;
    int more = load_trace_row_read(trace, error);
    if (more < 0) return -1;
    if (more == 0) break;
    if (trace->label[0] != next.step || trace->label[1] != next.layer || trace->label[2] != next.microbatch) {
      trace->rowWaiting = true;
      break;
    }
  }
  for (int32_t src = 0; src < trace->nRows; src++) {
    if (!trace->present[src]) {
      return perfErrorSet(
          error,
          "%s:%lld:1: the record (step %lld, layer %lld, microbatch %lld) of %d rows has none for "
          "source %d",
          trace->csv.name, (long long)next.line, (long long)next.step, (long long)next.layer,
          (long long)next.microbatch, trace->nRows, src);
    }
  }
  next.nSources = summed ? 0 : trace->nRows;
  next.counts = trace->counts;
  *record = next;
  return 1;
}

int loadTraceOpenStream(loadTrace_t **trace, FILE *stream, const char *name, perfError_t *error) {
  loadTrace_t *opened = calloc(1, sizeof(*opened));
  if (opened == NULL) {
    fclose(stream);
    return perfErrorSet(error, "%s: no memory for the reader", name);
  }
  csvInit(&opened->csv, stream, name);
  opened->name = strdup(name);
  opened->present = calloc(ULTRAEP_MAX_RANKS, sizeof(opened->present[0]));
  if (opened->name == NULL || opened->present == NULL) {
    perfErrorSet(error, "%s: no memory for the reader", name);
    goto close_trace;
  }
  opened->csv.name = opened->name;
  if (load_trace_header_read(opened, error) != 0) goto close_trace;
  opened->waiting = calloc(ULTRAEP_MAX_EXPERTS, sizeof(opened->waiting[0]));
  if (opened->waiting == NULL) {
    perfErrorSet(error, "%s: no memory for %d experts", name, opened->nExperts);
    goto close_trace;
  }
  *trace = opened;
  return 0;

close_trace:
  loadTraceClose(opened);
  return -1;
}

int loadTraceOpen(loadTrace_t **trace, const char *path, perfError_t *error) {
  FILE *stream = trace_file_open(path, error);
  return stream == NULL ? -1 : loadTraceOpenStream(trace, stream, path, error);
}

void loadTraceClose(loadTrace_t *trace) {
  if (trace == NULL) return;
  fclose(trace->csv.stream);
  free(trace->waiting);
  free(trace->counts);
  free(trace->present);
  free(trace->name);
  free(trace);
}

/* ---- records on ranks ---- */

/* Counts of expert e that rank r gets, or -1 past 2^63-1. */
static int64_t load_record_count(const loadRecord_t *record, int32_t nRanks, int32_t rank, int32_t expert) {
  int64_t nSources = record->nSources, nExperts = record->nExperts;
  if (nSources >= nRanks) {
    /* s*R/n == r for s in [ceil(r*n/R), ceil((r+1)*n/R)) */
    int64_t first = ((int64_t)rank * nSources + nRanks - 1) / nRanks;
    int64_t last = ((int64_t)(rank + 1) * nSources + nRanks - 1) / nRanks;
    int64_t sum = 0;
    for (int64_t src = first; src < last; src++) {
      if (__builtin_add_overflow(sum, record->counts[src * nExperts + expert], &sum)) return -1;
    }
    return sum;
  }
  /* One source over several ranks; a summed record is one source over all of them. */
  int64_t sources = nSources == 0 ? 1 : nSources;
  int64_t src = 0;
  while ((src + 1) * nRanks / sources <= rank) src++;
  int64_t first = src * nRanks / sources, ranks = (src + 1) * nRanks / sources - first;
  int64_t count = record->counts[src * nExperts + expert];
  return count / ranks + (rank - first < count % ranks ? 1 : 0);
}

int loadRecordMap(const loadRecord_t *record, int32_t nRanks, int32_t *loads, perfError_t *error) {
  if (nRanks < 1 || nRanks > ULTRAEP_MAX_RANKS) {
    return perfErrorSet(error, "%d ranks are outside 1..%d", nRanks, ULTRAEP_MAX_RANKS);
  }
  if (record->nExperts % nRanks != 0) {
    return perfErrorSet(error, "%d experts are no multiple of %d ranks", record->nExperts, nRanks);
  }
  for (int32_t rank = 0; rank < nRanks; rank++) {
    int64_t sum = 0;
    for (int32_t expert = 0; expert < record->nExperts; expert++) {
      int64_t count = load_record_count(record, nRanks, rank, expert);
      if (count < 0 || count > INT32_MAX || (sum += count) > INT32_MAX) {
        return perfErrorSet(
            error,
            "the record at line %lld (step %lld, layer %lld, microbatch %lld): the counts of rank %d "
            "add up to more than 2^31-1 on %d ranks",
            (long long)record->line, (long long)record->step, (long long)record->layer,
            (long long)record->microbatch, rank, nRanks);
      }
      loads[(size_t)rank * (size_t)record->nExperts + (size_t)expert] = (int32_t)count;
    }
  }
  return 0;
}

/* ---- routing traces ---- */

static int routing_header_read(csv_t *csv, int32_t *topK, perfError_t *error) {
  int more = csvNextLine(csv, error);
  if (more < 0) return -1;
  if (more == 0) return csvError(csv, error, "empty file where the header token,k0.. belongs");
  for (int column = 0;; column++) {
    char expected[CSV_CELL_BYTES] = "token";
    if (column > 0) snprintf(expected, sizeof(expected), "k%d", column - 1);
    if (csvCell(csv, error) != 0) return -1;
    if (strcmp(csv->cell, expected) != 0) {
      return csvError(csv, error, "header column %d is '%s', expected '%s'", column + 1, csv->cell, expected);
    }
    if (column > ULTRAEP_MAX_TOPK)
      return csvError(csv, error, "more than %d experts a token", ULTRAEP_MAX_TOPK);
    if (csv->end != CSV_COMMA) {
      if (column < 1) return csvError(csv, error, "the header names no expert column");
      *topK = column;
      return 0;
    }
  }
}

/* Reads one row into experts[topK]; *maxExpert grows. */
static int routing_row_read(csv_t *csv, int32_t topK, int32_t nExperts, int32_t *experts, int32_t *maxExpert,
                            perfError_t *error) {
  int64_t value = 0;
  int64_t last = nExperts > 0 ? nExperts - 1 : ULTRAEP_MAX_EXPERTS - 1;
  if (csvNumber(csv, "token", 0, INT64_MAX, &value, error) != 0) return -1;
  for (int32_t k = 0; k < topK; k++) {
    if (csv->end != CSV_COMMA) {
      return csvError(csv, error, "the row ends after %d of %d columns", k + 1, topK + 1);
    }
    if (csvNumber(csv, "expert", -1, last, &value, error) != 0) return -1;
    experts[k] = (int32_t)value;
    if (experts[k] > *maxExpert) *maxExpert = experts[k];
  }
  if (csv->end == CSV_COMMA) return csvError(csv, error, "the row has more than %d columns", topK + 1);
  return 0;
}

int routingTraceReadStream(routingTrace_t *trace, FILE *stream, const char *name, int32_t nExperts,
                           perfError_t *error) {
  csv_t csv;
  routingTrace_t read = {.maxExpert = -1};
  int32_t room = 0;
  csvInit(&csv, stream, name);
  if (routing_header_read(&csv, &read.topK, error) != 0) goto close_stream;
  for (;;) {
    int more = csvNextLine(&csv, error);
    if (more < 0) goto close_stream;
    if (more == 0) break;
    if (read.nTokens == TRACE_MAX_TOKENS) {
      csvError(&csv, error, "more than %d tokens", TRACE_MAX_TOKENS);
      goto close_stream;
    }
    if (read.nTokens == room) {
      room = room == 0 ? 64 : 2 * room;
      int32_t *experts = reallocarray(read.experts, (size_t)room, (size_t)read.topK * sizeof(experts[0]));
      if (experts == NULL) {
        perfErrorSet(error, "%s: no memory for %d tokens", name, room);
        goto close_stream;
      }
      read.experts = experts;
    }
    int32_t *row = read.experts + (size_t)read.nTokens * (size_t)read.topK;
    if (routing_row_read(&csv, read.topK, nExperts, row, &read.maxExpert, error) != 0) goto close_stream;
    read.nTokens++;
  }
  if (read.nTokens == 0) {
    csvError(&csv, error, "no tokens after the header");
    goto close_stream;
  }
  fclose(stream);
  *trace = read;
  return 0;

close_stream:
  free(read.experts);
  fclose(stream);
  return -1;
}

int routingTraceRead(routingTrace_t *trace, const char *path, int32_t nExperts, perfError_t *error) {
  FILE *stream = trace_file_open(path, error);
  return stream == NULL ? -1 : routingTraceReadStream(trace, stream, path, nExperts, error);
}

void routingTraceFree(routingTrace_t *trace) {
  free(trace->experts);
  *trace = (routingTrace_t){.maxExpert = -1};
}
