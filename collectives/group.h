/* What a group, its routes and its memory are for every backend. Backends hang their own part on `impl`. */
#ifndef ULTRAEP_GROUP_H_
#define ULTRAEP_GROUP_H_

#include "backend.h"
#include "config.h"
#include "ultraep.h"

#include <stdbool.h>

#define GROUP_MAGIC 0x75657067u
#define ROUTE_MAGIC 0x75657072u

/* A symmetric region: number i is the same region on every rank. base is null while the number is free. */
typedef struct {
  unsigned char *base; /* this rank's memory */
  size_t bytes;
  bool owned;            /* by the group (ultraepMemAlloc), not by the caller */
  unsigned char **peers; /* [R] where each rank's region begins, as seen from this rank */
} groupRegion_t;

/* A place in symmetric memory, the same on every rank. region is -1 for none. */
typedef struct {
  int region;
  size_t offset;
} groupPlace_t;

/* A layer's registered expert tensors. */
typedef struct groupLayer {
  int layer;
  ultraepExperts_t experts;
  groupPlace_t weights[ULTRAEP_MAX_TENSORS];
  groupPlace_t grads[ULTRAEP_MAX_TENSORS]; /* no place: in memory of this rank's own */
  bool gradsShared;                        /* by the backend: they have places, the same on every rank */
} groupLayer_t;

struct ultraepGroup {
  uint32_t magic;
  const backend_t *backend;
  void *impl;
  ultraepConfig_t config;
  ultraepPlannerConfig_t planner;
  configRates_t measured; /* by the backend, before group_set_gate */
  int rank, nRanks, nDomainRanks;
  int nLocalExperts; /* E/R */
  int nSegments;     /* E/R + S */
  int64_t maxRecvRows;
  int64_t windowBytes, privateBytes, slotBytes;
  groupRegion_t *regions; /* [nRegions], entries of regions that were freed are used again */
  int nRegions;
  struct ultraepRoute **routes; /* [config.maxRoutes], null where free */
  groupLayer_t *layers;         /* [nLayers] */
  int nLayers;
  bool hasSlots;
  groupLayer_t shape; /* of every layer, once hasSlots */
  ultraepCounters_t counters;
};

struct ultraepRoute {
  uint32_t magic;
  int index; /* in group->routes, the same on every rank */
  struct ultraepGroup *group;
  void *impl;
  bool planned; /* the last update succeeded */
  int nTokens;
  ultraepPlan_t plan; /* valid while planned */
  /* The arrays behind ultraepSegments_t, in memory of the backend's choice. */
  ultraepSegments_t segments;
};

/* One ultraepAllToAll, resolved: no defaults, symmetric buffers as places. */
struct backendExchange {
  ultraepRoute_t route;
  bool weighted; /* combine: multiply by the route's weights */
  int32_t direction, dataType;
  size_t rowBytes;
  const unsigned char *sendbuff, *sendScales; /* this rank's */
  unsigned char *recvbuff;
  groupPlace_t rows;    /* dispatch's recvbuff, combine's sendbuff */
  groupPlace_t scales;  /* recvScales */
  groupPlace_t weights; /* recvWeights */
};

/* Checks a handle and the group's standing error; phase names the call for the status. */
ultraepResult_t group_enter(ultraepGroup_t group, const char *phase);
ultraepResult_t route_enter(ultraepRoute_t route, const char *phase);
/* Checks the inputs of an update. */
ultraepResult_t route_check_tokens(ultraepRoute_t route, const int32_t *topkIdx, int nTokens);

/* Makes the parts of a group that no backend changes; config must be checked. nDomainRanks: found by the
 * backend. */
ultraepResult_t group_make(ultraepGroup_t *group, const backend_t *backend, const ultraepConfig_t *config,
                           int rank, int nRanks, int nDomainRanks);
void group_free(ultraepGroup_t group);
/* Sets the rates in group->planner from the config, what was measured and what is registered. */
void group_set_gate(ultraepGroup_t group);

/* Finds the region that holds [start, start + bytes) whole; false if none does. */
bool group_find_place(ultraepGroup_t group, const void *start, uint64_t bytes, groupPlace_t *place);
/* The place as seen from this rank, in the memory of `rank`. Null for no place. */
static inline unsigned char *group_peer(ultraepGroup_t group, groupPlace_t place, int rank) {
  return place.region < 0 ? NULL : group->regions[place.region].peers[rank] + place.offset;
}

/* The layer's registration, or null. */
groupLayer_t *group_find_layer(ultraepGroup_t group, int layer);
/* Forgets the layers with weights in a region that is being freed. */
void group_drop_layers(ultraepGroup_t group, int region);

/* First byte of slot `slot` of tensor `tensor` in the slot memory of a rank: weights first, then gradients,
 * each tensor's S slots side by side. tensor counts weights, then gradients. */
size_t group_slot_offset(ultraepGroup_t group, int tensor, int slot);

#endif
