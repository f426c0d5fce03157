/* A rank's memory, and its group. */
#include "bench_run.h"

#include <stdlib.h>
#include <string.h>

/* ---- the rank's own memory ---- */

/* Fills in host (where null) and own. */
static bool bench_memory_make(benchRank_t *rank, benchMemory_t *memory, size_t bytes) {
  const benchOps_t *ops = rank->run->ops;
  if (memory->host == NULL) memory->host = benchAllocate(1, bytes);
  memory->own = memory->host == NULL || !ops->mirrored ? memory->host : ops->allocate(rank, bytes);
  return memory->own != NULL;
}

/* What a source sends, in this program's memory. */
static bool bench_source_make(benchRun_t *run, int32_t number) {
  const workload_t *workload = run->workload;
  verifySource_t *source = &run->verify.sources[number];
  size_t tokens = (size_t)workload->nTokens[number], topK = (size_t)workload->topK;
  uint8_t *rows = benchAllocate(tokens, run->shape.bytes), *scales = benchAllocate(tokens, run->scaleBytes);
  float *weights = benchAllocate(tokens, topK * sizeof(float));
  atomic_ushort *takers = benchAllocate(tokens * topK, sizeof(atomic_ushort));
  *source = (verifySource_t){.nTokens = workload->nTokens[number],
                             .topk = workload->topk[number],
                             .weights = weights,
                             .tokens = rows,
                             .scales = scales,
                             .takers = takers};
  if (rows == NULL || scales == NULL || weights == NULL || takers == NULL) return false;
  for (size_t i = 0; i < tokens * topK; i++)
    weights[i] = rowWeight(number, (int32_t)(i / topK), (int32_t)(i % topK));
  return true;
}

static void bench_source_free(verifySource_t *source) {
  free((void *)source->tokens);
  free((void *)source->scales);
  free((void *)source->weights);
  free(source->takers);
}

static bool bench_check_memory_make(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  int32_t perRank = run->workload->nExperts / run->workload->nRanks;
  size_t segments = (size_t)perRank + (size_t)run->options->nSlots;
  rank->scratch = benchAllocate(3 * (size_t)run->shape.hidden * sizeof(float) + run->combineShape.bytes, 1);
  if (rank->scratch == NULL) return false;
  if (!run->ops->mirrored) return true;
  /* totalRows, firstRow, rows, weights, gradients, expert */
  rank->segmentMemory = calloc((2 + 5 * segments) * sizeof(int64_t), sizeof(*rank->segmentMemory));
  rank->slot = benchAllocate(1, (size_t)run->options->expertBytes);
  return rank->segmentMemory != NULL && rank->slot != NULL;
}

int benchRankAllocate(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  size_t tokens = (size_t)run->workload->nTokens[rank->rank], topK = (size_t)run->workload->topK;
  bool whole = true;
  for (int32_t s = rank->firstSource; s < rank->lastSource; s++) whole = whole && bench_source_make(run, s);
  const verifySource_t *source = &run->verify.sources[rank->rank];
  rank->tokens.host = (uint8_t *)source->tokens;
  rank->scales.host = (uint8_t *)source->scales;
  rank->topk.host = (uint8_t *)source->topk;
  rank->topkWeights.host = (uint8_t *)source->weights;
  whole = whole && bench_memory_make(rank, &rank->tokens, tokens * run->shape.bytes) &&
          bench_memory_make(rank, &rank->scales, tokens * run->scaleBytes) &&
          bench_memory_make(rank, &rank->topk, tokens * topK * sizeof(int32_t)) &&
          bench_memory_make(rank, &rank->topkWeights, tokens * topK * sizeof(float)) &&
          bench_memory_make(rank, &rank->combined, tokens * run->combineShape.bytes) &&
          bench_check_memory_make(rank);
  if (whole && !run->ops->deviceTimed) {
    rank->copy = benchAllocate(1, run->copyBytes);
    whole = rank->copy != NULL;
    if (whole) memset(rank->copy, 0, run->copyBytes);
  }
  if (!whole) return benchRankFail(rank, "no memory for the rank's buffers");
  if (benchPush(rank, &rank->topk, tokens * topK * sizeof(int32_t)) != 0) return -1;
  return benchPush(rank, &rank->topkWeights, tokens * topK * sizeof(float));
}

