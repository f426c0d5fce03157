#include "bench_run.h"

#include "bench_job.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *benchAllocate(size_t count, size_t bytes) {
  size_t total = 0;
  if (__builtin_mul_overflow(count, bytes, &total) || total > SIZE_MAX - 64) return NULL;
  return aligned_alloc(64, (total / 64 + 1) * 64);
}

/* ---- shapes ---- */

void benchShapesSet(benchRun_t *run) {
  const benchOptions_t *options = run->options;
  const workload_t *workload = run->workload;
  int32_t segments = workload->nExperts / workload->nRanks + options->nSlots;
  run->firstRank = benchJob.nProcesses > 1 ? benchJob.process : 0;
  run->nLocal = benchJob.nProcesses > 1 ? 1 : workload->nRanks;
  run->leadCalls = run->ops->deviceTimed && !options->check ? 1 : 0;
  run->timedCalls = options->aggIters;
  run->shape = rowShape(options->dataType, options->hidden);
  run->combineShape = run->shape;
  if (options->dataType == ULTRAEP_FLOAT8) {
    run->combineShape = rowShape(ULTRAEP_BFLOAT16, options->hidden);
    run->scaleBytes = options->hidden < 128 ? 4 : (size_t)options->hidden / 128 * 4;
  }
  /* A plan never loads a rank more than the most loaded one without replicas. */
  run->maxRows = workload->maxBefore + (int64_t)segments * (options->alignment - 1);
  if (run->maxRows < 1) run->maxRows = 1;
  run->copyBytes = (size_t)(workload->assignments / workload->nRanks) * run->shape.bytes;
}

/* Refuses a run that would not fit into memory. */
static int bench_memory_check(const benchRun_t *run, perfError_t *error) {
  double share = (double)run->nLocal / run->workload->nRanks;
  double tokens = (double)run->workload->maxTokens * run->workload->nRanks;
  double rows = (double)run->workload->assignments, copied = (double)run->copyBytes * run->workload->nRanks;
  double need = tokens * (double)(run->shape.bytes + run->combineShape.bytes) +
                (run->ops->deviceTimed ? 0 : copied) +
                rows * (double)(run->shape.bytes + (run->scaleBytes > 0 ? run->combineShape.bytes : 0));
  const char *what = NULL;
  double have = run->ops->memoryThere(&what);
  if (need * share <= 0.8 * have) return 0;
  return perfErrorSet(error, "%s: %d tokens a rank need %.1f GB, %s %.1f GB: ask for fewer with --tokens",
                      run->workload->label, run->workload->nominalTokens, need * share / 1e9, what,
                      have / 1e9);
}

static void bench_verify_set(benchRun_t *run) {
  const benchOptions_t *options = run->options;
  verify_t *verify = &run->verify;
  verify->nRanks = run->workload->nRanks;
  verify->nExperts = run->workload->nExperts;
  verify->topK = run->workload->topK;
  verify->nSlots = options->nSlots;
  verify->nDomainRanks = options->nDomainRanks;
  verify->alignment = options->alignment;
  verify->scaleBytes = run->scaleBytes;
  verify->shape = run->shape;
  verify->combineShape = run->combineShape;
  verify->partial = options->combineMode == ULTRAEP_COMBINE_PARTIAL;
}

/* ---- results ---- */

/* Sums over the ranks of all processes. */
typedef struct {
  int64_t replicas, wrong, weightBytes, dispatchBytes, combineBytes, gpuBytes;
} benchSums_t;

static benchSums_t bench_sums_make(const benchRun_t *run) {
  benchSums_t sums = {0};
  for (int32_t i = 0; i < run->nLocal; i++) {
    const benchRank_t *rank = &run->ranks[i];
    sums.replicas += rank->replicas;
    sums.wrong += rank->wrong;
    sums.weightBytes += rank->counters.weightBytes;
    sums.dispatchBytes += rank->counters.dispatchBytes;
    sums.combineBytes += rank->counters.combineBytes;
    sums.gpuBytes += rank->gpuBytes;
  }
  benchJobSum((int64_t *)&sums, (int32_t)(sizeof(sums) / sizeof(int64_t)));
  return sums;
}

