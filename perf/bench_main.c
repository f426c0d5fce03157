#include "bench.h"

#include "rows.h"

#include <stdio.h>
#include <stdlib.h>

/* Runs a workload with the balance settings asked for. */
static int bench_workload_run(const benchOptions_t *options, const workload_t *workload,
                              benchReport_t *report, perfError_t *error) {
  if (workload->repeats && options->combineMode == ULTRAEP_COMBINE_PARTIAL) {
    return perfErrorSet(
        error,
        "%s: a token meets one expert twice, which --combine partial cannot be checked with: ask "
        "for a smaller --topk",
        workload->label);
  }
  int first = options->balance == BENCH_BALANCE_ON ? 1 : 0,
      last = options->balance == BENCH_BALANCE_OFF ? 0 : 1;
  for (int balance = first; balance <= last; balance++) {
    benchResult_t result;
    benchReportProgress(report, workload, balance);
    if (benchHostRun(options, workload, balance, &result, error) != 0) return -1;
    if (benchReportLine(report, workload, balance, &result, error) != 0) return -1;
  }
  return 0;
}

/* ---- tokens of each size ---- */

/* 1: the next number of tokens a rank; 0: no more. *bytes is the sweep's state, -1 at the start. */
static int bench_tokens_next(const benchOptions_t *options, bool native, int64_t *bytes, int32_t *tokens,
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

static int bench_zipf_run(const benchOptions_t *options, benchReport_t *report, perfError_t *error) {
  zipf_t *zipf = NULL;
  int64_t bytes = -1;
  int32_t tokens = 0;
  int more = 0;
  if (zipfCreate(&zipf, options->nRanks, options->nExperts, options->topK, options->skew, error) != 0)
    return -1;
  while ((more = bench_tokens_next(options, false, &bytes, &tokens, error)) > 0) {
    workload_t workload;
    if (workloadZipf(&workload, zipf, options->nRanks, options->nExperts, options->topK, tokens,
                     (uint64_t)options->seed, 0, error) != 0) {
      more = -1;
      break;
    }
    int status = bench_workload_run(options, &workload, report, error);
    workloadFree(&workload);
    if (status != 0) {
      more = -1;
      break;
    }
  }
  zipfDestroy(zipf);
  return more;
}

static int bench_record_run(const benchOptions_t *options, const loadRecord_t *record, benchReport_t *report,
                            perfError_t *error) {
  int64_t bytes = -1;
  int32_t tokens = 0;
  int more = -1;
  int32_t *loads = calloc((size_t)options->nRanks * (size_t)record->nExperts, sizeof(loads[0]));
  if (loads == NULL)
    return perfErrorSet(error, "no memory for %d x %d loads", options->nRanks, record->nExperts);
  if (loadRecordMap(record, options->nRanks, loads, error) != 0) goto free_loads;
  while ((more = bench_tokens_next(options, true, &bytes, &tokens, error)) > 0) {
    workload_t workload;
    more = -1;
    if (workloadRecord(&workload, options->nRanks, record->nExperts, options->topK, loads, tokens,
                       (uint64_t)options->seed, error) != 0) {
      break;
    }
    snprintf(workload.label, sizeof(workload.label), "%lld/%lld/%lld", (long long)record->step,
             (long long)record->layer, (long long)record->microbatch);
    int status = bench_workload_run(options, &workload, report, error);
    workloadFree(&workload);
    if (status != 0) break;
  }

free_loads:
  free(loads);
  return more;
}

static int bench_trace_run(const benchOptions_t *options, benchReport_t *report, perfError_t *error) {
  loadTrace_t *trace = NULL;
  loadRecord_t record;
  int64_t taken = 0;
  int more = 0;
  if (loadTraceOpen(&trace, options->tracePath, error) != 0) return -1;
  while ((options->limit == 0 || taken < options->limit) &&
         (more = loadTraceNext(trace, &record, error)) > 0) {
    if (options->layer >= 0 && record.layer != options->layer) continue;
    taken++;
    more = bench_record_run(options, &record, report, error);
    if (more < 0) break;
  }
  loadTraceClose(trace);
  if (more < 0) return -1;
  return taken == 0 ? perfErrorSet(error, "%s: no records to run", options->tracePath) : 0;
}

static int bench_routing_run(const benchOptions_t *options, benchReport_t *report, perfError_t *error) {
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
  while ((more = bench_tokens_next(options, true, &bytes, &tokens, error)) > 0) {
    workload_t workload;
    more = -1;
    if (workloadRouting(&workload, &routing, options->nRanks, nExperts, tokens, error) != 0) break;
    int status = bench_workload_run(options, &workload, report, error);
    workloadFree(&workload);
    if (status != 0) break;
  }
  routingTraceFree(&routing);
  return more;
}

int main(int argc, char **argv) {
  benchOptions_t options;
  benchReport_t *report = NULL;
  perfError_t error = {""};
  int64_t wrong = 0;
  benchOptionsParse(&options, argc, argv);
  if (options.backend == BENCH_BACKEND_CUDA) {
    fprintf(stderr, "ultraep_perf: this build has no CUDA backend; use -B host\n");
    return PERF_EXIT_FAILED;
  }
  int status = benchReportOpen(&report, &options, argc, argv, &error);
  if (status == 0) {
    status = options.tracePath != NULL     ? bench_trace_run(&options, report, &error)
             : options.routingPath != NULL ? bench_routing_run(&options, report, &error)
                                           : bench_zipf_run(&options, report, &error);
  }
  if (status == 0) status = benchReportFinish(report, &wrong, &error);
  benchReportDestroy(report);
  if (status != 0) {
    fflush(stdout);
    fprintf(stderr, "ultraep_perf: %s\n", error.text);
    return PERF_EXIT_FAILED;
  }
  return wrong == 0 ? PERF_EXIT_OK : PERF_EXIT_FAILED;
}
