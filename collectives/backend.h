/* The table of operations that a backend fills: what is behind the argument checks of the public calls. The
 * host backend moves bytes between threads; the NCCL backend enqueues kernels on windows.
 *
 * Every operation gets checked arguments. On an error it records the message, leaves outputs alone and says
 * by its code whether the group works on (see ultraep.h). */
#ifndef ULTRAEP_BACKEND_H_
#define ULTRAEP_BACKEND_H_

#include "ultraep.h"

typedef struct backendExchange backendExchange_t; /* group.h */
struct groupLayer;

typedef struct {
  const char *name;
  /* The group's standing error, found by this rank or told by a peer; ultraepSuccess if none. Never waits. */
  ultraepResult_t (*check)(ultraepGroup_t group, const char *phase);
  void (*status)(ultraepGroup_t group, ultraepStatus_t *status);
  /* Null: group->counters are kept up to date. */
  ultraepResult_t (*counters)(ultraepGroup_t group, ultraepCounters_t *counters);
  void (*abort)(ultraepGroup_t group);
  /* Leaves the group and frees what the backend owns. Afterwards no peer touches this rank's memory. */
  void (*destroy)(ultraepGroup_t group);

  /* Collective. Fills group->regions[region]: allocates `bytes` where ptr is null, else takes the caller's.
   */
  ultraepResult_t (*memCreate)(ultraepGroup_t group, int region, void *ptr, size_t bytes);
  /* Collective. Ends region: no peer uses it afterwards, and owned memory is freed. */
  ultraepResult_t (*memDestroy)(ultraepGroup_t group, int region);

  /* Sets route->impl and the addresses in route->segments. */
  ultraepResult_t (*routeCreate)(ultraepRoute_t route);
  void (*routeDestroy)(ultraepRoute_t route);
  ultraepResult_t (*routeUpdate)(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                 int nTokens, cudaStream_t stream);
  /* An update and the dispatch on it, whose exchange->route is the route. Null: one after the other. */
  ultraepResult_t (*routeDispatch)(const int32_t *topkIdx, const float *topkWeights, int nTokens,
                                   const backendExchange_t *exchange, cudaStream_t stream);
  /* Null: route->plan is there once the update has returned. */
  ultraepResult_t (*routePlan)(ultraepRoute_t route, ultraepPlan_t *plan);

  ultraepResult_t (*dispatch)(const backendExchange_t *exchange, cudaStream_t stream);
  ultraepResult_t (*combine)(const backendExchange_t *exchange, cudaStream_t stream);

  /* Collective. Compares the layer over the ranks; makes the slots at the first registration. */
  ultraepResult_t (*expertsRegister)(ultraepGroup_t group, struct groupLayer *layer);
  /* The first registration has changed the rates in group->planner, for routes updated from now on. Null: the
   * backend cannot follow, a gate on registered bytes stays off. */
  void (*gateChanged)(ultraepGroup_t group);
  ultraepResult_t (*weightsSync)(ultraepRoute_t route, const struct groupLayer *layer, cudaStream_t stream);
  ultraepResult_t (*gradsReduce)(ultraepRoute_t route, const struct groupLayer *layer, cudaStream_t stream);
} backend_t;

#ifdef ULTRAEP_HAVE_NCCL_BACKEND
ultraepResult_t nccl_group_create(ultraepGroup_t *group, ncclComm_t comm, const ultraepConfig_t *config);
#endif

#endif