/* The first fault of the lowest process that found one, on all processes. */
static perfError_t bench_fault_find(const benchRun_t *run) {
  perfError_t fault = run->verify.fault;
  bool mine = fault.text[0] != '\0';
  double lowest = -benchJobMax(mine ? -(double)benchJob.process : -(double)benchJob.nProcesses);
  if (lowest < benchJob.nProcesses) benchJobBroadcast(&fault, sizeof(fault), (int32_t)lowest);
  return fault;
}

/* Bytes that cross between different ranks in one go, from how often the rank's calls were made. */
static void bench_link_bytes_set(const benchRun_t *run, const benchSums_t *sums, benchResult_t *result) {
  int64_t calls =
      (int64_t)(run->options->iters + run->options->warmupIters) * (run->leadCalls + run->timedCalls);
  int64_t dispatches = run->ops->deviceTimed ? 2 * calls : calls; /* BENCH_STEP dispatches, too */
  result->linkBytes[BENCH_WEIGHTS] = sums->weightBytes / calls;
  result->linkBytes[BENCH_DISPATCH] = sums->dispatchBytes / dispatches;
  result->linkBytes[BENCH_COMBINE] = sums->combineBytes / calls;
  result->busiestBytes[BENCH_DISPATCH] =
      benchPlanBusiest(run, result->linkBytes[BENCH_DISPATCH], run->shape.bytes + run->scaleBytes);
  result->busiestBytes[BENCH_COMBINE] =
      benchPlanBusiest(run, result->linkBytes[BENCH_COMBINE], run->combineShape.bytes);
}

static void bench_moved_set(const benchRun_t *run, benchResult_t *result) {
  const workload_t *workload = run->workload;
  int64_t tokens = 0;
  for (int32_t r = 0; r < workload->nRanks; r++) tokens += workload->nTokens[r];
  int64_t passed = tokens + workload->assignments;
  result->dispatchMoved = passed * (int64_t)(run->shape.bytes + run->scaleBytes);
  result->combineMoved = passed * (int64_t)run->combineShape.bytes;
  int64_t bytes = run->options->expertBytes, nReduced = result->replicas;
  result->weightsMoved = 2 * bytes * result->replicas;
  if (run->options->grads == BENCH_GRADS_NONE) return;
  for (int32_t e = 0; e < workload->nExperts; e++) nReduced += run->replicaShares[e] > 0;
  result->gradsMoved = 2 * bytes * nReduced;
}

static void bench_result_set(benchRun_t *run, const int64_t *received, benchResult_t *result) {
  const workload_t *workload = run->workload;
  benchSums_t sums = bench_sums_make(run);
  *result = (benchResult_t){.rows = workload->assignments,
                            .maxRows = workload->maxSend,
                            .copyBytes = (int64_t)run->copyBytes * workload->nRanks,
                            .fault = bench_fault_find(run),
                            .dispatchRowBytes = run->shape.bytes,
                            .combineRowBytes = run->combineShape.bytes,
                            .replicas = (int32_t)sums.replicas,
                            .wrong = sums.wrong,
                            .gpuBytes = sums.gpuBytes};
  for (int phase = 0; phase < BENCH_PHASES; phase++) {
    result->us[phase] = 1e6 * perfMedian(run->seconds[phase], run->options->iters);
  }
  double mean = (double)workload->assignments / workload->nRanks;
  result->before = workload->assignments == 0 ? 1 : (double)workload->maxBefore / mean;
  result->after = perfImbalance(received, workload->nRanks);
  for (int32_t r = 0; r < workload->nRanks; r++) {
    if (received[r] > result->maxRows) result->maxRows = received[r];
  }
  for (int32_t i = 0; i < run->nLocal; i++) {
    const ultraepGroupProperties_t *properties = &run->ranks[i].properties;
    if (properties->windowBytes > result->windowBytes) result->windowBytes = properties->windowBytes;
    if (properties->slotBytes > result->slotBytes) result->slotBytes = properties->slotBytes;
    if (properties->privateBytes > result->privateBytes) result->privateBytes = properties->privateBytes;
  }
  bench_link_bytes_set(run, &sums, result);
  bench_moved_set(run, result);
}

