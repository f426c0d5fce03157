/* Replicas' weights and gradients on the host. Each rank pulls the weights of its replicas, and pulls the
 * gradients of the replicas of its masters; so one thread adds to a master, in one order. */
#include "arena.h"
#include "host.h"

#include <stdlib.h>
#include <string.h>

static uint64_t experts_mix(uint64_t hash, uint64_t value) { /* FNV-1a by words */
  return (hash ^ value) * UINT64_C(0x100000001b3);
}

static uint64_t experts_hash(const groupLayer_t *layer) {
  const ultraepExperts_t *experts = &layer->experts;
  uint64_t hash = UINT64_C(0xcbf29ce484222325);
  hash = experts_mix(hash, (uint64_t)experts->nWeights << 32 | (uint64_t)experts->nGrads);
  for (int t = 0; t < experts->nWeights; t++) hash = experts_mix(hash, experts->weights[t].bytes);
  for (int t = 0; t < experts->nGrads; t++) {
    hash = experts_mix(hash, experts->grads[t].bytes);
    hash = experts_mix(hash, (uint64_t)experts->grads[t].dataType);
  }
  return hash;
}

static uint64_t experts_place_hash(const groupLayer_t *layer) {
  uint64_t hash = UINT64_C(0xcbf29ce484222325);
  for (int t = 0; t < layer->experts.nWeights; t++)
    hash = experts_mix(hash, host_place_word(layer->weights[t]));
  return hash;
}

void host_experts_free(hostRank_t *self) {
  free(self->slots);
}

/* Slots for the first layer; weights' slots stay uninitialised until a sync, gradients' slots start as zeros.
 */
static ultraepResult_t experts_make_slots(ultraepGroup_t group, const groupLayer_t *layer,
                                          unsigned char **slots) {
  group->shape = *layer;
  int nWeights = layer->experts.nWeights, nTensors = nWeights + layer->experts.nGrads;
  size_t bytes = group_slot_offset(group, nTensors, 0), gradsStart = group_slot_offset(group, nWeights, 0);
  unsigned char *made = arena_alloc(bytes);
  if (!made) return error_set(ultraepSystemError, "no memory for the slots: %zu bytes", bytes);
  memset(made + gradsStart, 0, bytes - gradsStart);
  *slots = made;
  return ultraepSuccess;
}

ultraepResult_t host_experts_register(ultraepGroup_t group, groupLayer_t *layer) {
  static const char *const names[] = {"the layer", "the tensors' numbers, bytes or types",
                                      "the regions or offsets of the weights"};
  hostRank_t *self = host_rank(group);
  ultraepResult_t own = ultraepSuccess;
  unsigned char *slots = self->slots;
  if (!group->hasSlots) own = experts_make_slots(group, layer, &slots);
  hostSignal_t signal = {
      .op = HOST_OP_EXPERTS,
      .status = own != ultraepSuccess,
      .args = {(uint64_t)layer->layer, experts_hash(layer), experts_place_hash(layer), (uintptr_t)slots}};
  ultraepResult_t result = host_signal_exchange(self, signal, "experts", 3, names);
  if (result == ultraepSuccess) result = own;
  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++)
    if (host_signal_from(self, r)->status != 0)
      result = error_set(ultraepRemoteError, "ultraepExpertsRegister: rank %d is short of memory", r);
  if (result != ultraepSuccess) {
    if (!group->hasSlots) free(slots);
    return result;
  }
  if (group->hasSlots) return ultraepSuccess;
  for (int r = 0; r < self->nRanks; r++) {
    uintptr_t peer = (uintptr_t)host_signal_from(self, r)->args[3];
    self->peerSlots[r] = (unsigned char *)peer;
  }
  self->slots = slots;
  group->slotBytes = (int64_t)group_slot_offset(group, layer->experts.nWeights + layer->experts.nGrads, 0);
  group->hasSlots = true;
  return ultraepSuccess;
}

void host_gate_changed(ultraepGroup_t group) {
  (void)group; /* updates plan with group->planner as they find it */
}

/* ---- weights ---- */

/* Copies from a peer's region, a block at a time. */
static ultraepResult_t experts_pull(hostRank_t *self, const char *phase, unsigned char *to,
                                    const unsigned char *from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += HOST_BLOCK_BYTES) {
    ultraepResult_t result = host_touch_begin(self, phase);
    if (result != ultraepSuccess) return result;
    memcpy(to + at, from + at, bytes - at < HOST_BLOCK_BYTES ? bytes - at : HOST_BLOCK_BYTES);
    host_touch_end(self);
  }
  return ultraepSuccess;
}

static ultraepResult_t weights_fill_slot(ultraepGroup_t group, const groupLayer_t *layer,
                                         const ultraepInstance_t *instance) {
  hostRank_t *self = host_rank(group);
  int master = instance->expert / group->nLocalExperts, local = instance->expert % group->nLocalExperts;
  for (int t = 0; t < layer->experts.nWeights; t++) {
    size_t bytes = layer->experts.weights[t].bytes;
    unsigned char *slot = self->slots + group_slot_offset(group, t, instance->slot);
    const unsigned char *from = group_peer(group, layer->weights[t], master) + (size_t)local * bytes;
    ultraepResult_t result = experts_pull(self, "weights", slot, from, bytes);
    if (result != ultraepSuccess) return result;
    if (master != self->rank) group->counters.weightBytes += (int64_t)bytes;
  }
  return ultraepSuccess;
}

