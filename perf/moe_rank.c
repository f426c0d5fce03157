/* What each rank's thread does: iterations of forward and backward, in step with the others. */
#include "bench_job.h"
#include "moe.h"

const char *const moePhaseNames[MOE_PHASES] = {"route",   "weights",       "dispatch", "mlp",
                                               "combine", "dispatch_back", "mlp_back", "combine_back",
                                               "grads",   "total"};

/* ---- phases ---- */

/* Ends the phase before and begins one. */
static int moe_phase_begin(moeRank_t *rank, moePhase_t phase) {
  const moeRun_t *run = moe_run(rank);
  if (run->inStep && rank->nMarks > 0) {
    if (run->ops->marksRead(rank, rank->nMarks) != 0) return -1;
    rank->stopped = !benchRankSync(rank->base);
    if (rank->stopped) return -1;
  }
  rank->markPhases[rank->nMarks] = (uint8_t)phase;
  return run->ops->mark(rank, rank->nMarks++);
}

/* Before what reads them; with --overlap they come by moe_weights_beside. */
static int moe_weights_sync(moeRank_t *rank, int32_t index) {
  if (!rank->base->run->balance || moe_overlaps(rank)) return 0;
  if (moe_phase_begin(rank, MOE_WEIGHTS) != 0) return -1;
  BENCH_CALL(rank->base, ultraepWeightsSync(rank->layers[index].route, index, rank->base->stream));
  return 0;
}

/* Beside what follows, dispatch too, until the side ends. */
static int moe_weights_beside(moeRank_t *rank, int32_t index) {
  if (moe_run(rank)->ops->sideBegin(rank) != 0) return -1;
  BENCH_CALL(rank->base, ultraepWeightsSync(rank->layers[index].route, index, rank->side));
  return 0;
}

static int moe_route_update(moeRank_t *rank, int32_t index) {
  const benchRank_t *base = rank->base;
  BENCH_CALL(rank->base, ultraepRouteUpdate(rank->layers[index].route, rank->topk, rank->topkWeights,
                                            base->run->workload->nTokens[base->rank], base->stream));
  return 0;
}

static int moe_dispatch(moeRank_t *rank, int32_t index, const uint16_t *tokens) {
  moeLayer_t *layer = &rank->layers[index];
  ultraepTensors_t tensors = ULTRAEP_TENSORS_INITIALIZER;
  tensors.sendbuff = tokens;
  tensors.recvbuff = layer->rows;
  tensors.recvWeights = layer->rowWeights;
  BENCH_CALL(rank->base,
             ultraepAllToAllTensors(&tensors, ULTRAEP_DISPATCH, layer->route, rank->base->stream));
  return 0;
}

static int moe_exchange(moeRank_t *rank, int32_t index, const void *from, void *to,
                        ultraepDirection_t direction) {
  BENCH_CALL(rank->base, ultraepAllToAll(from, to, direction, rank->layers[index].route, rank->base->stream));
  return 0;
}

/* The rows of each expert, which the products need to know. */
static int moe_segments_take(moeRank_t *rank, int32_t index) {
  if (moe_run(rank)->ops->segmentsTake(rank, index) != 0) return -1;
  int64_t rows = rank->layers[index].segments.totalRows[0];
  if (rows >= 0 && rows <= rank->ownRows) return 0;
  return benchRankFail(rank->base, "%lld rows where the plan has room for %lld", (long long)rows,
                       (long long)rank->ownRows);
}

static int moe_layer_forward(moeRank_t *rank, int32_t index, const uint16_t *in, uint16_t *out) {
  const moeOps_t *ops = moe_run(rank)->ops;
  bool beside = moe_overlaps(rank);
  if (moe_phase_begin(rank, MOE_ROUTE) != 0 || moe_route_update(rank, index) != 0) return -1;
  if (moe_weights_sync(rank, index) != 0 || ops->segmentsAsk(rank, index, rank->base->stream) != 0) return -1;
  if (moe_phase_begin(rank, MOE_DISPATCH) != 0) return -1;
  if (beside && moe_weights_beside(rank, index) != 0) return -1;
  if (moe_dispatch(rank, index, in) != 0) return -1;
  if (moe_phase_begin(rank, MOE_MLP) != 0 || moe_segments_take(rank, index) != 0) return -1;
  if (beside && ops->segmentsAsk(rank, index, rank->side) != 0) return -1; /* the replicas' */
  if (moeMlpForward(rank, index) != 0 || moe_phase_begin(rank, MOE_COMBINE) != 0) return -1;
  return moe_exchange(rank, index, rank->rowsOut, out, ULTRAEP_COMBINE);
}

