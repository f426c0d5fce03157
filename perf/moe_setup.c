/* A rank's memory, its group, and what its tensors hold. */
#include "moe.h"
#include "moe_values.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- contents ---- */

const float moeTokenScale = 1.7320508f; /* of variance 1 */

uint64_t moeWeightSeed(int32_t layer, int32_t expert, int tensor) {
  return ((uint64_t)layer * ULTRAEP_MAX_EXPERTS + (uint64_t)expert) * MOE_TENSORS + (uint64_t)tensor;
}

/* Products keep the variance of what goes in. */
float moeWeightScale(const moeOptions_t *options, int tensor) {
  return sqrtf(3.0f / (float)(tensor == 0 ? options->bench.hidden : options->inter));
}

uint64_t moeTokenSeed(int32_t rank, moeToken_t what) {
  return (UINT64_C(1) << 40) + (uint64_t)rank * MOE_TOKENS + what;
}

/* ---- own memory ---- */

static size_t moe_own_size(int64_t count, size_t size) {
  return count < 1 ? size : (size_t)count * size;
}

/* Memory where the rank lives, freed by moeRankRelease; null where there is none. */
static void *moe_own(moeRank_t *rank, int64_t count, size_t size) {
  const benchOps_t *ops = rank->base->run->ops;
  size_t bytes = moe_own_size(count, size);
  void *made = ops->mirrored ? ops->allocate(rank->base, bytes) : benchAllocate(1, bytes);
  if (made == NULL) return NULL;
  rank->owned[rank->nOwned++] = made;
  rank->ownBytes += (int64_t)bytes;
  return made;
}

/* Rows of the rank that are known beforehand; with the cost gate they are not. */
static int64_t moe_own_rows(const moeRank_t *rank) {
  const benchRun_t *run = rank->base->run;
  int32_t nRanks = run->workload->nRanks;
  int32_t segments = moe_experts_per_rank(rank) + run->options->nSlots;
  int64_t rows = (int64_t)segments * (run->options->alignment - 1);
  if (run->pairRows == NULL) return run->maxRows;
  for (int32_t source = 0; source < nRanks; source++)
    rows += run->pairRows[source * nRanks + rank->base->rank];
  return rows < 1 ? 1 : rows;
}

static bool moe_layers_allocate(moeRank_t *rank) {
  const moeOptions_t *options = moe_options(rank);
  int64_t inter = options->inter;
  bool whole = true;
  for (int32_t l = 0; whole && l < options->nLayers; l++) {
    moeLayer_t *layer = &rank->layers[l];
    layer->gateUp = moe_own(rank, rank->ownRows * 2 * inter, sizeof(uint16_t));
    layer->act = moe_own(rank, rank->ownRows * inter, sizeof(uint16_t));
    whole = layer->gateUp != NULL && layer->act != NULL;
  }
  return whole;
}

static bool moe_tokens_allocate(moeRank_t *rank) {
  const benchRun_t *run = rank->base->run;
  int64_t values = moe_token_values(rank);
  int64_t entries = (int64_t)run->workload->nTokens[rank->base->rank] * run->workload->topK;
  uint16_t **tokens[] = {&rank->x,      &rank->outGrad,   &rank->out[0],
                         &rank->out[1], &rank->inGrad[0], &rank->inGrad[1]};
  for (size_t i = 0; i < sizeof(tokens) / sizeof(tokens[0]); i++) {
    *tokens[i] = moe_own(rank, values, sizeof(uint16_t));
    if (*tokens[i] == NULL) return false;
  }
  rank->topk = moe_own(rank, entries, sizeof(int32_t));
  rank->topkWeights = moe_own(rank, entries, sizeof(float));
  return rank->topk != NULL && rank->topkWeights != NULL;
}

/* What only this program looks at. */
static bool moe_records_allocate(moeRank_t *rank) {
  const moeOptions_t *options = moe_options(rank);
  const benchRun_t *run = rank->base->run;
  size_t nLayers = (size_t)options->nLayers;
  size_t entries = (size_t)run->workload->nTokens[rank->base->rank] * (size_t)run->workload->topK;
  size_t segments = (size_t)moe_experts_per_rank(rank) + (size_t)run->options->nSlots;
  rank->layers = calloc(nLayers, sizeof(rank->layers[0]));
  rank->gemms = calloc(segments, sizeof(rank->gemms[0]));
  rank->owned = calloc(4 * nLayers + 16, sizeof(rank->owned[0]));
  rank->markPhases = calloc(moe_max_marks(options), sizeof(rank->markPhases[0]));
  rank->markTimes = calloc(moe_max_marks(options), sizeof(rank->markTimes[0]));
  rank->hostTopkWeights = benchAllocate(entries, sizeof(float));
  return rank->layers != NULL && rank->gemms != NULL && rank->owned != NULL && rank->markPhases != NULL &&
         rank->markTimes != NULL && rank->hostTopkWeights != NULL;
}

