/* Runs a tool on the traffic that its options name, one workload after another. */
#include "bench.h"

#include "rows.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- tokens of each size ---- */

/* 1: the next number of tokens a rank; 0: no more. *bytes is the sweep's state, -1 at the start. */
static int traffic_tokens_next(const benchOptions_t *options, bool native, int64_t *bytes, int32_t *tokens,
                               perfError_t *error) {
  if (!options->sized && (native || options->nTokens >= 0)) {
    if (*bytes >= 0) return 0;
    *bytes = 0;
    *tokens = options->nTokens; /* -1: as the trace has them */
    return 1;
  }
  int64_t next = *bytes < 0 ? options->minBytes : *bytes * options->stepFactor;
  if (next > options->maxBytes || next == *bytes) return 0;
  int64_t count = next / (int64_t)rowShape(options->dataType, options->hidden).bytes;
  if (count > WORKLOAD_MAX_TOKENS) {
    return perfErrorSet(error, "%lld bytes are %lld tokens, more than %d", (long long)next, (long long)count,
                        WORKLOAD_MAX_TOKENS);
  }
  *bytes = next;
  *tokens = (int32_t)count;
  return 1;
}

/* ---- kinds of traffic ---- */

static int traffic_zipf_run(const benchOptions_t *options, benchWorkloadCall_t call, void *user,
                            perfError_t *error) {
  zipf_t *zipf = NULL;
  int64_t bytes = -1;
  int32_t tokens = 0;
  int more = 0;
  if (zipfCreate(&zipf, options->nRanks, options->nExperts, options->topK, options->skew, error) != 0)
    return -1;
  while ((more = traffic_tokens_next(options, false, &bytes, &tokens, error)) > 0) {
    workload_t workload;
    if (workloadZipf(&workload, zipf, options->nRanks, options->nExperts, options->topK, tokens,
                     (uint64_t)options->seed, 0, error) != 0) {
      more = -1;
      break;
    }
    int status = call(user, &workload, error);
    workloadFree(&workload);
    if (status != 0) {
      more = -1;
      break;
    }
  }
  zipfDestroy(zipf);
  return more;
}

static int traffic_record_run(const benchOptions_t *options, const loadRecord_t *record,
                              benchWorkloadCall_t call, void *user, perfError_t *error) {
  int64_t bytes = -1;
  int32_t tokens = 0;
  int more = -1;
  int32_t *loads = calloc((size_t)options->nRanks * (size_t)record->nExperts, sizeof(loads[0]));
  if (loads == NULL)
    return perfErrorSet(error, "no memory for %d x %d loads", options->nRanks, record->nExperts);
  if (loadRecordMap(record, options->nRanks, loads, error) != 0) goto free_loads;
  while ((more = traffic_tokens_next(options, true, &bytes, &tokens, error)) > 0) {
    workload_t workload;
    more = -1;
    if (workloadRecord(&workload, options->nRanks, record->nExperts, options->topK, loads, tokens,
                       (uint64_t)options->seed, error) != 0) {
      break;
    }
    snprintf(workload.label, sizeof(workload.label), "%lld/%lld/%lld", (long long)record->step,
             (long long)record->layer, (long long)record->microbatch);
    int status = call(user, &workload, error);
    workloadFree(&workload);
    if (status != 0) break;
  }

free_loads:
  free(loads);
  return more;
}

static int traffic_trace_run(const benchOptions_t *options, benchWorkloadCall_t call, void *user,
                             perfError_t *error) {
  loadTrace_t *trace = NULL;
  loadRecord_t record;
  int64_t taken = 0;
  int more = 0;
  if (loadTraceOpen(&trace, options->tracePath, error) != 0) return -1;
  while ((options->limit == 0 || taken < options->limit) &&
         (more = loadTraceNext(trace, &record, error)) > 0) {
    if (options->layer >= 0 && record.layer != options->layer) continue;
    taken++;
    more = traffic_record_run(options, &record, call, user, error);
    if (more < 0) break;
  }
  loadTraceClose(trace);
  if (more < 0) return -1;
  return taken == 0 ? perfErrorSet(error, "%s: no records to run", options->tracePath) : 0;
}

static int traffic_routing_run(const benchOptions_t *options, benchWorkloadCall_t call, void *user,
                               perfError_t *error) {
  routingTrace_t routing;
  int64_t bytes = -1;
  int32_t tokens = 0;
  int more = 0;
  if (routingTraceRead(&routing, options->routingPath, options->nExperts, error) != 0) return -1;
  int32_t nExperts = options->nExperts;
  if (nExperts == 0) {
    nExperts = (routing.maxExpert + options->nRanks) / options->nRanks * options->nRanks;
    if (nExperts == 0) nExperts = options->nRanks;
  }
  while ((more = traffic_tokens_next(options, true, &bytes, &tokens, error)) > 0) {
    workload_t workload;
    more = -1;
    if (workloadRouting(&workload, &routing, options->nRanks, nExperts, tokens, error) != 0) break;
    int status = call(user, &workload, error);
    workloadFree(&workload);
    if (status != 0) break;
  }
  routingTraceFree(&routing);
  return more;
}

int benchTrafficRun(const benchOptions_t *options, benchWorkloadCall_t call, void *user, perfError_t *error) {
  if (options->tracePath != NULL) return traffic_trace_run(options, call, user, error);
  if (options->routingPath != NULL) return traffic_routing_run(options, call, user, error);
  return traffic_zipf_run(options, call, user, error);
}

void benchTrafficPrint(const benchOptions_t *options) {
  if (options->tracePath != NULL) {
    printf("# traffic: load trace %s, top-%d", options->tracePath, options->topK);
  } else if (options->routingPath != NULL) {
    printf("# traffic: routing trace %s", options->routingPath);
  } else {
    printf("# traffic: zipf, imbalance %g, top-%d of %d experts, seed %lld", options->skew, options->topK,
           options->nExperts, (long long)options->seed);
  }
  if (options->nTokens >= 0) printf(", %d tokens a rank", options->nTokens);
  printf("\n");
}
