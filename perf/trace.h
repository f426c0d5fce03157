/* Readers of load traces and routing traces (CSV).
 *
 * Load trace: header `step,layer,microbatch,src,e0..e{E-1}`; consecutive rows with the same step, layer and
 * microbatch are one record: one row per source rank 0..n-1, in any order, with the (token, k) assignments
 * which that source sends to each expert; or a single row with src -1, summed over the sources. Routing
 * trace: header `token,k0..k{K-1}`: the experts of each token, -1 for an unused entry.
 *
 * Files are read record by record: memory is bounded by one record (at most 1024 sources x 4096 experts), or
 * by TRACE_MAX_TOKENS tokens. Messages say file:line:column of the first character at fault.
 */
#ifndef ULTRAEP_PERF_TRACE_H_
#define ULTRAEP_PERF_TRACE_H_

#include "options.h"

#include <stdio.h>

#define TRACE_MAX_TOKENS (1 << 20) /* rows of a routing trace */

typedef struct loadTrace loadTrace_t;

typedef struct {
  int64_t step, layer, microbatch;
  int64_t line;          /* of the record's first row */
  int32_t nSources;      /* n, or 0 for a record summed over its sources */
  int32_t nExperts;      /* E */
  const int64_t *counts; /* [max(n, 1)][E], owned by the trace, valid until the next call on it */
} loadRecord_t;

/* Opens and reads the header. */
int loadTraceOpen(loadTrace_t **trace, const char *path, perfError_t *error);
/* The same for a stream, which the trace closes; name is used in messages. The stream is closed on failure
 * too. */
int loadTraceOpenStream(loadTrace_t **trace, FILE *stream, const char *name, perfError_t *error);
/* 1 and the next record; 0 at the end; -1 and a message. */
int loadTraceNext(loadTrace_t *trace, loadRecord_t *record, perfError_t *error);
void loadTraceClose(loadTrace_t *trace);

/* The record on R ranks, loads[R][E]: source s of n goes to rank s*R/n where n >= R; where n < R its counts
 * are split evenly over the ranks [s*R/n, (s+1)*R/n); a summed record is split evenly over all R. Remainders
 * go to the lower ranks. Fails where E is no multiple of R or a rank's counts add up to more than 2^31-1. */
int loadRecordMap(const loadRecord_t *record, int32_t nRanks, int32_t *loads, perfError_t *error);

typedef struct {
  int32_t topK;
  int32_t nTokens;
  int32_t maxExpert; /* largest expert in the file, -1 if all entries are unused */
  int32_t *experts;  /* [nTokens][topK] */
} routingTrace_t;

/* nExperts > 0: experts must be below it. */
int routingTraceRead(routingTrace_t *trace, const char *path, int32_t nExperts, perfError_t *error);
int routingTraceReadStream(routingTrace_t *trace, FILE *stream, const char *name, int32_t nExperts,
                           perfError_t *error);
void routingTraceFree(routingTrace_t *trace);

#endif
