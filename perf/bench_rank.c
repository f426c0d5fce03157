/* What each rank's thread does: phases, iterations, in step with the others. */
#include "bench_job.h"
#include "bench_run.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- going on together ---- */

int benchRankFail(benchRank_t *rank, const char *format, ...) {
  benchRun_t *run = rank->run;
  char text[480];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  pthread_mutex_lock(&run->lock);
  if (!atomic_load(&run->failed)) {
    perfErrorSet(&run->error, "rank %d: %s", rank->rank, text);
    atomic_store(&run->failed, true);
  }
  pthread_mutex_unlock(&run->lock);
  if (rank->group != NULL) ultraepGroupAbort(rank->group);
  return -1;
}

int benchRankFailCall(benchRank_t *rank, const char *what, ultraepResult_t result) {
  return benchRankFail(rank, "%.*s: %s: %.300s", (int)strcspn(what, "("), what, ultraepGetErrorString(result),
                       ultraepGetLastError());
}

bool benchRankSync(const benchRank_t *rank) {
  benchRun_t *run = rank->run;
  pthread_barrier_wait(&run->barrier);
  if (rank->local == 0) run->stopping = benchJobAny(atomic_load(&run->failed));
  pthread_barrier_wait(&run->barrier);
  return !run->stopping;
}

/* ---- calls ---- */

static int bench_route_run(benchRank_t *rank) {
  BENCH_CALL(rank, ultraepRouteUpdate(rank->route, (const int32_t *)rank->topk.own,
                                      (const float *)rank->topkWeights.own,
                                      rank->run->workload->nTokens[rank->rank], rank->stream));
  return 0;
}

static int bench_weights_run(benchRank_t *rank) {
  if (rank->masters.own == NULL) return 0;
  BENCH_CALL(rank, ultraepWeightsSync(rank->route, 0, rank->stream));
  return 0;
}

static ultraepTensors_t bench_dispatch_tensors(const benchRank_t *rank) {
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.dataType = rank->run->shape.type;
  tensors.sendbuff = rank->tokens.own;
  tensors.recvbuff = rank->rows.own;
  if (rank->run->scaleBytes == 0) return tensors;
  tensors.sendScales = rank->scales.own;
  tensors.recvScales = rank->rowScales.own;
  return tensors;
}

static int bench_dispatch_run(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  if (run->scaleBytes == 0) {
    BENCH_CALL(
        rank, ultraepAllToAll(rank->tokens.own, rank->rows.own, ULTRAEP_DISPATCH, rank->route, rank->stream));
    return 0;
  }
  ultraepTensors_t tensors = bench_dispatch_tensors(rank);
  BENCH_CALL(rank, ultraepAllToAllTensors(&tensors, ULTRAEP_DISPATCH, rank->route, rank->stream));
  return 0;
}

static int bench_combine_run(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  if (run->scaleBytes == 0) {
    BENCH_CALL(rank, ultraepAllToAll(rank->rowsOut.own, rank->combined.own, ULTRAEP_COMBINE, rank->route,
                                     rank->stream));
    return 0;
  }
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.dataType = run->combineShape.type;
  tensors.sendbuff = rank->rowsOut.own;
  tensors.recvbuff = rank->combined.own;
  BENCH_CALL(rank, ultraepAllToAllTensors(&tensors, ULTRAEP_COMBINE, rank->route, rank->stream));
  return 0;
}

static int bench_copy_run(benchRank_t *rank) {
  memcpy(rank->copy, rank->rows.own, rank->run->copyBytes);
  return 0;
}

static int bench_grads_run(benchRank_t *rank) {
  BENCH_CALL(rank, ultraepGradsReduce(rank->route, 0, rank->stream));
  return 0;
}

static int bench_step_run(benchRank_t *rank) {
  ultraepTensors_t tensors = bench_dispatch_tensors(rank);
  BENCH_CALL(rank, ultraepRouteDispatch(rank->route, (const int32_t *)rank->topk.own,
                                        (const float *)rank->topkWeights.own,
                                        rank->run->workload->nTokens[rank->rank], &tensors, rank->stream));
  return 0;
}