/* Where every local instance's tensors are; an empty slot's entry is the slot. */
static void weights_fill_pointers(ultraepRoute_t route, const groupLayer_t *layer) {
  ultraepGroup_t group = route->group;
  hostRank_t *self = host_rank(group);
  hostRoute_t *host = route->impl;
  int nWeights = layer->experts.nWeights, nTensors = nWeights + layer->experts.nGrads;
  for (int t = 0; t < nTensors; t++) {
    const ultraepExpertTensor_t *tensor =
        t < nWeights ? &layer->experts.weights[t] : &layer->experts.grads[t - nWeights];
    void **pointers = host->pointers[t < nWeights ? t : ULTRAEP_MAX_TENSORS + t - nWeights];
    for (int i = 0; i < group->nSegments; i++)
      pointers[i] = i < group->nLocalExperts
                        ? (unsigned char *)tensor->master + (size_t)i * tensor->bytes
                        : self->slots + group_slot_offset(group, t, i - group->nLocalExperts);
  }
}

ultraepResult_t host_weights_sync(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream) {
  (void)stream;
  static const char *const names[] = {"the route", "the layer"};
  ultraepGroup_t group = route->group;
  hostRank_t *self = host_rank(group);
  const ultraepPlan_t *plan = &route->plan;
  hostSignal_t signal = {.op = HOST_OP_WEIGHTS, .args = {(uint64_t)route->index, (uint64_t)layer->layer}};
  ultraepResult_t result = host_signal_exchange(self, signal, "weights", 2, names);
  for (int s = 0; s < plan->nSlots && result == ultraepSuccess; s++) {
    int32_t instance = plan->slotInstance[self->rank * plan->nSlots + s];
    if (instance >= 0) result = weights_fill_slot(group, layer, &plan->instances[instance]);
  }
  if (result == ultraepSuccess) result = host_signal_done(self, "weights");
  if (result == ultraepSuccess) weights_fill_pointers(route, layer);
  return result;
}

/* ---- gradients ---- */

/* One tensor of one expert: the master's gradient and its replicas', a block at a time. */
static ultraepResult_t grads_sum(ultraepRoute_t route, const groupLayer_t *layer, int expert, int tensor) {
  ultraepGroup_t group = route->group;
  hostRank_t *self = host_rank(group);
  const ultraepPlan_t *plan = &route->plan;
  const ultraepExpertTensor_t *grads = &layer->experts.grads[tensor];
  unsigned char *master =
      (unsigned char *)grads->master + (size_t)(expert % group->nLocalExperts) * grads->bytes;
  size_t typeBytes = grads->dataType == ULTRAEP_FLOAT32 ? 4 : 2;
  for (size_t at = 0; at < grads->bytes; at += HOST_BLOCK_BYTES) {
    size_t bytes = grads->bytes - at < HOST_BLOCK_BYTES ? grads->bytes - at : HOST_BLOCK_BYTES;
    int n = 0;
    self->rows[n] = master + at;
    self->weights[n++] = 1.0f;
    for (int i = plan->replicaFirst[expert]; i < plan->replicaFirst[expert + 1]; i++) {
      const ultraepInstance_t *replica = &plan->instances[plan->replicaIndex[i]];
      size_t slot = group_slot_offset(group, layer->experts.nWeights + tensor, replica->slot);
      self->rows[n] = self->peerSlots[replica->rank] + slot + at;
      self->weights[n++] = 1.0f;
      if (replica->rank != self->rank) group->counters.gradBytes += (int64_t)bytes;
    }
    ultraepResult_t result = host_touch_begin(self, "grads");
    if (result != ultraepSuccess) return result;
    host_sum_rows(master + at, self->rows, self->weights, n, bytes / typeBytes, grads->dataType);
    host_touch_end(self);
  }
  return ultraepSuccess;
}

static void grads_clear_slots(ultraepRoute_t route, const groupLayer_t *layer) {
  ultraepGroup_t group = route->group;
  const ultraepPlan_t *plan = &route->plan;
  for (int s = 0; s < plan->nSlots; s++) {
    if (plan->slotInstance[group->rank * plan->nSlots + s] < 0) continue;
    for (int t = 0; t < layer->experts.nGrads; t++)
      memset(host_rank(group)->slots + group_slot_offset(group, layer->experts.nWeights + t, s), 0,
             layer->experts.grads[t].bytes);
  }
}

ultraepResult_t host_grads_reduce(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream) {
  (void)stream;
  static const char *const names[] = {"the route", "the layer"};
  ultraepGroup_t group = route->group;
  hostRank_t *self = host_rank(group);
  const ultraepPlan_t *plan = &route->plan;
  hostSignal_t signal = {.op = HOST_OP_GRADS, .args = {(uint64_t)route->index, (uint64_t)layer->layer}};
  ultraepResult_t result = host_signal_exchange(self, signal, "grads", 2, names);
  int firstExpert = self->rank * group->nLocalExperts;
  for (int e = firstExpert; e < firstExpert + group->nLocalExperts; e++) {
    if (plan->replicaFirst[e] == plan->replicaFirst[e + 1]) continue;
    for (int t = 0; t < layer->experts.nGrads && result == ultraepSuccess; t++)
      result = grads_sum(route, layer, e, t);
  }
  if (result == ultraepSuccess) result = host_signal_done(self, "grads");
  if (result == ultraepSuccess && !(group->config.gradsMode & ULTRAEP_GRADS_LEAVE))
    grads_clear_slots(route, layer);
  return result;
}