static int moe_layer_backward(moeRank_t *rank, int32_t index, const uint16_t *outGrad, uint16_t *inGrad) {
  bool last = index == moe_options(rank)->nLayers - 1, beside = !last && moe_overlaps(rank);
  /* The layers after this one have had the slots since. */
  if (!last && moe_weights_sync(rank, index) != 0) return -1;
  if (moe_phase_begin(rank, MOE_DISPATCH_BACK) != 0) return -1;
  if (beside && moe_weights_beside(rank, index) != 0) return -1;
  if (moe_exchange(rank, index, outGrad, rank->rowsOut, ULTRAEP_DISPATCH) != 0) return -1;
  if (moe_phase_begin(rank, MOE_MLP_BACK) != 0) return -1;
  if (beside && moe_run(rank)->ops->segmentsAsk(rank, index, rank->side) != 0) return -1;
  if (moeMlpBackward(rank, index, beside) != 0) return -1;
  if (moe_phase_begin(rank, MOE_COMBINE_BACK) != 0 ||
      moe_exchange(rank, index, rank->layers[index].rows, inGrad, ULTRAEP_COMBINE_SUM) != 0)
    return -1;
  if (!rank->base->run->balance || moe_overlaps(rank)) return 0;
  if (moe_phase_begin(rank, MOE_GRADS) != 0) return -1;
  BENCH_CALL(rank->base, ultraepGradsReduce(rank->layers[index].route, index, rank->base->stream));
  return 0;
}

static int moe_step_run(moeRank_t *rank) {
  int32_t nLayers = moe_options(rank)->nLayers;
  const uint16_t *in = rank->x, *outGrad = rank->outGrad;
  for (int32_t l = 0; l < nLayers; l++) {
    if (moe_layer_forward(rank, l, in, rank->out[l % 2]) != 0) return -1;
    in = rank->out[l % 2];
  }
  for (int32_t l = nLayers - 1; l >= 0; l--) {
    if (moe_layer_backward(rank, l, outGrad, rank->inGrad[l % 2]) != 0) return -1;
    outGrad = rank->inGrad[l % 2];
  }
  return moe_phase_begin(rank, MOE_TOTAL);
}

/* ---- times ---- */

static void moe_times_set(moeRank_t *rank) {
  for (int phase = 0; phase < MOE_PHASES; phase++) rank->seconds[phase] = 0;
  for (int32_t i = 0; i + 1 < rank->nMarks; i++)
    rank->seconds[rank->markPhases[i]] += rank->markTimes[i + 1] - rank->markTimes[i];
  rank->seconds[MOE_TOTAL] = rank->markTimes[rank->nMarks - 1] - rank->markTimes[0];
}

/* In an exchange all ranks wait for the slowest, so the least time is that of the exchange itself. */
static bool moe_phase_waits(int phase) {
  return phase != MOE_MLP && phase != MOE_MLP_BACK && phase != MOE_TOTAL;
}

/* The first thread keeps the times of all ranks. */
static void moe_times_keep(const moeRun_t *run, int32_t iteration) {
  for (int phase = 0; phase < MOE_PHASES; phase++) {
    double sign = moe_phase_waits(phase) ? -1 : 1, most = sign * run->ranks[0].seconds[phase];
    for (int32_t i = 1; i < run->base.nLocal; i++) {
      double mine = sign * run->ranks[i].seconds[phase];
      if (mine > most) most = mine;
    }
    double seconds = sign * benchJobMax(most);
    if (iteration < 0) continue;
    run->seconds[phase][iteration] = seconds;
    for (int32_t i = 0; i < run->base.nLocal; i++)
      run->ranks[i].kept[phase][iteration] = run->ranks[i].seconds[phase];
  }
}

