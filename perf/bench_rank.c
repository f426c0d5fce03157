#include "bench_host.h"

#include <stdlib.h>
#include <string.h>

/* ---- going on together ---- */

/* Records the run's first error and makes all ranks stop. */
static int bench_rank_fail(benchRank_t *rank, const char *what, ultraepResult_t result) {
  benchRun_t *run = rank->run;
  pthread_mutex_lock(&run->lock);
  if (!atomic_load(&run->failed)) {
    perfErrorSet(&run->error, "rank %d: %.*s: %s: %.300s", rank->rank, (int)strcspn(what, "("), what,
                 ultraepGetErrorString(result), ultraepGetLastError());
    atomic_store(&run->failed, true);
  }
  pthread_mutex_unlock(&run->lock);
  if (rank->group != NULL) ultraepGroupAbort(rank->group);
  return -1;
}

/* Waits for all ranks. False where one has failed: then all ranks get false from the same call. */
static bool bench_rank_sync(const benchRank_t *rank) {
  benchRun_t *run = rank->run;
  pthread_barrier_wait(&run->barrier);
  if (rank->rank == 0) run->stopping = atomic_load(&run->failed);
  pthread_barrier_wait(&run->barrier);
  return !run->stopping;
}

#define BENCH_CALL(rank, call)                                                                               \
  do {                                                                                                       \
    ultraepResult_t callResult = (call);                                                                     \
    if (callResult != ultraepSuccess) return bench_rank_fail(rank, #call, callResult);                       \
  } while (0)

/* ---- phases ---- */

static int bench_route_run(benchRank_t *rank) {
  const workload_t *workload = rank->run->workload;
  BENCH_CALL(rank, ultraepRouteUpdate(rank->route, workload->topk[rank->rank], rank->topkWeights,
                                      workload->nTokens[rank->rank], NULL));
  return 0;
}

static int bench_weights_run(benchRank_t *rank) {
  if (rank->masters == NULL) return 0;
  BENCH_CALL(rank, ultraepWeightsSync(rank->route, 0, NULL));
  return 0;
}

static int bench_dispatch_run(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  if (run->scaleBytes == 0) {
    BENCH_CALL(rank, ultraepAllToAll(rank->tokens, rank->rows, ULTRAEP_DISPATCH, rank->route, NULL));
    return 0;
  }
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.dataType = run->shape.type;
  tensors.sendbuff = rank->tokens;
  tensors.recvbuff = rank->rows;
  tensors.sendScales = rank->scales;
  tensors.recvScales = rank->rowScales;
  BENCH_CALL(rank, ultraepAllToAllTensors(&tensors, ULTRAEP_DISPATCH, rank->route, NULL));
  return 0;
}

static int bench_combine_run(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  if (run->scaleBytes == 0) {
    BENCH_CALL(rank, ultraepAllToAll(rank->rowsOut, rank->combined, ULTRAEP_COMBINE, rank->route, NULL));
    return 0;
  }
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.dataType = run->combineShape.type;
  tensors.sendbuff = rank->rowsOut;
  tensors.recvbuff = rank->combined;
  BENCH_CALL(rank, ultraepAllToAllTensors(&tensors, ULTRAEP_COMBINE, rank->route, NULL));
  return 0;
}

static int bench_copy_run(benchRank_t *rank) {
  memcpy(rank->copy, rank->rows, rank->run->copyBytes);
  return 0;
}

/* Rank 0 keeps how long all ranks together took for one call. */
static void bench_phase_keep(benchRun_t *run, benchPhase_t phase, int32_t iteration) {
  double start = run->ranks[0].start, end = run->ranks[0].end;
  for (int32_t r = 1; r < run->workload->nRanks; r++) {
    if (run->ranks[r].start < start) start = run->ranks[r].start;
    if (run->ranks[r].end > end) end = run->ranks[r].end;
  }
  run->seconds[phase][iteration] = (end - start) / run->options->aggIters;
}

/* Runs one phase on all ranks at the same time. iteration is below 0 while warming up. */
static bool bench_phase_run(benchRank_t *rank, benchPhase_t phase, int32_t iteration) {
  static int (*const phases[BENCH_PHASES])(benchRank_t *) = {
      bench_route_run, bench_weights_run, bench_dispatch_run, bench_combine_run, bench_copy_run};
  benchRun_t *run = rank->run;
  if (!bench_rank_sync(rank)) return false;
  rank->start = perfSeconds();
  for (int32_t i = 0; i < run->options->aggIters; i++) {
    if (phases[phase](rank) != 0) break;
  }
  rank->end = perfSeconds();
  if (!bench_rank_sync(rank)) return false;
  if (rank->rank == 0 && iteration >= 0) bench_phase_keep(run, phase, iteration);
  return true;
}

/* ---- contents and checks ---- */

static void bench_tokens_fill(benchRank_t *rank, uint32_t iteration) {
  benchRun_t *run = rank->run;
  for (int32_t token = 0; token < run->workload->nTokens[rank->rank]; token++) {
    rowId_t id = {.rank = rank->rank, .token = token, .iteration = iteration};
    rowFill(&run->shape, rank->tokens + (size_t)token * run->shape.bytes, id);
    rowScalesFill(rank->scales + (size_t)token * run->scaleBytes, run->scaleBytes, id);
  }
}

static uint64_t bench_weight_word(int32_t expert, uint32_t iteration, size_t index) {
  return ((uint64_t)expert << 40 | (uint64_t)iteration << 20) + index * UINT64_C(0x9e3779b97f4a7c15);
}

static void bench_masters_fill(benchRank_t *rank, uint32_t iteration) {
  benchRun_t *run = rank->run;
  int32_t perRank = run->workload->nExperts / run->workload->nRanks;
  size_t words = (size_t)run->options->expertBytes / sizeof(uint64_t);
  uint64_t *at = (uint64_t *)rank->masters;
  for (int32_t i = 0; at != NULL && i < perRank; i++, at += words) {
    for (size_t w = 0; w < words; w++) at[w] = bench_weight_word(rank->rank * perRank + i, iteration, w);
  }
}

/* Replicas on this rank whose weights are not their master's. */
static int64_t bench_weights_check(benchRank_t *rank, uint32_t iteration) {
  benchRun_t *run = rank->run;
  size_t words = (size_t)run->options->expertBytes / sizeof(uint64_t);
  int32_t perRank = run->workload->nExperts / run->workload->nRanks;
  int64_t wrong = 0;
  for (int32_t i = perRank; rank->masters != NULL && i < rank->segments.nSegments; i++) {
    int32_t expert = rank->segments.expert[i];
    if (expert < 0) continue;
    const uint64_t *slot = rank->segments.weights[0] == NULL ? NULL : rank->segments.weights[0][i];
    size_t same = 0;
    while (slot != NULL && same < words && slot[same] == bench_weight_word(expert, iteration, same)) same++;
    if (same == words) continue;
    verifyFault(&run->verify,
                "rank %d: the replica of expert %d has not its master's weights, from word %zu on",
                rank->rank, expert, same);
    wrong++;
  }
  return wrong;
}

static void bench_rows_poison(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  int64_t total = *rank->segments.totalRows;
  if (total < 0 || total > run->maxRows) return; /* which the check will say */
  int64_t rows = total + verifyGuardRows(total, run->maxRows);
  memset(rank->rows, VERIFY_POISON, (size_t)rows * run->shape.bytes);
  if (run->scaleBytes > 0) memset(rank->rowScales, VERIFY_POISON, (size_t)rows * run->scaleBytes);
}

static int64_t bench_rows_check(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  const ultraepSegments_t *segments = &rank->segments;
  verifyReceived_t received = {.nSegments = segments->nSegments,
                               .expert = segments->expert,
                               .firstRow = segments->firstRow,
                               .rows = segments->rows,
                               .totalRows = *segments->totalRows,
                               .roomRows = run->maxRows,
                               .data = rank->rows,
                               .scales = run->scaleBytes > 0 ? rank->rowScales : NULL};
  return verifyRows(&run->verify, rank->rank, &received);
}

/* Every row of the rank through its expert. */
static void bench_experts_apply(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  for (int32_t i = 0; i < rank->segments.nSegments; i++) {
    for (int64_t r = 0; r < rank->segments.rows[i]; r++) {
      size_t row = (size_t)(rank->segments.firstRow[i] + r);
      rowExpert(&run->shape, rank->rows + row * run->shape.bytes, rank->segments.expert[i],
                &run->combineShape, rank->rowsOut + row * run->combineShape.bytes);
    }
  }
}

/* ---- iterations ---- */

static int bench_segments_read(benchRank_t *rank) {
  BENCH_CALL(rank, ultraepRouteSegments(rank->route, &rank->segments));
  return 0;
}

/* One iteration, checked: false where the run stops. */
static bool bench_iteration_run(benchRank_t *rank, int32_t iteration) {
  benchRun_t *run = rank->run;
  bool check = run->options->check != 0;
  int32_t first = -run->options->warmupIters;
  uint32_t stamp = (uint32_t)(iteration - first);
  if (check || iteration == first) {
    bench_tokens_fill(rank, stamp);
    bench_masters_fill(rank, stamp);
    verifyForget(&run->verify, rank->rank);
  }
  if (!bench_phase_run(rank, BENCH_ROUTE, iteration)) return false;
  if (!bench_phase_run(rank, BENCH_WEIGHTS, iteration)) return false;
  /* Where this fails, all ranks stop before the dispatch. */
  if (bench_segments_read(rank) == 0 && check) {
    rank->wrong += bench_weights_check(rank, stamp);
    bench_rows_poison(rank);
  }
  if (!bench_phase_run(rank, BENCH_DISPATCH, iteration)) return false;
  if (check) {
    int64_t wrong = bench_rows_check(rank);
    if (!bench_rank_sync(rank)) return false;
    wrong += verifyTaken(&run->verify, rank->rank);
    rank->wrong += wrong;
    /* Segments that are out of place must not be written to. */
    if (wrong == 0) bench_experts_apply(rank);
    memset(rank->combined, VERIFY_POISON,
           (size_t)run->workload->nTokens[rank->rank] * run->combineShape.bytes);
  }
  if (!bench_phase_run(rank, BENCH_COMBINE, iteration)) return false;
  if (check) rank->wrong += verifyCombined(&run->verify, rank->rank, rank->combined, rank->scratch);
  return bench_phase_run(rank, BENCH_COPY, iteration);
}

static int bench_results_read(benchRank_t *rank) {
  int32_t perRank = rank->run->workload->nExperts / rank->run->workload->nRanks;
  for (int32_t i = 0; i < rank->segments.nSegments; i++) {
    rank->received += rank->segments.rows[i];
    if (i >= perRank && rank->segments.expert[i] >= 0) rank->replicas++;
  }
  BENCH_CALL(rank, ultraepGroupCounters(rank->group, &rank->counters));
  return 0;
}

/* ---- set-up ---- */

static int bench_own_memory_allocate(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  const workload_t *workload = run->workload;
  size_t tokens = (size_t)workload->nTokens[rank->rank], topK = (size_t)workload->topK;
  verifySource_t *source = &run->verify.sources[rank->rank];
  rank->tokens = benchAllocate(tokens, run->shape.bytes);
  rank->scales = benchAllocate(tokens, run->scaleBytes);
  rank->topkWeights = benchAllocate(tokens, topK * sizeof(float));
  rank->combined = benchAllocate(tokens, run->combineShape.bytes);
  rank->copy = benchAllocate(1, run->copyBytes);
  rank->scratch = benchAllocate(3 * (size_t)run->shape.hidden * sizeof(float) + run->combineShape.bytes, 1);
  source->takers = benchAllocate(tokens * topK, sizeof(atomic_ushort));
  if (rank->tokens == NULL || rank->scales == NULL || rank->topkWeights == NULL || rank->combined == NULL ||
      rank->copy == NULL || rank->scratch == NULL || source->takers == NULL) {
    return bench_rank_fail(rank, "no memory for the rank's buffers", ultraepSystemError);
  }
  memset(rank->copy, 0, run->copyBytes);
  for (size_t i = 0; i < tokens * topK; i++) {
    rank->topkWeights[i] = rowWeight(rank->rank, (int32_t)(i / topK), (int32_t)(i % topK));
  }
  source->nTokens = workload->nTokens[rank->rank];
  source->topk = workload->topk[rank->rank];
  source->weights = rank->topkWeights;
  source->tokens = rank->tokens;
  source->scales = rank->scales;
  return 0;
}

static ultraepConfig_t bench_config_make(const benchRun_t *run) {
  const benchOptions_t *options = run->options;
  ultraepConfig_t config = ULTRAEP_CONFIG_INITIALIZER;
  config.nExperts = run->workload->nExperts;
  config.topK = run->workload->topK;
  config.maxTokens = run->workload->maxTokens < 1 ? 1 : run->workload->maxTokens;
  config.hidden = options->hidden;
  config.dataType = run->combineShape.type;
  config.scaleBytes = (int32_t)run->scaleBytes;
  config.nSlots = options->nSlots;
  config.balance = run->balance;
  config.domainRanks = options->nDomainRanks;
  config.alignment = options->alignment;
  config.maxRecvRows = run->maxRows;
  config.tolerance = options->tolerance;
  config.expertBytes = options->gateBytes;
  config.dispatchMode = options->dispatchMode;
  config.combineMode = options->combineMode;
  config.timeoutMs = options->timeoutMs;
  return config;
}

static int bench_group_open(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  ultraepConfig_t config = bench_config_make(run);
  size_t maxRows = (size_t)run->maxRows;
  BENCH_CALL(rank, ultraepGroupCreateHost(&rank->group, run->world, rank->rank, &config));
  BENCH_CALL(rank, ultraepRouteCreate(rank->group, &rank->route));
  BENCH_CALL(rank, ultraepMemAlloc(rank->group, (void **)&rank->rows, maxRows * run->shape.bytes));
  rank->rowsOut = rank->rows;
  if (run->scaleBytes > 0) {
    BENCH_CALL(rank,
               ultraepMemAlloc(rank->group, (void **)&rank->rowsOut, maxRows * run->combineShape.bytes));
    BENCH_CALL(rank, ultraepMemAlloc(rank->group, (void **)&rank->rowScales, maxRows * run->scaleBytes));
  }
  if (run->options->expertBytes == 0) return 0;
  size_t perRank = (size_t)(run->workload->nExperts / run->workload->nRanks);
  size_t bytes = (size_t)run->options->expertBytes;
  BENCH_CALL(rank, ultraepMemAlloc(rank->group, (void **)&rank->masters, perRank * bytes));
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = 1;
  experts.weights[0].master = rank->masters;
  experts.weights[0].bytes = bytes;
  BENCH_CALL(rank, ultraepExpertsRegister(rank->group, 0, &experts));
  return 0;
}

static bool bench_gate_pass(benchRun_t *run) {
  pthread_mutex_lock(&run->lock);
  while (run->gate == BENCH_GATE_CLOSED) pthread_cond_wait(&run->gateMoved, &run->lock);
  bool open = run->gate == BENCH_GATE_OPEN;
  pthread_mutex_unlock(&run->lock);
  return open;
}

void *benchRankMain(void *argument) {
  benchRank_t *rank = argument;
  benchRun_t *run = rank->run;
  if (!bench_gate_pass(run)) return NULL;
  bool on = bench_own_memory_allocate(rank) == 0 && bench_group_open(rank) == 0;
  on = bench_rank_sync(rank) && on;
  for (int32_t i = -run->options->warmupIters; on && i < run->options->iters; i++)
    on = bench_iteration_run(rank, i);
  if (on) bench_results_read(rank);
  /* No rank leaves while another may still need it. */
  bench_rank_sync(rank);
  if (rank->route != NULL) ultraepRouteDestroy(rank->route);
  ultraepGroupDestroy(rank->group);
  return NULL;
}