static int bench_result_make(benchRun_t *run, benchResult_t *result, perfError_t *error) {
  int32_t nRanks = run->workload->nRanks;
  int64_t *received = calloc((size_t)nRanks, sizeof(received[0]));
  if (benchJobAny(received == NULL) || received == NULL) {
    free(received);
    return perfErrorSet(error, "no memory for %d ranks", nRanks);
  }
  for (int32_t i = 0; i < run->nLocal; i++) received[run->ranks[i].rank] = run->ranks[i].received;
  benchJobSum(received, nRanks);
  bench_result_set(run, received, result);
  free(received);
  bool weighed = benchPlanGate(run, &result->gate, error) == 0;
  return benchJobAny(!weighed) ? -1 : 0;
}

/* ---- threads ---- */

static void bench_gate_move(benchRun_t *run, bool open) {
  pthread_mutex_lock(&run->lock);
  run->gate = open ? BENCH_GATE_OPEN : BENCH_GATE_CANCELLED;
  pthread_cond_broadcast(&run->gateMoved);
  pthread_mutex_unlock(&run->lock);
}

static void bench_rank_init(benchRun_t *run, int32_t local) {
  benchRank_t *rank = &run->ranks[local];
  bool all = benchJob.nProcesses > 1 && run->options->check;
  rank->run = run;
  rank->local = local;
  rank->rank = run->firstRank + local;
  rank->firstSource = all ? 0 : rank->rank;
  rank->lastSource = all ? run->workload->nRanks : rank->rank + 1;
}

/* Runs all ranks to their end. */
static int bench_threads_run(benchRun_t *run, perfError_t *error) {
  int32_t started = 0;
  for (; started < run->nLocal; started++) {
    bench_rank_init(run, started);
    if (pthread_create(&run->ranks[started].thread, NULL, benchRankMain, &run->ranks[started]) != 0) break;
  }
  bool open = !benchJobAny(started < run->nLocal);
  bench_gate_move(run, open);
  for (int32_t i = 0; i < started; i++) pthread_join(run->ranks[i].thread, NULL);
  if (started < run->nLocal) return perfErrorSet(error, "no thread for rank %d", run->firstRank + started);
  if (open && !run->stopping) return 0;
  *error = run->error;
  return -1;
}

/* ---- memory ---- */

static void bench_memory_free(benchRun_t *run) {
  free(run->ranks);
  free(run->verify.sources);
  benchPlanFree(run);
  for (int phase = 0; phase < BENCH_PHASES; phase++) free(run->seconds[phase]);
}

static int bench_memory_allocate(benchRun_t *run, perfError_t *error) {
  size_t nRanks = (size_t)run->workload->nRanks;
  bool whole = true;
  run->ranks = calloc((size_t)run->nLocal, sizeof(run->ranks[0]));
  run->verify.sources = calloc(nRanks, sizeof(run->verify.sources[0]));
  for (int phase = 0; phase < BENCH_PHASES; phase++) {
    run->seconds[phase] = calloc((size_t)run->options->iters, sizeof(double));
    whole = whole && run->seconds[phase] != NULL;
  }
  if (whole && run->ranks != NULL && run->verify.sources != NULL) return 0;
  return perfErrorSet(error, "no memory for %zu ranks", nRanks);
}

