/* Replicas' weights and gradients on GPUs: registration, slot memory, and parameters for the kernels. */
#include "nccl_backend.h"

#include <stdlib.h>
#include <string.h>

_Static_assert(KERNEL_MAX_TENSORS == ULTRAEP_MAX_TENSORS, "tables of tensors");

/* ---- registration ---- */

/* What ranks tell each other of a layer. Those before EXPERTS_GRADS must be equal on all of them; this one
 * tells whether, and where, the gradients are in symmetric memory. */
enum { EXPERTS_LAYER, EXPERTS_SHAPE, EXPERTS_PLACES, EXPERTS_GRADS, EXPERTS_WORDS };
enum { EXPERTS_GRADS_OWN = 0 }; /* not all of them are */

static void experts_describe(const groupLayer_t *layer, uint64_t *words) {
  const ultraepExperts_t *experts = &layer->experts;
  uint64_t shape[2 + 2 * ULTRAEP_MAX_TENSORS * 2] = {(uint64_t)experts->nWeights, (uint64_t)experts->nGrads};
  uint64_t places[2 * ULTRAEP_MAX_TENSORS], grads[2 * ULTRAEP_MAX_TENSORS];
  size_t nShape = 2, nPlaces = 0, nGrads = 0;
  bool areShared = experts->nGrads > 0;
  for (int t = 0; t < experts->nWeights; t++) {
    shape[nShape++] = experts->weights[t].bytes;
    places[nPlaces++] = (uint64_t)layer->weights[t].region;
    places[nPlaces++] = layer->weights[t].offset;
  }
  for (int t = 0; t < experts->nGrads; t++) {
    shape[nShape++] = experts->grads[t].bytes;
    shape[nShape++] = (uint64_t)experts->grads[t].dataType;
    areShared = areShared && layer->grads[t].region >= 0;
    grads[nGrads++] = (uint64_t)layer->grads[t].region;
    grads[nGrads++] = layer->grads[t].offset;
  }
  words[EXPERTS_LAYER] = (uint64_t)layer->layer;
  words[EXPERTS_SHAPE] = nccl_check_word(shape, nShape);
  words[EXPERTS_PLACES] = nccl_check_word(places, nPlaces);
  words[EXPERTS_GRADS] = areShared ? UINT64_C(1) << 32 | nccl_check_word(grads, nGrads) : EXPERTS_GRADS_OWN;
}

static ultraepResult_t experts_agree(ncclRank_t *self, groupLayer_t *layer) {
  static const char *const names[EXPERTS_GRADS] = {"the layer", "the tensors' numbers, bytes or types",
                                                   "the regions or offsets of the weights"};
  uint64_t mine[EXPERTS_WORDS], (*all)[EXPERTS_WORDS] = calloc((size_t)self->nRanks, sizeof(*all));
  if (!all) return error_set(ultraepSystemError, "no memory for registering experts");
  experts_describe(layer, mine);
  ultraepResult_t result = nccl_agree(self, mine, all, sizeof(mine), "experts");
  for (int r = 1; r < self->nRanks && result == ultraepSuccess; r++)
    for (int i = 0; i < EXPERTS_GRADS && result == ultraepSuccess; i++)
      if (all[r][i] != all[0][i])
        result = error_set(ultraepInvalidUsage, "ultraepExpertsRegister: %s differ between ranks 0 and %d",
                           names[i], r);
  layer->gradsShared = result == ultraepSuccess && all[0][EXPERTS_GRADS] != EXPERTS_GRADS_OWN;
  for (int r = 1; r < self->nRanks; r++) layer->gradsShared &= all[r][EXPERTS_GRADS] == all[0][EXPERTS_GRADS];
  free(all);
  return result;
}

static int32_t experts_tiles(const ultraepExpertTensor_t *tensors, int n) {
  int64_t tiles = 0;
  for (int t = 0; t < n; t++) tiles += kernelTiles(tensors[t].bytes);
  return (int32_t)tiles;
}

/* Of one slot: a word for each tile, used by weights and gradients in turn. */
static int32_t experts_flags(const ultraepExperts_t *experts) {
  int32_t weights = experts_tiles(experts->weights, experts->nWeights);
  int32_t grads = experts_tiles(experts->grads, experts->nGrads);
  return weights > grads ? weights : grads;
}

