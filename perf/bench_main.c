#include "bench.h"

#include "bench_job.h"

/* What runs, and where it is told. */
typedef struct {
  benchOptions_t options;
  const benchOps_t *ops;
  benchMachine_t machine;
  benchReport_t *report; /* of the first process; the others have none */
  int64_t wrong;
} bench_t;

/* Runs a workload with the balance settings asked for. */
static int bench_workload_run(void *user, const workload_t *workload, perfError_t *error) {
  bench_t *bench = user;
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

static int bench_all_run(bench_t *bench, int argc, char **argv, perfError_t *error) {
  const benchOptions_t *options = &bench->options;
  if (benchMachineOpen(bench->ops, options, &bench->machine, error) != 0) return -1;
  int status = benchJob.process == 0
                   ? benchReportOpen(&bench->report, options, &bench->machine, argc, argv, error)
                   : 0;
  if (benchJobAny(status != 0)) return -1;
  status = benchTrafficRun(options, bench_workload_run, bench, error);
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
  benchReportDestroy(bench.report);
  return benchEnd("ultraep_perf", bench.ops, status, bench.wrong != 0, &error);
}