int moeRankAllocate(moeRank_t *rank) {
  const moeRun_t *run = moe_run(rank);
  rank->ownRows = moe_own_rows(rank);
  bool whole = moe_records_allocate(rank) && moe_layers_allocate(rank) && moe_tokens_allocate(rank);
  if (whole) rank->actGrad = moe_own(rank, rank->ownRows * run->options->inter, sizeof(uint16_t));
  if (!whole || rank->actGrad == NULL) return benchRankFail(rank->base, "no memory for the rank's buffers");
  return run->ops->open(rank);
}

void moeRankRelease(benchRank_t *base) {
  moeRank_t *rank = moe_rank(base);
  const benchOps_t *ops = base->run->ops;
  moe_run(rank)->ops->close(rank);
  for (int32_t i = 0; i < rank->nOwned; i++) {
    if (ops->mirrored) {
      ops->release(base, rank->owned[i]);
    } else {
      free(rank->owned[i]);
    }
  }
  free(rank->layers);
  free(rank->gemms);
  free(rank->owned);
  free(rank->markPhases);
  free(rank->markTimes);
  free(rank->hostTopkWeights);
}

/* ---- the group ---- */

/* Hands out parts of the symmetric region, or with region null counts their bytes. */
typedef struct {
  uint8_t *region;
  size_t used;
} moeSymmetric_t;

static void *moe_symmetric_part(moeSymmetric_t *from, int64_t count, size_t size) {
  void *part = from->region == NULL ? NULL : from->region + from->used;
  from->used += (moe_own_size(count, size) + 255) / 256 * 256;
  return part;
}

static void moe_symmetric_lay(moeRank_t *rank, moeSymmetric_t *from) {
  const moeOptions_t *options = moe_options(rank);
  int64_t maxRows = rank->base->run->maxRows, rowValues = maxRows * options->bench.hidden;
  int64_t perRank = moe_experts_per_rank(rank);
  rank->rowsOut = moe_symmetric_part(from, rowValues, sizeof(uint16_t));
  for (int32_t l = 0; l < options->nLayers; l++) {
    moeLayer_t *layer = &rank->layers[l];
    layer->rows = moe_symmetric_part(from, rowValues, sizeof(uint16_t));
    layer->rowWeights = moe_symmetric_part(from, maxRows, sizeof(float));
    for (int t = 0; t < MOE_TENSORS; t++)
      layer->weights[t] = moe_symmetric_part(from, perRank * moe_tensor_count(options, t), sizeof(uint16_t));
    for (int t = 0; t < MOE_TENSORS; t++)
      layer->grads[t] = moe_symmetric_part(from, perRank * moe_tensor_count(options, t), sizeof(float));
  }
}

/* Memory that the group says it has. */
static int moe_group_bytes(moeRank_t *rank, int64_t *bytes) {
  ultraepGroupProperties_t properties;
  BENCH_CALL(rank->base, ultraepGroupProperties(rank->base->group, &properties));
  *bytes = properties.windowBytes + properties.privateBytes + properties.slotBytes;
  return 0;
}

static int moe_experts_register(moeRank_t *rank, int32_t index) {
  const moeLayer_t *layer = &rank->layers[index];
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  int64_t before = 0, after = 0;
  experts.nWeights = experts.nGrads = MOE_TENSORS;
  for (int t = 0; t < MOE_TENSORS; t++) {
    size_t count = (size_t)moe_tensor_count(moe_options(rank), t);
    experts.weights[t] =
        (ultraepExpertTensor_t){.master = layer->weights[t], .bytes = count * sizeof(uint16_t)};
    experts.grads[t] = (ultraepExpertTensor_t){
        .master = layer->grads[t], .bytes = count * sizeof(float), .dataType = ULTRAEP_FLOAT32};
  }
  if (moe_group_bytes(rank, &before) != 0) return -1;
  BENCH_CALL(rank->base, ultraepExpertsRegister(rank->base->group, index, &experts));
  if (moe_group_bytes(rank, &after) != 0) return -1;
  rank->replicaBytes += after - before;
  return 0;
}