/* ---- iterations ---- */

static int moe_grads_clear(moeRank_t *rank) {
  const moeOptions_t *options = moe_options(rank);
  size_t perRank = (size_t)moe_experts_per_rank(rank);
  for (int32_t l = 0; l < options->nLayers; l++) {
    for (int t = 0; t < MOE_TENSORS; t++) {
      size_t bytes = perRank * (size_t)moe_tensor_count(options, t) * sizeof(float);
      if (rank->base->run->ops->fill(rank->base, rank->layers[l].grads[t], 0, bytes) != 0) return -1;
    }
  }
  return 0;
}

static int moe_iteration_run(moeRank_t *rank) {
  rank->nMarks = 0;
  /* On GPUs the ranks meet in a first route, so that the times do not tell when each thread came. */
  if (rank->base->run->ops->deviceTimed && moe_route_update(rank, 0) != 0) return -1;
  if (moe_step_run(rank) != 0 || moe_run(rank)->ops->marksRead(rank, rank->nMarks) != 0) return -1;
  BENCH_CALL(rank->base, ultraepGroupStatus(rank->base->group, NULL));
  moe_times_set(rank);
  return 0;
}

static int64_t moe_energy_read(moeRank_t *rank) {
  const moeOps_t *ops = moe_run(rank)->ops;
  return ops->energy == NULL ? -1 : ops->energy(rank);
}

/* False where the run stops. Failures are recorded. */
static bool moe_iterations_run(moeRank_t *rank) {
  moeRun_t *run = moe_run(rank);
  const benchOptions_t *options = run->base.options;
  int64_t energy = -1;
  for (int32_t i = -options->warmupIters; i < options->iters; i++) {
    bool first = i == -options->warmupIters;
    (void)moe_grads_clear(rank);
    if (i == 0) energy = moe_energy_read(rank);
    if (rank->base->local == 0) run->inStep = first && run->base.ops->deviceTimed;
    if (!benchRankSync(rank->base)) return false;
    (void)moe_iteration_run(rank);
    if (rank->stopped || !benchRankSync(rank->base)) return false;
    if (rank->base->local == 0) moe_times_keep(run, i);
  }
  rank->energy = moe_energy_read(rank);
  if (energy >= 0 && rank->energy >= 0) rank->energy -= energy;
  return true;
}

static int moe_results_read(moeRank_t *rank) {
  benchRank_t *base = rank->base;
  const ultraepSegments_t *segments = &rank->layers[0].segments;
  int32_t perRank = moe_experts_per_rank(rank);
  for (int32_t i = 0; i < segments->nSegments; i++) {
    base->received += segments->rows[i];
    rank->nExperts += segments->rows[i] > 0;
    if (i >= perRank && segments->expert[i] >= 0) base->replicas++;
  }
  BENCH_CALL(base, ultraepGroupProperties(base->group, &base->properties));
  BENCH_CALL(base, ultraepGroupPlanner(base->group, &base->planner));
  const ultraepGroupProperties_t *properties = &base->properties;
  rank->memoryBytes =
      base->run->ops->memoryUsed != NULL
          ? base->run->ops->memoryUsed(base)
          : rank->ownBytes + properties->windowBytes + properties->privateBytes + properties->slotBytes;
  return 0;
}

void moeRankWork(benchRank_t *base) {
  moeRank_t *rank = moe_rank(base);
  (void)moeRankAllocate(rank);
  if (!benchRankSync(base)) return;
  (void)moeRankOpenGroup(rank);
  if (!benchRankSync(base)) return;
  (void)moeRankFill(rank);
  if (!benchRankSync(base)) return;
  if (!moe_iterations_run(rank)) return;
  (void)moe_results_read(rank);
  if (!benchRankSync(base) || !base->run->options->check) return;
  (void)moeRankCheck(rank); /* a failure stops the run at the next meeting */
}
