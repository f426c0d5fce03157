#include "bench_job.h"
#include "moe.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct {
  moeOptions_t options;
  const benchOps_t *benchOps;
  const moeOps_t *ops;
  benchMachine_t machine;
  moeReport_t *report; /* of the first process; the others have none */
  bool bad;
} moe_t;

/* The unbalanced run, which the balanced one is compared with, then that, then the ideal. */
static int moe_kinds_run(moe_t *moe, const workload_t *workload, const workload_t *ideal,
                         moeResult_t *results, perfError_t *error) {
  int32_t nLocal = moeLocalRanks(&moe->options);
  moeReference_t *references = calloc((size_t)nLocal, sizeof(references[0]));
  int status = 0;
  if (benchJobAny(references == NULL)) {
    free(references);
    return perfErrorSet(error, "no memory for %d ranks", nLocal);
  }
  for (int kind = 0; kind < MOE_KINDS && status == 0; kind++)
    status = moeRun(moe->benchOps, moe->ops, &moe->options, kind == MOE_IDEAL ? ideal : workload,
                    (moeKind_t)kind, references, &results[kind], error);
  moeReferencesFree(references, nLocal);
  return status;
}

static int moe_workload_run(void *user, const workload_t *workload, perfError_t *error) {
  moe_t *moe = user;
  moeResult_t results[MOE_KINDS] = {0};
  workload_t ideal;
  bool made = workloadUniform(&ideal, workload, (workloadIdeal_t)moe->options.ideal,
                              (uint64_t)moe->options.bench.seed, error) == 0;
  int status = benchJobAny(!made) ? -1 : moe_kinds_run(moe, workload, &ideal, results, error);
  if (made) workloadFree(&ideal);
  for (int kind = 0; status == 0 && kind < MOE_KINDS; kind++) moe->bad = moe->bad || results[kind].check.bad;
  if (status == 0 && benchJobAny(moeReportLines(moe->report, workload, results, error) != 0)) status = -1;
  for (int kind = 0; kind < MOE_KINDS; kind++) moeResultFree(&results[kind]);
  return status;
}

static int moe_all_run(moe_t *moe, int argc, char **argv, perfError_t *error) {
  const moeOptions_t *options = &moe->options;
  if (benchMachineOpen(moe->benchOps, &options->bench, &moe->machine, error) != 0) return -1;
  int status =
      benchJob.process != 0 ? 0 : moeReportOpen(&moe->report, options, &moe->machine, argc, argv, error);
  if (benchJobAny(status != 0)) return -1;
  if (benchTrafficRun(&options->bench, moe_workload_run, moe, error) != 0) return -1;
  return moeReportFinish(moe->report, error);
}

static int moe_ops_find(moe_t *moe, perfError_t *error) {
  if (moe->options.bench.backend == BENCH_BACKEND_HOST) {
    moe->benchOps = &benchHostOps;
    moe->ops = &moeHostOps;
    return 0;
  }
#ifdef ULTRAEP_HAVE_MOE_CUDA
  (void)error;
  moe->benchOps = &benchCudaOps;
  moe->ops = &moeCudaOps;
  return 0;
#else
  return perfErrorSet(error, "this build has no CUDA backend, or had no cuBLAS headers; use -B host");
#endif
}

int main(int argc, char **argv) {
  moe_t moe = {.report = NULL};
  perfError_t error = {""};
  moeOptionsParse(&moe.options, argc, argv);
  int status = moe_ops_find(&moe, &error);
  if (status == 0) status = benchJobOpen(&error);
  if (status == 0) status = moe_all_run(&moe, argc, argv, &error);
  moeReportDestroy(moe.report);
  return benchEnd("ultraep_moe", moe.benchOps, status, moe.bad, &error);
}