/* What this process alone can see before the ranks meet. */
static int bench_run_prepare(benchRun_t *run, perfError_t *error) {
  const benchOptions_t *options = run->options;
  benchShapesSet(run);
  bench_verify_set(run);
  if (benchJob.nProcesses > 1 && options->check && run->workload->repeats)
    return perfErrorSet(
        error,
        "%s: a token meets one expert twice, which ranks in several processes cannot be checked "
        "with: ask for a smaller --topk, or -c 0",
        run->workload->label);
  if (benchPlanMake(run, error) != 0) return -1;
  if (options->matrixPath != NULL && benchJob.process == 0 &&
      benchPlanWrite(run, options->matrixPath, error) != 0)
    return -1;
  if (bench_memory_check(run, error) != 0) return -1;
  return bench_memory_allocate(run, error);
}

static int bench_locks_make(benchRun_t *run, perfError_t *error) {
  if (verifyInit(&run->verify) != 0) return perfErrorSet(error, "no lock for the check");
  if (pthread_mutex_init(&run->lock, NULL) != 0) {
    perfErrorSet(error, "no lock for %d ranks", run->nLocal);
    goto destroy_verify;
  }
  if (pthread_cond_init(&run->gateMoved, NULL) != 0) {
    perfErrorSet(error, "no condition for %d ranks", run->nLocal);
    goto destroy_lock;
  }
  if (pthread_barrier_init(&run->barrier, NULL, (unsigned)run->nLocal) != 0) {
    perfErrorSet(error, "no barrier for %d ranks", run->nLocal);
    goto destroy_gate;
  }
  return 0;

destroy_gate:
  pthread_cond_destroy(&run->gateMoved);
destroy_lock:
  pthread_mutex_destroy(&run->lock);
destroy_verify:
  verifyDestroy(&run->verify);
  return -1;
}

static void bench_locks_destroy(benchRun_t *run) {
  pthread_barrier_destroy(&run->barrier);
  pthread_cond_destroy(&run->gateMoved);
  pthread_mutex_destroy(&run->lock);
  verifyDestroy(&run->verify);
}

/* With all processes ready. */
static int bench_run_meet(benchRun_t *run, perfError_t *error) {
  bool opened = run->ops->runOpen(run, error) == 0;
  int status = benchJobAny(!opened) ? -1 : bench_threads_run(run, error);
  if (opened) run->ops->runClose(run);
  return status;
}

int benchRanksRun(benchRun_t *run, bool ready, perfError_t *error) {
  bool locked = ready && bench_locks_make(run, error) == 0;
  int status = benchJobAny(!locked) || !locked ? -1 : bench_run_meet(run, error);
  if (locked) bench_locks_destroy(run);
  return status;
}

int benchRun(const benchOps_t *ops, const benchOptions_t *options, const workload_t *workload, bool balance,
             benchResult_t *result, perfError_t *error) {
  benchRun_t run = {.ops = ops,
                    .options = options,
                    .workload = workload,
                    .balance = balance,
                    .work = benchRankWork,
                    .release = benchRankRelease};
  error->text[0] = '\0';
  int status = benchRanksRun(&run, bench_run_prepare(&run, error) == 0, error);
  if (status == 0) status = bench_result_make(&run, result, error);
  bench_memory_free(&run);
  return status;
}

int benchMachineOpen(const benchOps_t *ops, const benchOptions_t *options, benchMachine_t *machine,
                     perfError_t *error) {
  *machine = (benchMachine_t){0};
  return ops->open(options, machine, error);
}

void benchMachineClose(const benchOps_t *ops) {
  ops->close();
}

int benchEnd(const char *program, const benchOps_t *ops, int status, bool wrong, const perfError_t *error) {
  /* After a failure a communicator may wait for a rank that is gone; the end of the process frees it. */
  if (status == 0) benchMachineClose(ops);
  if (status != 0) {
    fflush(stdout);
    /* A process that stopped because of another one has nothing to add. */
    if (error->text[0] != '\0') fprintf(stderr, "%s: %s\n", program, error->text);
  }
  benchJobClose(status != 0 && error->text[0] != '\0');
  return status == 0 && !wrong ? PERF_EXIT_OK : PERF_EXIT_FAILED;
}