/* Slots, then the flags of their tiles. Gradients' slots and flags start as zeros. */
static ultraepResult_t experts_make_slots(ultraepGroup_t group, const groupLayer_t *layer) {
  ncclRank_t *self = nccl_rank(group);
  group->shape = *layer;
  size_t slotBytes = group_slot_offset(group, layer->experts.nWeights + layer->experts.nGrads, 0);
  size_t flagBytes = (size_t)group->config.nSlots * (size_t)experts_flags(&layer->experts) * sizeof(uint32_t);
  if (slotBytes > 0) {
    ultraepResult_t result = nccl_region_open(self, NULL, slotBytes + flagBytes, true, &self->slots);
    if (result != ultraepSuccess) return result;
  }
  self->slotFlagsOffset = slotBytes;
  group->slotBytes = (int64_t)slotBytes;
  group->windowBytes += (int64_t)flagBytes;
  group->hasSlots = true;
  return ultraepSuccess;
}

/* ---- the link's rate, for the gate ---- */

enum { EXPERTS_COPIES = 4 };                  /* timed, after one that is not */
#define EXPERTS_LEAST_BYTES ((size_t)1 << 20) /* of a copy: below, it is the launch that counts */
#define EXPERTS_MOST_BYTES ((size_t)64 << 20)

/* Zeros from the next rank's slots over this rank's, which still are zeros, while all other ranks do the
 * same. Sets *rate to the best copy's, bytes a second; 0: not known. */
static ultraepResult_t experts_time_copies(ncclRank_t *self, size_t bytes, double *rate) {
  const char *from = self->slots.peers[(self->rank + 1) % self->nRanks];
  cudaEvent_t events[EXPERTS_COPIES + 1] = {NULL};
  cudaError_t error = cudaSuccess;
  float best = 0;
  for (int i = 0; i <= EXPERTS_COPIES && error == cudaSuccess; i++) error = cudaEventCreate(&events[i]);
  for (int i = 0; i <= EXPERTS_COPIES && error == cudaSuccess; i++) {
    error = cudaMemcpyAsync(self->slots.base, from, bytes, cudaMemcpyDeviceToDevice, self->stream);
    if (error == cudaSuccess) error = cudaEventRecord(events[i], self->stream);
  }
  ultraepResult_t result =
      error == cudaSuccess ? nccl_stream_wait(self, "experts") : nccl_cuda_error(error, "the link's rate");
  for (int i = 0; i < EXPERTS_COPIES && result == ultraepSuccess; i++) {
    float ms = 0;
    error = cudaEventElapsedTime(&ms, events[i], events[i + 1]);
    if (error != cudaSuccess) result = nccl_cuda_error(error, "the link's rate");
    if (ms > 0 && (best == 0 || ms < best)) best = ms;
  }
  for (int i = 0; i <= EXPERTS_COPIES; i++)
    if (events[i]) (void)cudaEventDestroy(events[i]);
  *rate = best > 0 ? (double)bytes / best * 1e3 : 0;
  return result;
}

/* Where the config asks for a gate by what is registered, and does not say how fast the links are: the
 * slowest rank's rate, alike on all. */
static ultraepResult_t experts_measure_link(ultraepGroup_t group) {
  ncclRank_t *self = nccl_rank(group);
  size_t bytes =
      (size_t)group->slotBytes < EXPERTS_MOST_BYTES ? (size_t)group->slotBytes : EXPERTS_MOST_BYTES;
  double mine = 0;
  if (group->config.expertBytes != ULTRAEP_EXPERT_BYTES_REGISTERED || group->config.linkBytesPerSecond > 0 ||
      self->nRanks == 1 || bytes < EXPERTS_LEAST_BYTES)
    return ultraepSuccess;
  double *all = calloc((size_t)self->nRanks, sizeof(*all));
  ultraepResult_t own = experts_time_copies(self, bytes, &mine);
  if (own != ultraepSuccess || !all) mine = -1;
  ultraepResult_t result = all ? nccl_agree(self, &mine, all, sizeof(mine), "experts")
                               : error_set(ultraepSystemError, "no memory");
  double least = mine;
  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++) least = all[r] < least ? all[r] : least;
  free(all);
  /* A rank that could not tell leaves all with the default. */
  if (result == ultraepSuccess && least > 0) group->measured.linkBytesPerSecond = least;
  return own != ultraepSuccess ? own : result;
}

ultraepResult_t nccl_experts_register(ultraepGroup_t group, groupLayer_t *layer) {
  ultraepResult_t result = experts_agree(nccl_rank(group), layer);
  if (result != ultraepSuccess || group->hasSlots) return result;
  result = experts_make_slots(group, layer);
  return result == ultraepSuccess ? experts_measure_link(group) : result;
}

