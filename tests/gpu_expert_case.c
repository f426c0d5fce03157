#include "gpu_expert_case.h"

#include "gpu_copy.h"
#include "nccl_backend.h"

#include <stdlib.h>
#include <string.h>

/* ---- making ---- */

int gpu_experts_local(const gpuExperts_t *x, const gpuWorld_t *world) {
  return x->shape.config.nExperts / world->nRanks;
}

static size_t tensor_offset(const gpuExperts_t *x, int nLocal, int layer, int tensor) {
  size_t layerBytes = 0, before = 0;
  for (int t = 0; t < x->nWeights; t++) {
    if (t < tensor) before += (size_t)nLocal * x->bytes[t];
    layerBytes += (size_t)nLocal * x->bytes[t];
  }
  return (size_t)layer * layerBytes + before;
}

void gpu_experts_fill(unsigned char *to, size_t bytes, int layer, int tensor, int expert) {
  planner_random_t random = {(uint64_t)layer << 40 ^ (uint64_t)tensor << 32 ^ (uint64_t)expert << 8};
  for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
    uint64_t word = planner_random_next(&random);
    memcpy(to + i, &word, sizeof(word));
  }
}

ultraepExperts_t gpu_experts_of(const gpuExperts_t *x, const gpuExpertSide_t *side, int nLocal, int layer) {
  ultraepExperts_t experts = ULTRAEP_EXPERTS_INITIALIZER;
  experts.nWeights = x->nWeights;
  experts.nGrads = x->nGrads;
  for (int t = 0; t < x->nWeights; t++)
    experts.weights[t] = (ultraepExpertTensor_t){.master = side->masters + tensor_offset(x, nLocal, layer, t),
                                                 .bytes = x->bytes[t]};
  for (int t = 0; t < x->nGrads; t++)
    experts.grads[t] = (ultraepExpertTensor_t){
        .master = side->grads[t], .bytes = x->bytes[x->nWeights + t], .dataType = x->types[x->nWeights + t]};
  return experts;
}

static const char *side_make(gpuWorld_t *world, const gpuExperts_t *x, int rank, bool onDevice,
                             gpuExpertSide_t *made) {
  int nLocal = gpu_experts_local(x, world);
  RANK_DO(gpu_side_make(world, &x->shape, rank, onDevice, &made->side));
  RANK_MEET(world); /* nobody waits for others in a kernel while memory is allocated */
  RANK_OK(
      ultraepMemAlloc(made->side.group, (void **)&made->masters, tensor_offset(x, nLocal, x->nLayers, 0)));
  RANK_MEET(world);
  for (int t = 0; t < x->nGrads; t++) {
    size_t bytes = (size_t)nLocal * x->bytes[x->nWeights + t];
    if (onDevice && x->sharesGrads)
      RANK_OK(ultraepMemAlloc(made->side.group, (void **)&made->grads[t], bytes));
    else if (onDevice)
      RANK_CUDA(cudaMalloc((void **)&made->grads[t], bytes));
    else
      RANK_CHECK(made->grads[t] = aligned_alloc(16, bytes), "no memory");
  }
  made->ownsGrads = !(onDevice && x->sharesGrads);
  RANK_MEET(world);
  for (int layer = 0; layer < x->nLayers; layer++) {
    ultraepExperts_t experts = gpu_experts_of(x, made, nLocal, layer);
    RANK_OK(ultraepExpertsRegister(made->side.group, 3 * layer, &experts));
  }
  if (onDevice && x->isPortable) nccl_rank(made->side.group)->kernel.hasBulk = 0;
  return NULL;
}

static const char *side_free(gpuExpertSide_t *side) {
  for (int t = 0; t < ULTRAEP_MAX_TENSORS && side->ownsGrads; t++) {
    if (side->side.onDevice)
      RANK_CUDA(cudaFree(side->grads[t]));
    else
      free(side->grads[t]);
  }
  return gpu_side_free(&side->side);
}