/* ---- the group ---- */

ultraepConfig_t benchConfigMake(const benchRun_t *run) {
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
  config.replicaRows = options->replicaRows;
  config.expertBytes = options->gateBytes;
  config.dispatchMode = options->dispatchMode;
  config.combineMode = options->combineMode;
  config.maxCtas = options->maxCtas;
  config.timeoutMs = options->timeoutMs;
  return config;
}

/* Symmetric memory, and where it will be looked at its counterpart. */
static int bench_symmetric_make(benchRank_t *rank, benchMemory_t *memory, size_t bytes, bool looked) {
  BENCH_CALL(rank, ultraepMemAlloc(rank->group, (void **)&memory->own, bytes));
  memory->host = memory->own;
  if (!rank->run->ops->mirrored) return 0;
  memory->host = looked ? benchAllocate(1, bytes) : NULL;
  return looked && memory->host == NULL ? benchRankFail(rank, "no memory for checking %zu bytes", bytes) : 0;
}

static int bench_experts_register(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  size_t perRank = (size_t)(run->workload->nExperts / run->workload->nRanks);
  size_t bytes = (size_t)run->options->expertBytes;
  if (bench_symmetric_make(rank, &rank->masters, perRank * bytes, true) != 0) return -1;
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = 1;
  experts.weights[0].master = rank->masters.own;
  experts.weights[0].bytes = bytes;
  if (run->options->grads != BENCH_GRADS_NONE) {
    if (bench_symmetric_make(rank, &rank->grads, perRank * bytes, true) != 0) return -1;
    experts.nGrads = 1;
    experts.grads[0].master = rank->grads.own;
    experts.grads[0].bytes = bytes;
    experts.grads[0].dataType =
        run->options->grads == BENCH_GRADS_BFLOAT16 ? ULTRAEP_BFLOAT16 : ULTRAEP_FLOAT32;
  }
  BENCH_CALL(rank, ultraepExpertsRegister(rank->group, 0, &experts));
  return 0;
}

int benchRankOpenGroup(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  ultraepConfig_t config = benchConfigMake(run);
  size_t maxRows = (size_t)run->maxRows;
  bool check = run->options->check != 0;
  ultraepResult_t created = run->ops->groupCreate(rank, &config);
  if (created != ultraepSuccess) return benchRankFailCall(rank, "making the group", created);
  BENCH_CALL(rank, ultraepRouteCreate(rank->group, &rank->route));
  if (bench_symmetric_make(rank, &rank->rows, maxRows * run->shape.bytes, check) != 0) return -1;
  /* On GPUs also the stream's first kernel with this memory mapped, while no peer's kernel waits yet. */
  if (run->ops->mirrored && run->ops->fill(rank, rank->rows.own, 0, maxRows * run->shape.bytes) != 0)
    return -1;
  rank->rowsOut = rank->rows;
  if (run->scaleBytes > 0) {
    rank->rowsOut = (benchMemory_t){NULL, NULL};
    if (bench_symmetric_make(rank, &rank->rowsOut, maxRows * run->combineShape.bytes, check) != 0) return -1;
    if (bench_symmetric_make(rank, &rank->rowScales, maxRows * run->scaleBytes, check) != 0) return -1;
  }
  return run->options->expertBytes == 0 ? 0 : bench_experts_register(rank);
}

/* ---- the end ---- */

void benchRankRelease(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  benchMemory_t *owned[] = {&rank->tokens, &rank->scales, &rank->topk, &rank->topkWeights, &rank->combined};
  for (size_t i = 0; run->ops->mirrored && i < sizeof(owned) / sizeof(owned[0]); i++)
    run->ops->release(rank, owned[i]->own);
  free(rank->combined.host);
  free(rank->copy);
  free(rank->scratch);
  free(rank->segmentMemory);
  free(rank->slot);
  /* Symmetric memory went with the group. */
  if (run->ops->mirrored) {
    if (rank->rowsOut.host != rank->rows.host) free(rank->rowsOut.host);
    free(rank->rows.host);
    free(rank->rowScales.host);
    free(rank->masters.host);
    free(rank->grads.host);
  }
  for (int32_t s = rank->firstSource; s < rank->lastSource; s++) bench_source_free(&run->verify.sources[s]);
}
