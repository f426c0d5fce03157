/* libFuzzer: the trace readers on any bytes. The first byte chooses the reader and the number of ranks. */
#include "trace.h"
#include "workload.h"

#include "ultraep_balancer.h"

#include <stdlib.h>
#include <string.h>

/* Maps a record and makes tokens of it, where it is small enough to be quick. */
static void record_use(const loadRecord_t *record, int32_t nRanks) {
  perfError_t error;
  int32_t *loads = malloc((size_t)nRanks * (size_t)record->nExperts * sizeof(loads[0]));
  if (loads == NULL) return;
  if (loadRecordMap(record, nRanks, loads, &error) == 0) {
    workload_t workload;
    if (workloadRecord(&workload, nRanks, record->nExperts, 2, loads, 16, 1, &error) == 0)
      workloadFree(&workload);
  }
  free(loads);
}

static void load_trace_use(FILE *stream, int32_t nRanks) {
  loadTrace_t *trace = NULL;
  loadRecord_t record;
  perfError_t error;
  if (loadTraceOpenStream(&trace, stream, "fuzz", &error) != 0) return;
  while (loadTraceNext(trace, &record, &error) > 0) record_use(&record, nRanks);
  loadTraceClose(trace);
}

static void routing_trace_use(FILE *stream, int32_t nRanks) {
  routingTrace_t routing;
  workload_t workload;
  perfError_t error;
  if (routingTraceReadStream(&routing, stream, "fuzz", 0, &error) != 0) return;
  if (workloadRouting(&workload, &routing, nRanks, 64 * nRanks, -1, &error) == 0) workloadFree(&workload);
  routingTraceFree(&routing);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 2) return 0;
  /* A copy, as fmemopen takes no pointer to const. */
  uint8_t *text = malloc(size - 1);
  if (text == NULL) return 0;
  memcpy(text, data + 1, size - 1);
  FILE *stream = fmemopen(text, size - 1, "rb");
  int32_t nRanks = 1 + (data[0] >> 1) % 16;
  if (stream != NULL && (data[0] & 1) != 0) load_trace_use(stream, nRanks);
  if (stream != NULL && (data[0] & 1) == 0) routing_trace_use(stream, nRanks);
  free(text);
  return 0;
}
