#include "bench.h"

#include "bench_job.h"
#include "rows.h"

#include <stdio.h>
#include <stdlib.h>

/* What runs, and where it is told. */
typedef struct {
  benchOptions_t options;
  const benchOps_t *ops;
  benchMachine_t machine;
  benchReport_t *report; /* of the first process; the others have none */
  int64_t wrong;
} bench_t;

/* Runs a workload with the balance settings asked for. */
static int bench_workload_run(bench_t *bench, const workload_t *workload, perfError_t *error) {
  benchOptions_t *options = &bench->options;
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
    benchReportProgress(bench->report, workload, balance);
    if (benchRun(bench->ops, options, workload, balance, &result, error) != 0) return -1;
    bench->wrong += result.wrong;
    bench->options.matrixPath = NULL; /* written by the first line */
    int status = benchReportLine(bench->report, workload, balance, &result, error);
    if (benchJobAny(status != 0)) return -1;
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

static int bench_zipf_run(bench_t *bench, perfError_t *error) {
  const benchOptions_t *options = &bench->options;
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
    int status = bench_workload_run(bench, &workload, error);
    workloadFree(&workload);
    if (status != 0) {
      more = -1;
      break;
    }
  }
  zipfDestroy(zipf);
  return more;
}

static int bench_record_run(bench_t *bench, const loadRecord_t *record, perfError_t *error) {
  const benchOptions_t *options = &bench->options;
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
    int status = bench_workload_run(bench, &workload, error);
    workloadFree(&workload);
    if (status != 0) break;
  }

free_loads:
  free(loads);
  return more;
}

static int bench_trace_run(bench_t *bench, perfError_t *error) {
  const benchOptions_t *options = &bench->options;
  loadTrace_t *trace = NULL;
  loadRecord_t record;
  int64_t taken = 0;
  int more = 0;
  if (loadTraceOpen(&trace, options->tracePath, error) != 0) return -1;
  while ((options->limit == 0 || taken < options->limit) &&
         (more = loadTraceNext(trace, &record, error)) > 0) {
    if (options->layer >= 0 && record.layer != options->layer) continue;
    taken++;
    more = bench_record_run(bench, &record, error);
    if (more < 0) break;
  }
  loadTraceClose(trace);
  if (more < 0) return -1;
  return taken == 0 ? perfErrorSet(error, "%s: no records to run", options->tracePath) : 0;
}

static int bench_routing_run(bench_t *bench, perfError_t *error) {
  const benchOptions_t *options = &bench->options;
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
    int status = bench_workload_run(bench, &workload, error);
    workloadFree(&workload);
    if (status != 0) break;
  }
  routingTraceFree(&routing);
  return more;
}

static int bench_all_run(bench_t *bench, int argc, char **argv, perfError_t *error) {
  const benchOptions_t *options = &bench->options;
  if (benchMachineOpen(bench->ops, options, &bench->machine, error) != 0) return -1;
  int status = benchJob.process == 0
                   ? benchReportOpen(&bench->report, options, &bench->machine, argc, argv, error)
                   : 0;
  if (benchJobAny(status != 0)) return -1;
  status = options->tracePath != NULL     ? bench_trace_run(bench, error)
           : options->routingPath != NULL ? bench_routing_run(bench, error)
                                          : bench_zipf_run(bench, error);
  return status == 0 ? benchReportFinish(bench->report, error) : status;
}

static const benchOps_t *bench_ops_find(const benchOptions_t *options, perfError_t *error) {
  if (options->backend == BENCH_BACKEND_HOST) return &benchHostOps;
#ifdef ULTRAEP_HAVE_CUDA_BACKEND
  (void)error;
  return &benchCudaOps;
#else
  perfErrorSet(error, "this build has no CUDA backend; use -B host");
  return NULL;
#endif
}

int main(int argc, char **argv) {
  bench_t bench = {.report = NULL};
  perfError_t error = {""};
  benchOptionsParse(&bench.options, argc, argv);
  bench.ops = bench_ops_find(&bench.options, &error);
  int status = bench.ops == NULL ? -1 : benchJobOpen(&error);
  if (status == 0) status = bench_all_run(&bench, argc, argv, &error);
  /* After a failure a communicator may wait for a rank that is gone; the end of the process frees it. */
  if (status == 0) benchMachineClose(bench.ops);
  benchReportDestroy(bench.report);
  if (status != 0) {
    fflush(stdout);
    /* A process that stopped because of another one has nothing to add. */
    if (error.text[0] != '\0') fprintf(stderr, "ultraep_perf: %s\n", error.text);
  }
  benchJobClose(status != 0 && error.text[0] != '\0');
  return status == 0 && bench.wrong == 0 ? PERF_EXIT_OK : PERF_EXIT_FAILED;
}