/* What a phase calls; null: not a phase of this run. */
static benchCall_t bench_phase_call(const benchRank_t *rank, benchPhase_t phase) {
  const benchOps_t *ops = rank->run->ops;
  bool weighs = !ops->deviceTimed || rank->masters.own != NULL;
  const benchCall_t calls[BENCH_PHASES] = {[BENCH_ROUTE] = bench_route_run,
                                           [BENCH_WEIGHTS] = weighs ? bench_weights_run : NULL,
                                           [BENCH_DISPATCH] = bench_dispatch_run,
                                           [BENCH_COMBINE] = bench_combine_run,
                                           [BENCH_GRADS] = rank->grads.own != NULL ? bench_grads_run : NULL,
                                           [BENCH_COPY] = ops->deviceTimed ? NULL : bench_copy_run,
                                           [BENCH_STEP] = ops->deviceTimed ? bench_step_run : NULL,
                                           [BENCH_BASE_DISPATCH] = ops->baselineDispatch,
                                           [BENCH_BASE_COMBINE] = ops->baselineCombine};
  return calls[phase];
}

/* ---- phases ---- */

/* The first thread keeps how long all ranks together took for one call. */
static void bench_phase_keep(benchRun_t *run, benchPhase_t phase, int32_t iteration) {
  double start = run->ranks[0].start, end = run->ranks[0].end, longest = end - start;
  for (int32_t i = 1; i < run->nLocal; i++) {
    const benchRank_t *rank = &run->ranks[i];
    if (rank->start < start) start = rank->start;
    if (rank->end > end) end = rank->end;
    if (rank->end - rank->start > longest) longest = rank->end - rank->start;
  }
  double seconds = run->ops->deviceTimed ? benchJobMax(longest) : end - start;
  if (iteration >= 0) run->seconds[phase][iteration] = seconds / run->timedCalls;
}

/* Runs one phase on all ranks at the same time. iteration is below 0 while warming up. */
static bool bench_phase_run(benchRank_t *rank, benchPhase_t phase, int32_t iteration) {
  benchRun_t *run = rank->run;
  benchCall_t call = bench_phase_call(rank, phase);
  if (call == NULL) return true;
  if (!benchRankSync(rank)) return false;
  (void)run->ops->phaseTime(rank, phase, call); /* a failure is recorded */
  if (!benchRankSync(rank)) return false;
  if (rank->local == 0) bench_phase_keep(run, phase, iteration);
  return true;
}

/* Makes phases first to last ready. Collective. */
static bool bench_phases_prepare(benchRank_t *rank, benchPhase_t first, benchPhase_t last) {
  const benchOps_t *ops = rank->run->ops;
  for (int phase = (int)first; phase <= (int)last && ops->phasePrepare != NULL; phase++) {
    benchCall_t call = bench_phase_call(rank, (benchPhase_t)phase);
    if (call != NULL && ops->phasePrepare(rank, (benchPhase_t)phase, call) != 0) break;
  }
  return benchRankSync(rank);
}

/* ---- iterations ---- */

static bool bench_dispatch_checked(benchRank_t *rank, int32_t iteration, uint32_t stamp, bool check) {
  /* Where reading fails, all ranks stop before the dispatch. */
  if (benchSegmentsRead(rank) == 0 && check) {
    rank->wrong += benchWeightsCheck(rank, stamp);
    (void)benchRowsPoison(rank);
  }
  if (!bench_phase_run(rank, BENCH_DISPATCH, iteration)) return false;
  if (!check) return true;
  int64_t wrong = benchRowsCheck(rank);
  if (!benchRankSync(rank)) return false;
  wrong += benchTakenCheck(rank);
  rank->wrong += wrong;
  /* Segments that are out of place must not be written to. */
  if (wrong == 0) (void)benchExpertsApply(rank);
  (void)benchCombinedPoison(rank);
  return true;
}