int moeRankOpenGroup(moeRank_t *rank) {
  benchRun_t *run = rank->base->run;
  const moeOptions_t *options = moe_options(rank);
  ultraepConfig_t config = benchConfigMake(run);
  moeSymmetric_t symmetric = {0};
  config.maxRoutes = options->nLayers;
  config.expertBytes = options->gate ? ULTRAEP_EXPERT_BYTES_REGISTERED : 0;
  config.linkBytesPerSecond = options->linkBytesPerSecond;
  config.rowSeconds = options->rowSeconds;
  config.expertSeconds = options->expertSeconds;
  config.gradsMode = options->gradsMode | (options->slotGrads == MOE_SLOTS_LEAVE ? ULTRAEP_GRADS_LEAVE : 0);
  config.expertCtas = options->expertCtas;
  ultraepResult_t created = run->ops->groupCreate(rank->base, &config);
  if (created != ultraepSuccess) return benchRankFailCall(rank->base, "making the group", created);
  moe_symmetric_lay(rank, &symmetric);
  BENCH_CALL(rank->base, ultraepMemAlloc(rank->base->group, (void **)&symmetric.region, symmetric.used));
  rank->ownBytes += (int64_t)symmetric.used;
  symmetric.used = 0;
  moe_symmetric_lay(rank, &symmetric);
  /* What padding holds is computed with, though never used. */
  if (run->ops->fill(rank->base, symmetric.region, 0, symmetric.used) != 0) return -1;
  for (int32_t l = 0; l < options->nLayers; l++) {
    BENCH_CALL(rank->base, ultraepRouteCreate(rank->base->group, &rank->layers[l].route));
    if (run->balance && moe_experts_register(rank, l) != 0) return -1;
  }
  return 0;
}

/* ---- filling ---- */

static int moe_layer_fill(moeRank_t *rank, int32_t index) {
  const moeOptions_t *options = moe_options(rank);
  const benchOps_t *ops = rank->base->run->ops;
  moeLayer_t *layer = &rank->layers[index];
  int32_t perRank = moe_experts_per_rank(rank);
  for (int t = 0; t < MOE_TENSORS; t++) {
    int64_t count = moe_tensor_count(options, t);
    for (int32_t e = 0; e < perRank; e++) {
      uint64_t seed = moeWeightSeed(index, rank->base->rank * perRank + e, t);
      if (moe_run(rank)->ops->valuesFill(rank, layer->weights[t] + e * count, count, seed,
                                         moeWeightScale(options, t)) != 0)
        return -1;
    }
  }
  size_t inter = (size_t)options->inter * sizeof(uint16_t), rows = (size_t)rank->ownRows;
  if (ops->fill(rank->base, layer->gateUp, 0, rows * 2 * inter) != 0) return -1;
  return ops->fill(rank->base, layer->act, 0, rows * inter);
}

static int moe_routing_fill(moeRank_t *rank) {
  benchRank_t *base = rank->base;
  const workload_t *workload = base->run->workload;
  size_t entries = (size_t)workload->nTokens[base->rank] * (size_t)workload->topK;
  /* Above zero, and about 1 in sum over a token. */
  for (size_t i = 0; i < entries; i++)
    rank->hostTopkWeights[i] =
        (1 + moeValue(moeTokenSeed(base->rank, MOE_TOKEN_WEIGHT), i) / 2) / (float)workload->topK;
  if (base->run->ops->copy(base, rank->topkWeights, rank->hostTopkWeights, entries * sizeof(float)) != 0)
    return -1;
  return base->run->ops->copy(base, rank->topk, workload->topk[base->rank], entries * sizeof(int32_t));
}

int moeRankFill(moeRank_t *rank) {
  const moeRun_t *run = moe_run(rank);
  int64_t values = moe_token_values(rank);
  int32_t number = rank->base->rank;
  size_t actBytes = (size_t)rank->ownRows * (size_t)run->options->inter * sizeof(uint16_t);
  for (int32_t l = 0; l < run->options->nLayers; l++) {
    if (moe_layer_fill(rank, l) != 0) return -1;
  }
  if (run->base.ops->fill(rank->base, rank->actGrad, 0, actBytes) != 0 || moe_routing_fill(rank) != 0)
    return -1;
  if (run->ops->valuesFill(rank, rank->x, values, moeTokenSeed(number, MOE_TOKEN_X), moeTokenScale) != 0)
    return -1;
  return run->ops->valuesFill(rank, rank->outGrad, values, moeTokenSeed(number, MOE_TOKEN_GRAD),
                              moeTokenScale);
}
