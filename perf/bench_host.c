#include "bench_host.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void *benchAllocate(size_t count, size_t bytes) {
  size_t total = 0;
  if (__builtin_mul_overflow(count, bytes, &total) || total > SIZE_MAX - 64) return NULL;
  return aligned_alloc(64, (total / 64 + 1) * 64);
}

/* ---- shapes ---- */

static void bench_shapes_set(benchRun_t *run) {
  const benchOptions_t *options = run->options;
  const workload_t *workload = run->workload;
  int32_t segments = workload->nExperts / workload->nRanks + options->nSlots;
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
  double tokens = (double)run->workload->maxTokens * run->workload->nRanks;
  double rows = (double)run->workload->assignments, copied = (double)run->copyBytes * run->workload->nRanks;
  double need = tokens * (double)(run->shape.bytes + run->combineShape.bytes) + copied +
                rows * (double)(run->shape.bytes + (run->scaleBytes > 0 ? run->combineShape.bytes : 0));
  double have = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
  if (need <= 0.8 * have) return 0;
  return perfErrorSet(
      error, "%s: %d tokens a rank need %.1f GB, this machine has %.1f GB: ask for fewer with --tokens",
      run->workload->label, run->workload->nominalTokens, need / 1e9, have / 1e9);
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

static void bench_result_set(benchRun_t *run, const int64_t *received, benchResult_t *result) {
  const workload_t *workload = run->workload;
  int64_t calls = (int64_t)(run->options->iters + run->options->warmupIters) * run->options->aggIters;
  *result = (benchResult_t){.rows = workload->assignments,
                            .maxRows = workload->maxSend,
                            .copyBytes = (int64_t)run->copyBytes * workload->nRanks,
                            .fault = run->verify.fault,
                            .dispatchRowBytes = run->shape.bytes,
                            .combineRowBytes = run->combineShape.bytes};
  for (int phase = 0; phase < BENCH_PHASES; phase++) {
    result->us[phase] = 1e6 * perfMedian(run->seconds[phase], run->options->iters);
  }
  double mean = (double)workload->assignments / workload->nRanks;
  result->before = workload->assignments == 0 ? 1 : (double)workload->maxBefore / mean;
  result->after = perfImbalance(received, workload->nRanks);
  for (int32_t r = 0; r < workload->nRanks; r++) {
    const benchRank_t *rank = &run->ranks[r];
    if (received[r] > result->maxRows) result->maxRows = received[r];
    result->replicas += rank->replicas;
    result->wrong += rank->wrong;
    result->linkBytes[BENCH_WEIGHTS] += rank->counters.weightBytes / calls;
    result->linkBytes[BENCH_DISPATCH] += rank->counters.dispatchBytes / calls;
    result->linkBytes[BENCH_COMBINE] += rank->counters.combineBytes / calls;
  }
}

static int bench_result_make(benchRun_t *run, benchResult_t *result, perfError_t *error) {
  int32_t nRanks = run->workload->nRanks;
  int64_t *received = calloc((size_t)nRanks, sizeof(received[0]));
  if (received == NULL) return perfErrorSet(error, "no memory for %d ranks", nRanks);
  for (int32_t r = 0; r < nRanks; r++) received[r] = run->ranks[r].received;
  bench_result_set(run, received, result);
  free(received);
  return 0;
}

/* ---- threads ---- */

static void bench_gate_move(benchRun_t *run, bool open) {
  pthread_mutex_lock(&run->lock);
  run->gate = open ? BENCH_GATE_OPEN : BENCH_GATE_CANCELLED;
  pthread_cond_broadcast(&run->gateMoved);
  pthread_mutex_unlock(&run->lock);
}

/* Runs all ranks to their end. */
static int bench_threads_run(benchRun_t *run, perfError_t *error) {
  int32_t nRanks = run->workload->nRanks, started = 0;
  for (; started < nRanks; started++) {
    benchRank_t *rank = &run->ranks[started];
    rank->run = run;
    rank->rank = started;
    if (pthread_create(&rank->thread, NULL, benchRankMain, rank) != 0) break;
  }
  bench_gate_move(run, started == nRanks);
  for (int32_t r = 0; r < started; r++) pthread_join(run->ranks[r].thread, NULL);
  if (started < nRanks) return perfErrorSet(error, "no thread for rank %d", started);
  if (!atomic_load(&run->failed)) return 0;
  *error = run->error;
  return -1;
}

static void bench_memory_free(benchRun_t *run) {
  for (int32_t r = 0; run->ranks != NULL && r < run->workload->nRanks; r++) {
    benchRank_t *rank = &run->ranks[r];
    free(rank->tokens);
    free(rank->scales);
    free(rank->topkWeights);
    free(rank->combined);
    free(rank->copy);
    free(rank->scratch);
    if (run->verify.sources != NULL) free(run->verify.sources[r].takers);
  }
  free(run->ranks);
  free(run->verify.sources);
  for (int phase = 0; phase < BENCH_PHASES; phase++) free(run->seconds[phase]);
}

static int bench_memory_allocate(benchRun_t *run, perfError_t *error) {
  size_t nRanks = (size_t)run->workload->nRanks;
  bool whole = true;
  run->ranks = calloc(nRanks, sizeof(run->ranks[0]));
  run->verify.sources = calloc(nRanks, sizeof(run->verify.sources[0]));
  for (int phase = 0; phase < BENCH_PHASES; phase++) {
    run->seconds[phase] = calloc((size_t)run->options->iters, sizeof(double));
    whole = whole && run->seconds[phase] != NULL;
  }
  if (whole && run->ranks != NULL && run->verify.sources != NULL) return 0;
  bench_memory_free(run);
  return perfErrorSet(error, "no memory for %zu ranks", nRanks);
}

int benchHostRun(const benchOptions_t *options, const workload_t *workload, bool balance,
                 benchResult_t *result, perfError_t *error) {
  benchRun_t run = {.options = options, .workload = workload, .balance = balance};
  int status = -1;
  bench_shapes_set(&run);
  bench_verify_set(&run);
  if (bench_memory_check(&run, error) != 0 || bench_memory_allocate(&run, error) != 0) return -1;
  if (verifyInit(&run.verify) != 0) {
    perfErrorSet(error, "no lock for the check");
    goto free_memory;
  }
  if (pthread_mutex_init(&run.lock, NULL) != 0) {
    perfErrorSet(error, "no lock for %d ranks", workload->nRanks);
    goto destroy_verify;
  }
  if (pthread_cond_init(&run.gateMoved, NULL) != 0) {
    perfErrorSet(error, "no condition for %d ranks", workload->nRanks);
    goto destroy_lock;
  }
  if (pthread_barrier_init(&run.barrier, NULL, (unsigned)workload->nRanks) != 0) {
    perfErrorSet(error, "no barrier for %d ranks", workload->nRanks);
    goto destroy_gate;
  }
  ultraepResult_t created = ultraepHostWorldCreate(&run.world, workload->nRanks);
  if (created != ultraepSuccess) {
    perfErrorSet(error, "ultraepHostWorldCreate: %s: %.300s", ultraepGetErrorString(created),
                 ultraepGetLastError());
    goto destroy_barrier;
  }
  status = bench_threads_run(&run, error);
  if (status == 0) status = bench_result_make(&run, result, error);

  ultraepHostWorldDestroy(run.world);
destroy_barrier:
  pthread_barrier_destroy(&run.barrier);
destroy_gate:
  pthread_cond_destroy(&run.gateMoved);
destroy_lock:
  pthread_mutex_destroy(&run.lock);
destroy_verify:
  verifyDestroy(&run.verify);
free_memory:
  bench_memory_free(&run);
  return status;
}