/* The call's parts, for a graph and for eager use. */
const char *gpu_experts_forward(const gpuExperts_t *x, const gpuExpertSide_t *side, int layer,
                                cudaStream_t stream) {
  (void)x;
  RANK_DO(gpu_device_update(&side->side, side->side.route, stream));
  RANK_OK(ultraepWeightsSync(side->side.route, 3 * layer, stream));
  return NULL;
}
static const char *experts_backward(const gpuExperts_t *x, const gpuExpertSide_t *side, int layer,
                                    cudaStream_t stream) {
  if (x->nGrads > 0) RANK_OK(ultraepGradsReduce(side->side.route, 3 * layer, stream));
  return NULL;
}

static const char *capture(const gpuExperts_t *x, const gpuExpertSide_t *side,
                           const char *(*record)(const gpuExperts_t *, const gpuExpertSide_t *, int,
                                                 cudaStream_t),
                           cudaStream_t stream, cudaGraphExec_t *exec) {
  cudaGraph_t graph;
  RANK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const char *flaw = record(x, side, 0, stream);
  cudaError_t error = cudaStreamEndCapture(stream, &graph);
  if (flaw) return flaw;
  RANK_CUDA(error);
  RANK_CUDA(cudaGraphInstantiate(exec, graph, 0));
  RANK_CUDA(cudaGraphDestroy(graph));
  RANK_CUDA(cudaGraphUpload(*exec, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

const char *gpu_experts_make(gpuWorld_t *world, const gpuExperts_t *x, int rank, gpuExpertRank_t *made) {
  int nLocal = gpu_experts_local(x, world);
  size_t largest = 0, all = tensor_offset(x, nLocal, x->nLayers, 0);
  cudaStream_t stream = world->streams[rank];
  *made = (gpuExpertRank_t){.random = {x->shape.seed * 100 + (uint64_t)rank}, .choices = {x->shape.seed}};
  RANK_DO(side_make(world, x, rank, false, &made->host));
  RANK_DO(side_make(world, x, rank, true, &made->device));
  RANK_DO(gpu_data_make(&x->shape, rank, made->device.side.nRows, true, &made->data));
  for (int t = 0; t < x->nWeights + x->nGrads; t++)
    if (x->bytes[t] > largest) largest = x->bytes[t];
  RANK_CHECK(made->buffer = malloc(largest + 1), "no memory");
  for (int layer = 0; layer < x->nLayers; layer++)
    for (int t = 0; t < x->nWeights; t++)
      for (int e = 0; e < nLocal; e++)
        gpu_experts_fill(made->host.masters + tensor_offset(x, nLocal, layer, t) + (size_t)e * x->bytes[t],
                         x->bytes[t], layer, t, rank * nLocal + e);
  RANK_CUDA(cudaMemcpyAsync(made->device.masters, made->host.masters, all, cudaMemcpyHostToDevice, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  if (x->usesGraphs) {
    RANK_DO(capture(x, &made->device, gpu_experts_forward, stream, &made->graphs[0]));
    if (x->nGrads > 0) RANK_DO(capture(x, &made->device, experts_backward, stream, &made->graphs[1]));
  }
  RANK_MEET(world);
  return NULL;
}

const char *gpu_experts_free(gpuWorld_t *world, gpuExpertRank_t *rank) {
  RANK_MEET(world);
  for (int i = 0; i < GPU_EXPERT_GRAPHS; i++)
    if (rank->graphs[i]) RANK_CUDA(cudaGraphExecDestroy(rank->graphs[i]));
  gpu_data_free(&rank->data);
  free(rank->buffer);
  RANK_DO(side_free(&rank->device));
  RANK_DO(side_free(&rank->host));
  RANK_MEET(world);
  return NULL;
}

/* ---- segments ---- */

const char *gpu_experts_places(const gpuExperts_t *x, ultraepRoute_t route, bool onDevice,
                               cudaStream_t stream, gpuPlaces_t *p) {
  const enum cudaMemcpyKind kind = onDevice ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
  ultraepSegments_t s;
  RANK_OK(ultraepRouteSegments(route, &s));
  RANK_CHECK(s.nSegments <= GPU_EXPERT_SEGMENTS, "too many segments for this test");
  p->n = s.nSegments;
  RANK_CUDA(cudaMemcpyAsync(p->expert, s.expert, (size_t)p->n * sizeof(*p->expert), kind, stream));
  for (int t = 0; t < x->nWeights + x->nGrads; t++) {
    void *const *from = t < x->nWeights ? s.weights[t] : s.grads[t - x->nWeights];
    RANK_CUDA(cudaMemcpyAsync(p->tensors[t], from, (size_t)p->n * sizeof(void *), kind, stream));
  }
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

const char *gpu_experts_compare(const gpuExperts_t *x, gpuExpertRank_t *rank, int from, int to,
                                cudaStream_t stream) {
  static _Thread_local gpuPlaces_t host, device;
  RANK_DO(gpu_experts_places(x, rank->host.side.route, false, stream, &host));
  RANK_DO(gpu_experts_places(x, rank->device.side.route, true, stream, &device));
  for (int i = 0; i < host.n; i++) {
    RANK_CHECK(device.expert[i] == host.expert[i], "segment %d: expert %d, host %d", i, device.expert[i],
               host.expert[i]);
    for (int t = from; t < to; t++) {
      RANK_CHECK(device.tensors[t][i], "segment %d tensor %d: a null pointer", i, t);
      if (host.expert[i] < 0) continue;
      RANK_CUDA(
          cudaMemcpyAsync(rank->buffer, device.tensors[t][i], x->bytes[t], cudaMemcpyDeviceToHost, stream));
      RANK_CUDA(cudaStreamSynchronize(stream));
      for (size_t b = 0; b < x->bytes[t]; b++)
        RANK_CHECK(rank->buffer[b] == host.tensors[t][i][b],
                   "segment %d of %d (expert %d) tensor %d byte %zu of %zu: 0x%02x, host 0x%02x", i, host.n,
                   host.expert[i], t, b, x->bytes[t], rank->buffer[b], host.tensors[t][i][b]);
    }
  }
  return NULL;
}

const char *gpu_experts_fill_grads(const gpuExperts_t *x, gpuExpertRank_t *rank, cudaStream_t stream) {
  static _Thread_local gpuPlaces_t host, device;
  RANK_DO(gpu_experts_places(x, rank->host.side.route, false, stream, &host));
  RANK_DO(gpu_experts_places(x, rank->device.side.route, true, stream, &device));
  for (int t = x->nWeights; t < x->nWeights + x->nGrads; t++)
    for (int i = 0; i < host.n; i++) {
      if (host.expert[i] < 0) continue;
      for (size_t b = 0; b < x->bytes[t]; b += 4) {
        float value = (float)planner_random_below(&rank->random, 1 << 20) / 4096.0f - 128.0f;
        uint32_t bits;
        int whole = (int)value / 16;
        if (x->isWhole) value = (float)whole;
        memcpy(&bits, &value, sizeof(bits));
        if (x->types[t] == ULTRAEP_BFLOAT16)
          bits = bits >> 16 | (x->isWhole ? bits & 0xffff0000u : bits << 9 & 0x3fff0000u); /* two */
        memcpy(host.tensors[t][i] + b, &bits, sizeof(bits));
      }
      RANK_CUDA(cudaMemcpyAsync(device.tensors[t][i], host.tensors[t][i], x->bytes[t], cudaMemcpyHostToDevice,
                                stream));
    }
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

const char *gpu_experts_compare_counters(const gpuExpertRank_t *rank) {
  ultraepCounters_t host, device;
  ultraepGroupProperties_t properties[2];
  RANK_OK(ultraepGroupCounters(rank->host.side.group, &host));
  RANK_OK(ultraepGroupCounters(rank->device.side.group, &device));
  RANK_CHECK(host.weightBytes == device.weightBytes, "%lld bytes of weights, host %lld",
             (long long)device.weightBytes, (long long)host.weightBytes);
  RANK_CHECK(host.gradBytes == device.gradBytes, "%lld bytes of gradients, host %lld",
             (long long)device.gradBytes, (long long)host.gradBytes);
  RANK_OK(ultraepGroupProperties(rank->host.side.group, &properties[0]));
  RANK_OK(ultraepGroupProperties(rank->device.side.group, &properties[1]));
  RANK_CHECK(properties[0].slotBytes == properties[1].slotBytes, "slotBytes %lld, host %lld",
             (long long)properties[1].slotBytes, (long long)properties[0].slotBytes);
  return NULL;
}

/* ---- what syncs left in the slots ---- */

const char *gpu_kept_make(gpuWorld_t *world, const gpuExperts_t *x, const gpuExpertRank_t *rank, int nSyncs,
                          gpuKept_t *made) {
  static _Thread_local gpuPlaces_t places;
  const gpuSide_t *side = &rank->device.side;
  cudaStream_t stream = world->streams[side->rank];
  *made = (gpuKept_t){.nSyncs = nSyncs,
                      .nSlots = x->shape.config.nSlots,
                      .nLocal = gpu_experts_local(x, world),
                      .slotBytes = group_slot_offset(side->group, x->nWeights, 0)};
  size_t n = (size_t)nSyncs;
  RANK_CHECK(made->layer = calloc(n, sizeof(*made->layer)), "no memory");
  RANK_CUDA(cudaMalloc((void **)&made->stage, n * made->slotBytes));
  RANK_CUDA(cudaMalloc((void **)&made->experts, n * (size_t)made->nSlots * sizeof(int32_t)));
  RANK_MEET(world);
  RANK_DO(gpu_device_inputs(side, &rank->data, stream));
  RANK_DO(gpu_experts_forward(x, &rank->device, 0, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_DO(gpu_experts_places(x, side->route, true, stream, &places));
  made->slots = places.tensors[0][made->nLocal];
  RANK_MEET(world);
  return NULL;
}

const char *gpu_kept_free(gpuKept_t *k) {
  free(k->layer);
  RANK_CUDA(cudaFree(k->stage));
  RANK_CUDA(cudaFree(k->experts));
  return NULL;
}

const char *gpu_keep(const gpuKept_t *k, ultraepRoute_t route, int sync, cudaStream_t stream) {
  ultraepSegments_t s;
  RANK_OK(ultraepRouteSegments(route, &s));
  RANK_CUDA((cudaError_t)gpu_copy(k->stage + (size_t)sync * k->slotBytes, k->slots, k->slotBytes, stream));
  RANK_CUDA((cudaError_t)gpu_copy(k->experts + sync * k->nSlots, s.expert + k->nLocal,
                                  (size_t)k->nSlots * sizeof(int32_t), stream));
  return NULL;
}

const char *gpu_kept_check(const gpuExperts_t *x, ultraepGroup_t group, const gpuKept_t *k,
                           int64_t *nReplicas) {
  static _Thread_local unsigned char want[65536];
  int nSlots = k->nSlots;
  size_t nExperts = (size_t)(k->nSyncs * nSlots);
  unsigned char *stage = malloc(k->slotBytes);
  int32_t *experts = malloc(nExperts * sizeof(*experts));
  RANK_CHECK(stage && experts, "no memory");
  RANK_CUDA(cudaMemcpy(experts, k->experts, nExperts * sizeof(*experts), cudaMemcpyDeviceToHost));
  for (int i = 0; i < k->nSyncs; i++) {
    RANK_CUDA(cudaMemcpy(stage, k->stage + (size_t)i * k->slotBytes, k->slotBytes, cudaMemcpyDeviceToHost));
    for (int s = 0; s < nSlots; s++) {
      int expert = experts[i * nSlots + s];
      *nReplicas += expert >= 0;
      for (int t = 0; t < x->nWeights && expert >= 0; t++) {
        gpu_experts_fill(want, x->bytes[t], k->layer[i], t, expert);
        RANK_CHECK(memcmp(want, stage + group_slot_offset(group, t, s), x->bytes[t]) == 0,
                   "sync %d, layer %d, slot %d: not the weights %d of expert %d", i, k->layer[i], s, t,
                   expert);
      }
    }
  }
  free(stage);
  free(experts);
  return NULL;
}

/* ---- both backends do the same ---- */

/* The slots' gradients are written anew, on the device behind the reduction in its stream, as by the next
 * product: no rank may still be reading them. */
static const char *experts_overwrite(const gpuExperts_t *x, const gpuPlaces_t *host,
                                     const gpuPlaces_t *device, int nLocal, cudaStream_t stream) {
  const int fill = 0x42; /* in both types a number unlike those of gpu_experts_fill_grads */
  for (int t = x->nWeights; t < x->nWeights + x->nGrads; t++)
    for (int i = nLocal; i < host->n; i++) {
      if (host->expert[i] < 0) continue;
      RANK_CUDA(cudaMemsetAsync(device->tensors[t][i], fill, x->bytes[t], stream));
      memset(host->tensors[t][i], fill, x->bytes[t]);
    }
  return NULL;
}

const char *gpu_experts_step(gpuWorld_t *world, const gpuExperts_t *x, int number, gpuExpertRank_t *rank) {
  static _Thread_local gpuPlaces_t host, device;
  cudaStream_t stream = world->streams[rank->device.side.rank];
  const gpuShape_t *shape = &x->shape;
  gpuData_t *data = &rank->data;
  int layer = x->usesGraphs ? 0 : planner_random_below(&rank->choices, x->nLayers);
  int kind = planner_random_below(&rank->choices, GPU_LOADS_KINDS);
  bool some = data->nTokens > 0;
  if (x->repeats) rank->random.state = shape->seed + (uint64_t)rank->device.side.rank;
  gpu_data_fill(shape, number == 0 || x->repeats ? x->loads : (gpuLoads_t)kind, data, &rank->random);
  RANK_OK(ultraepRouteUpdate(rank->host.side.route, some ? data->topk : NULL,
                             some && shape->weighted ? data->weights : NULL, (int)data->nTokens, NULL));
  RANK_OK(ultraepWeightsSync(rank->host.side.route, 3 * layer, NULL));
  RANK_DO(gpu_device_inputs(&rank->device.side, data, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_MEET(world);
  if (x->usesGraphs)
    for (int i = 0; i < 3; i++) RANK_CUDA(cudaGraphLaunch(rank->graphs[0], stream));
  else
    RANK_DO(gpu_experts_forward(x, &rank->device, layer, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  RANK_OK(ultraepGroupStatus(rank->device.side.group, NULL));
  RANK_DO(gpu_experts_compare(x, rank, 0, x->nWeights, stream));
  if (x->nGrads == 0) return NULL;
  RANK_DO(gpu_experts_fill_grads(x, rank, stream));
  bool overwrites = shape->config.gradsMode & ULTRAEP_GRADS_LEAVE && number % 2 == 1;
  if (overwrites) {
    RANK_DO(gpu_experts_places(x, rank->host.side.route, false, stream, &host));
    RANK_DO(gpu_experts_places(x, rank->device.side.route, true, stream, &device));
  }
  RANK_MEET(world);
  RANK_OK(ultraepGradsReduce(rank->host.side.route, 3 * layer, NULL));
  if (x->usesGraphs)
    RANK_CUDA(cudaGraphLaunch(rank->graphs[1], stream));
  else
    RANK_DO(experts_backward(x, &rank->device, layer, stream));
  if (overwrites) RANK_DO(experts_overwrite(x, &host, &device, gpu_experts_local(x, world), stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  return gpu_experts_compare(x, rank, x->nWeights, x->nWeights + x->nGrads, stream);
}

gpuExperts_t gpu_experts_hot(void) {
  gpuExperts_t x = {.shape = gpu_shape_small(8), .loads = GPU_LOADS_ONE_EXPERT};
  x.shape.config.nSlots = 1;
  x.nWeights = 2;
  x.nGrads = 2;
  x.nLayers = 1;
  x.bytes[0] = x.bytes[2] = 3 * 524288 + 16 * 7;
  x.bytes[1] = 16 * 129;
  x.bytes[3] = 5 * 16384;
  x.types[2] = ULTRAEP_BFLOAT16;
  x.types[3] = ULTRAEP_FLOAT32;
  for (int r = 0; r < 8; r++) x.shape.nTokens[r] = x.shape.config.maxTokens;
  return x;
}