/* One iteration, checked: false where the run stops. */
static bool bench_iteration_run(benchRank_t *rank, int32_t iteration) {
  benchRun_t *run = rank->run;
  bool check = run->options->check != 0;
  int32_t first = -run->options->warmupIters;
  uint32_t stamp = (uint32_t)(iteration - first);
  if (check || iteration == first) {
    (void)benchTokensFill(rank, stamp);
    (void)benchMastersFill(rank, stamp);
  }
  if (!bench_phase_run(rank, BENCH_ROUTE, iteration)) return false;
  if (!bench_phase_run(rank, BENCH_WEIGHTS, iteration)) return false;
  if (!bench_dispatch_checked(rank, iteration, stamp, check)) return false;
  if (!bench_phase_run(rank, BENCH_COMBINE, iteration)) return false;
  if (check) rank->wrong += benchCombinedCheck(rank);
  if (check || iteration == first) (void)benchGradsFill(rank, stamp);
  if (!bench_phase_run(rank, BENCH_GRADS, iteration)) return false;
  if (check) rank->wrong += benchGradsCheck(rank, stamp);
  if (!bench_phase_run(rank, BENCH_STEP, iteration)) return false;
  return bench_phase_run(rank, BENCH_COPY, iteration);
}

static int bench_results_read(benchRank_t *rank) {
  int32_t perRank = rank->run->workload->nExperts / rank->run->workload->nRanks;
  for (int32_t i = 0; i < rank->segments.nSegments; i++) {
    rank->received += rank->segments.rows[i];
    if (i >= perRank && rank->segments.expert[i] >= 0) rank->replicas++;
  }
  BENCH_CALL(rank, ultraepGroupCounters(rank->group, &rank->counters));
  BENCH_CALL(rank, ultraepGroupProperties(rank->group, &rank->properties));
  BENCH_CALL(rank, ultraepGroupPlanner(rank->group, &rank->planner));
  if (rank->run->ops->memoryUsed != NULL) rank->gpuBytes = rank->run->ops->memoryUsed(rank);
  return 0;
}

/* The same rows once more with the baseline. The group is gone, so that a baseline that fails can be ended.
 */
static bool bench_baseline_run(benchRank_t *rank) {
  const benchOptions_t *options = rank->run->options;
  (void)rank->run->ops->baselineOpen(rank);
  /* NCCL connects ranks when they first meet, which cannot be captured in a graph. */
  if (!bench_phase_run(rank, BENCH_BASE_DISPATCH, -1)) return false;
  if (!bench_phase_run(rank, BENCH_BASE_COMBINE, -1)) return false;
  if (!bench_phases_prepare(rank, BENCH_BASE_DISPATCH, BENCH_BASE_COMBINE)) return false;
  for (int32_t i = -options->warmupIters; i < options->iters; i++) {
    if (!bench_phase_run(rank, BENCH_BASE_DISPATCH, i)) return false;
    if (!bench_phase_run(rank, BENCH_BASE_COMBINE, i)) return false;
  }
  return true;
}

static bool bench_gate_pass(benchRun_t *run) {
  pthread_mutex_lock(&run->lock);
  while (run->gate == BENCH_GATE_CLOSED) pthread_cond_wait(&run->gateMoved, &run->lock);
  bool open = run->gate == BENCH_GATE_OPEN;
  pthread_mutex_unlock(&run->lock);
  return open;
}

/* Each step begins when all ranks have ended the one before. */
void benchRankWork(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  (void)benchRankAllocate(rank);
  if (!benchRankSync(rank)) return;
  (void)benchRankOpenGroup(rank);
  if (!benchRankSync(rank)) return;
  if (!bench_phases_prepare(rank, BENCH_ROUTE, BENCH_STEP)) return;
  for (int32_t i = -run->options->warmupIters; i < run->options->iters; i++)
    if (!bench_iteration_run(rank, i)) return;
  (void)bench_results_read(rank);
}

/* No rank leaves the group while another may still need it. */
static bool bench_group_close(benchRank_t *rank) {
  benchRankSync(rank);
  ultraepGroup_t group = rank->group;
  rank->group = NULL;
  if (rank->route != NULL) ultraepRouteDestroy(rank->route);
  ultraepGroupDestroy(group);
  return benchRankSync(rank);
}

void *benchRankMain(void *argument) {
  benchRank_t *rank = argument;
  benchRun_t *run = rank->run;
  if (!bench_gate_pass(run)) return NULL;
  (void)run->ops->rankOpen(rank); /* a failure is recorded */
  if (benchRankSync(rank)) run->work(rank);
  bool on = bench_group_close(rank);
  if (on && run->options->baseline != BENCH_BASELINE_NONE) (void)bench_baseline_run(rank);
  benchRankSync(rank);
  run->release(rank);
  run->ops->rankClose(rank);
  return NULL;
}
