/* Registered layers: masters' weights and gradients, and the layout of the slots. */
#include "config.h"
#include "error.h"
#include "group.h"

#include <stdlib.h>
#include <string.h>

groupLayer_t *group_find_layer(ultraepGroup_t group, int layer) {
  for (int i = 0; i < group->nLayers; i++)
    if (group->layers[i].layer == layer) return &group->layers[i];
  return NULL;
}

void group_drop_layers(ultraepGroup_t group, int region) {
  int kept = 0;
  for (int i = 0; i < group->nLayers; i++) {
    const groupLayer_t *layer = &group->layers[i];
    bool uses = false;
    for (int t = 0; t < layer->experts.nWeights; t++) uses |= layer->weights[t].region == region;
    for (int t = 0; t < layer->experts.nGrads; t++) uses |= layer->grads[t].region == region;
    if (!uses) group->layers[kept++] = *layer;
  }
  group->nLayers = kept;
}

static size_t experts_tensor_bytes(const ultraepExperts_t *experts, int tensor) {
  return tensor < experts->nWeights ? experts->weights[tensor].bytes
                                    : experts->grads[tensor - experts->nWeights].bytes;
}

size_t group_slot_offset(ultraepGroup_t group, int tensor, int slot) {
  const ultraepExperts_t *experts = &group->shape.experts;
  size_t offset = 0;
  for (int t = 0; t < tensor; t++) {
    size_t bytes = (size_t)group->config.nSlots * experts_tensor_bytes(experts, t);
    offset += (bytes + 255) / 256 * 256;
  }
  return tensor < experts->nWeights + experts->nGrads
             ? offset + (size_t)slot * experts_tensor_bytes(experts, tensor)
             : offset;
}

static ultraepResult_t experts_check_shape(const ultraepExperts_t *experts, const ultraepExperts_t *shape) {
  bool same = experts->nWeights == shape->nWeights && experts->nGrads == shape->nGrads;
  for (int t = 0; same && t < experts->nWeights; t++)
    same = experts->weights[t].bytes == shape->weights[t].bytes;
  for (int t = 0; same && t < experts->nGrads; t++)
    same = experts->grads[t].bytes == shape->grads[t].bytes &&
           experts->grads[t].dataType == shape->grads[t].dataType;
  return same ? ultraepSuccess
              : error_set(ultraepInvalidUsage,
                          "the tensors' numbers, bytes or types differ from those of the layers "
                          "registered before: all layers share the slots");
}

static ultraepResult_t experts_resolve(ultraepGroup_t group, int number, const ultraepExperts_t *experts,
                                       groupLayer_t *layer) {
  *layer = (groupLayer_t){.layer = number, .experts = *experts};
  for (int t = 0; t < experts->nWeights; t++) {
    uint64_t bytes = (uint64_t)group->nLocalExperts * experts->weights[t].bytes;
    if (!group_find_place(group, experts->weights[t].master, bytes, &layer->weights[t]))
      return error_set(ultraepInvalidArgument,
                       "weights[%d].master = %p: its %d experts of %zu bytes do not lie in symmetric memory",
                       t, experts->weights[t].master, group->nLocalExperts, experts->weights[t].bytes);
  }
  for (int t = 0; t < experts->nGrads; t++) {
    uint64_t bytes = (uint64_t)group->nLocalExperts * experts->grads[t].bytes;
    if (!group_find_place(group, experts->grads[t].master, bytes, &layer->grads[t]))
      layer->grads[t] = (groupPlace_t){-1, 0};
  }
  return ultraepSuccess;
}

/* Room first, so that nothing can fail once every rank has agreed. */
static ultraepResult_t experts_reserve(ultraepGroup_t group) {
  groupLayer_t *layers = realloc(group->layers, ((size_t)group->nLayers + 1) * sizeof(*layers));
  if (!layers) return error_set(ultraepSystemError, "no memory for %d layers", group->nLayers + 1);
  group->layers = layers;
  return ultraepSuccess;
}

ultraepResult_t ultraepExpertsRegister(ultraepGroup_t group, int layer, const ultraepExperts_t *experts) {
  ultraepResult_t result = group_enter(group, "experts");
  if (result != ultraepSuccess) return result;
  if (layer < 0) return error_set(ultraepInvalidArgument, "layer is %d: must be 0 or more", layer);
  result = config_check_experts(experts);
  if (result == ultraepSuccess && group->hasSlots)
    result = experts_check_shape(experts, &group->shape.experts);
  groupLayer_t made;
  if (result == ultraepSuccess) result = experts_resolve(group, layer, experts, &made);
  if (result == ultraepSuccess) result = experts_reserve(group);
  bool first = !group->hasSlots;
  if (result == ultraepSuccess) result = group->backend->expertsRegister(group, &made);
  if (result != ultraepSuccess) return result;
  if (first && group->backend->gateChanged) {
    group_set_gate(group);
    group->backend->gateChanged(group);
  }
  groupLayer_t *old = group_find_layer(group, layer);
  *(old ? old : &group->layers[group->nLayers++]) = made;
  return ultraepSuccess;
}

static ultraepResult_t experts_enter(ultraepRoute_t route, int number, const char *phase,
                                     groupLayer_t **layer) {
  ultraepResult_t result = route_enter(route, phase);
  if (result != ultraepSuccess) return result;
  if (number < 0) return error_set(ultraepInvalidArgument, "layer is %d: must be 0 or more", number);
  *layer = group_find_layer(route->group, number);
  if (!*layer)
    return error_set(ultraepInvalidUsage, "layer %d is not registered (ultraepExpertsRegister)", number);
  if (!route->planned)
    return error_set(ultraepInvalidUsage,
                     "route %d holds no plan: it was never updated, or its update failed", route->index);
  return ultraepSuccess;
}

ultraepResult_t ultraepWeightsSync(ultraepRoute_t route, int layer, cudaStream_t stream) {
  groupLayer_t *found;
  ultraepResult_t result = experts_enter(route, layer, "weights", &found);
  return result == ultraepSuccess ? route->group->backend->weightsSync(route, found, stream) : result;
}

ultraepResult_t ultraepGradsReduce(ultraepRoute_t route, int layer, cudaStream_t stream) {
  groupLayer_t *found;
  ultraepResult_t result = experts_enter(route, layer, "grads", &found);
  if (result == ultraepSuccess && found->experts.nGrads == 0)
    result = error_set(ultraepInvalidUsage, "layer %d was registered without gradients", layer);
  return result == ultraepSuccess ? route->group->backend->gradsReduce(route, found, stream) : result;
}
