/* One rank's experts on both backends: registration, the calls, and comparisons bit for bit. */
#ifndef ULTRAEP_TESTS_GPU_EXPERT_CASE_H_
#define ULTRAEP_TESTS_GPU_EXPERT_CASE_H_

#include "gpu_case.h"

#define GPU_EXPERT_TENSORS (2 * ULTRAEP_MAX_TENSORS)
#define GPU_EXPERT_GRAPHS 2
#define GPU_EXPERT_SEGMENTS 512

typedef struct {
  gpuShape_t shape;
  int nWeights, nGrads, nLayers, nSteps;
  size_t bytes[GPU_EXPERT_TENSORS]; /* weights, then gradients */
  int32_t types[GPU_EXPERT_TENSORS];
  gpuLoads_t loads;
  bool isPortable;  /* without bulk copies, as before sm_90 */
  bool usesGraphs;  /* calls are replayed */
  bool repeats;     /* the same inputs in every step */
  bool isWhole;     /* gradients are small whole numbers, whose sums any order gives alike */
  bool sharesGrads; /* the device's gradients are symmetric memory */
} gpuExperts_t;

/* One backend's part of a rank. */
typedef struct {
  gpuSide_t side;
  unsigned char *masters; /* symmetric: [layer][tensor][local expert][bytes] */
  unsigned char *grads[ULTRAEP_MAX_TENSORS];
  bool ownsGrads;
} gpuExpertSide_t;

typedef struct {
  gpuExpertSide_t host, device;
  gpuData_t data;
  unsigned char *buffer;                     /* of the largest tensor */
  cudaGraphExec_t graphs[GPU_EXPERT_GRAPHS]; /* update and sync; reduction */
  planner_random_t random, choices;
} gpuExpertRank_t;

/* A route's segments with all arrays on the host. */
typedef struct {
  int n;
  int32_t expert[GPU_EXPERT_SEGMENTS];
  unsigned char *tensors[GPU_EXPERT_TENSORS][GPU_EXPERT_SEGMENTS]; /* in memory of the route's backend */
} gpuPlaces_t;

/* What lay in the slots after each of a number of syncs, on the device. */
typedef struct {
  int nSyncs, nSlots, nLocal;
  size_t slotBytes;
  const unsigned char *slots;
  unsigned char *stage; /* [nSyncs][slots' weights] */
  int32_t *experts;     /* [nSyncs][S] */
  int *layer;           /* [nSyncs], on the host */
} gpuKept_t;

/* Local experts of a rank. */
int gpu_experts_local(const gpuExperts_t *x, const gpuWorld_t *world);
/* The bytes of one expert's tensor, which differ by layer, tensor and expert. */
void gpu_experts_fill(unsigned char *to, size_t bytes, int layer, int tensor, int expert);
/* A layer as it is registered; its number is 3 * layer. */
ultraepExperts_t gpu_experts_of(const gpuExperts_t *x, const gpuExpertSide_t *side, int nLocal, int layer);

/* Collective: makes groups, layers, inputs and graphs. */
const char *gpu_experts_make(gpuWorld_t *world, const gpuExperts_t *x, int rank, gpuExpertRank_t *made);
const char *gpu_experts_free(gpuWorld_t *world, gpuExpertRank_t *rank);

/* Enqueues an update and a sync on the device's route. */
const char *gpu_experts_forward(const gpuExperts_t *x, const gpuExpertSide_t *side, int layer,
                                cudaStream_t stream);
/* Update, sync and reduction on both backends with new inputs, all results compared. */
const char *gpu_experts_step(gpuWorld_t *world, const gpuExperts_t *x, int number, gpuExpertRank_t *rank);
/* What of it can stand alone: every instance's gradients get values of their own, the same on both backends;
 * tensors from..to-1 are compared. */
const char *gpu_experts_fill_grads(const gpuExperts_t *x, gpuExpertRank_t *rank, cudaStream_t stream);
const char *gpu_experts_compare(const gpuExperts_t *x, gpuExpertRank_t *rank, int from, int to,
                                cudaStream_t stream);
const char *gpu_experts_compare_counters(const gpuExpertRank_t *rank);
const char *gpu_experts_places(const gpuExperts_t *x, ultraepRoute_t route, bool onDevice,
                               cudaStream_t stream, gpuPlaces_t *p);

/* Collective: a first sync, of layer 0 with the rank's data, tells where the slots are. */
const char *gpu_kept_make(gpuWorld_t *world, const gpuExperts_t *x, const gpuExpertRank_t *rank, int nSyncs,
                          gpuKept_t *made);
const char *gpu_kept_free(gpuKept_t *k);
/* What lies in the slots now, kept by a kernel in the stream's order. */
const char *gpu_keep(const gpuKept_t *k, ultraepRoute_t route, int sync, cudaStream_t stream);
/* All of it must be the weights of k->layer; adds the number of replicas to *nReplicas. */
const char *gpu_kept_check(const gpuExperts_t *x, ultraepGroup_t group, const gpuKept_t *k,
                           int64_t *nReplicas);

/* One hot expert on eight ranks: the longest chain, all ranks in it. */
gpuExperts_t gpu_experts_hot(void);

#endif