/* Updates from now on plan with the gate's new rates, alike on all ranks: registering is collective. */
void nccl_gate_changed(ultraepGroup_t group) {
  kernelPlanner_t *planner = &nccl_rank(group)->kernel.planner;
  planner->rowPs = group->planner.rowPs;
  planner->copyPs = group->planner.copyPs;
  planner->relayCopies = group->planner.relayCopies;
}

/* ---- weights, gradients ---- */

static kernelTensor_t experts_tensor(ultraepGroup_t group, const ultraepExpertTensor_t *tensor, int number,
                                     int32_t *nTiles) {
  kernelTensor_t made = {.bytes = tensor->bytes,
                         .master = tensor->master,
                         .slotOffset = group_slot_offset(group, number, 0),
                         .firstTile = *nTiles,
                         .dataType = tensor->dataType};
  *nTiles += (int32_t)kernelTiles(tensor->bytes);
  return made;
}

enum { CALL_WEIGHTS = 200, CALL_GRADS }; /* beside those of nccl_exchange.c */

static kernelExperts_t experts_kernel(ultraepRoute_t route, const groupLayer_t *layer, int call) {
  ultraepGroup_t group = route->group;
  const ncclRank_t *self = nccl_rank(group);
  const ultraepExperts_t *experts = &layer->experts;
  const uint64_t words[] = {(uint64_t)call, (uint64_t)route->index, (uint64_t)layer->layer};
  bool leavesSlots = group->config.gradsMode & ULTRAEP_GRADS_LEAVE;
  /* A slot's rank also clears it, which takes about as long as half of its additions; between GPUs the links
   * to the master's rank count, and what a rank does in its own memory does not. */
  int32_t masterTurns = self->hasOwnDevices || leavesSlots ? 1 : 2;
  kernelExperts_t made = {.nWeights = experts->nWeights,
                          .nGrads = experts->nGrads,
                          .slots = self->slots.devicePeers,
                          .ownSlots = self->slots.base,
                          .flagsOffset = self->slotFlagsOffset,
                          .nFlags = experts_flags(experts),
                          .isUnordered =
                              layer->gradsShared && (group->config.gradsMode & ULTRAEP_GRADS_UNORDERED),
                          .leavesSlots = leavesSlots,
                          .masterTurns = masterTurns,
                          .check = nccl_check_word(words, sizeof(words) / sizeof(words[0]))};
  for (int t = 0; t < experts->nWeights; t++) {
    made.weights[t] = experts_tensor(group, &experts->weights[t], t, &made.nWeightTiles);
    made.weights[t].peers = self->regions[layer->weights[t].region].devicePeers;
    made.weights[t].peersOffset = layer->weights[t].offset;
  }
  for (int t = 0; t < experts->nGrads; t++) {
    made.grads[t] = experts_tensor(group, &experts->grads[t], experts->nWeights + t, &made.nGradTiles);
    if (!layer->gradsShared) continue;
    made.grads[t].peers = self->regions[layer->grads[t].region].devicePeers;
    made.grads[t].peersOffset = layer->grads[t].offset;
  }
  return made;
}

/* kernelWeightsLaunch or kernelGradsLaunch. */
typedef int (*expertsLaunch_t)(const kernelGroup_t *group, const kernelRoute_t *route,
                               const kernelExperts_t *experts, cudaStream_t stream);

static ultraepResult_t experts_enqueue(ultraepRoute_t route, const groupLayer_t *layer, int call,
                                       expertsLaunch_t launch, const char *what, cudaStream_t stream) {
  ultraepResult_t result = nccl_route_check(route, KERNEL_LANE_EXPERTS);
  if (result != ultraepSuccess) return result;
  const ncclRoute_t *impl = route->impl;
  ncclRank_t *self = nccl_rank(route->group);
  kernelExperts_t kernel = experts_kernel(route, layer, call);
  kernelGroup_t group = self->kernel;
  nccl_kernel_set_lane(&group, KERNEL_LANE_EXPERTS);
  group.nBlocks = self->expertBlocks;
  cudaError_t error = (cudaError_t)launch(&group, &impl->kernel, &kernel, stream);
  if (error != cudaSuccess) return nccl_cuda_error(error, what);
  nccl_work_enqueued(self, KERNEL_LANE_EXPERTS, stream, nccl_is_captured(stream));
  return ultraepSuccess;
}

ultraepResult_t nccl_weights_sync(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream) {
  return experts_enqueue(route, layer, CALL_WEIGHTS, kernelWeightsLaunch, "weights", stream);
}

ultraepResult_t nccl_grads_reduce(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream) {
  return experts_enqueue(route, layer, CALL_GRADS, kernelGradsLaunch, "grads", stream);
}
