/* The NCCL backend: ranks are GPUs of one domain, windows are symmetric memory that kernels read and write.
 *
 *   nccl_backend.c   the table of operations, each on the communicator's device
 *   nccl_symbols.c   NCCL's functions, found at run time
 *   nccl_call.c      those that wait for other ranks, bounded
 *   nccl_agree.c     what every rank tells all others
 *   nccl_group.c     create, status, abort, destroy
 *   nccl_memory.c    symmetric regions, over one of two ways to the peers:
 *   nccl_window.c      NCCL's windows
 *   nccl_ipc.c         CUDA IPC: mappings of our own
 *   nccl_exchange.c  routes, dispatch, combine: parameters for the kernels
 *   nccl_experts.c   replicas' weights and gradients
 *
 * Several ranks may be threads of one process on one GPU. Then a call that waits for the whole device can
 * wait for a peer's kernel that waits for this rank; so nothing here synchronises the device, memory is
 * stream-ordered or (symmetric regions) cuMem's, and pinned memory and kernels are had before the first
 * meeting of the ranks.
 *
 * The kernels do all waiting on peers. They tell a failure through host memory mapped to the device
 * (kernelFailure_t), so that no call here waits to learn of it. */
#ifndef ULTRAEP_NCCL_BACKEND_H_
#define ULTRAEP_NCCL_BACKEND_H_

#include "error.h"
#include "group.h"
#include "kernels.h"
#include "nccl_symbols.h"
#include "peer_memory.h"
#include "peer_socket.h"

#include <cuda_runtime_api.h>

/* Symmetric memory of one region. */
typedef struct {
  void *base;
  size_t bytes;
  char **peers;            /* [R] on the host */
  char **devicePeers;      /* [R] on the device */
  ncclWindow_t window;     /* with windows */
  peerMapping_t *mappings; /* [R] with IPC; this rank's own is none */
  bool isLent;             /* with IPC: base must outlive the peers' mappings */
} ncclRegion_t;

struct ncclRank;

/* A way to the peers' memory. */
typedef struct {
  size_t alignment; /* of callers' memory */
  /* Whether callers' memory must lie at the same offset of its allocation on every rank. */
  bool needsOffsets;
  /* Whether an owner may free memory only after all have closed the region. */
  bool meetsToFree;
  /* Memory that it can open. */
  ultraepResult_t (*alloc)(struct ncclRank *self, size_t bytes, void **ptr);
  void (*release)(struct ncclRank *self, void *ptr);
  /* Collective, of region->base and bytes: fills region->peers. A rank that fails still meets the others, or
   * they give up after the timeout. Afterwards the caller has all ranks agree on the outcome. */
  ultraepResult_t (*open)(struct ncclRank *self, ncclRegion_t *region);
  /* Undoes open, whole or half done, once or twice. */
  void (*close)(struct ncclRank *self, ncclRegion_t *region);
} ncclPeers_t;
extern const ncclPeers_t ncclPeersWindow, ncclPeersIpc;

/* The NCCL part of a group. */
typedef struct ncclRank {
  const ncclSymbols_t *nccl;
  const ncclPeers_t *peers; /* as agreed; null before */
  peerSocket_t socket;      /* IPC: from the first region on */
  uint64_t nOpened;         /* IPC: regions opened so far, which tells messages apart */
  int nLent;                /* IPC: regions that are lent */
  bool isAbandoned;         /* peers may still be using this rank's memory: it is not freed */

  ncclComm_t comm;
  int rank, nRanks, device, timeoutMs;
  bool hasOwnDevices;  /* every rank has a GPU of its own */
  cudaStream_t stream; /* for what is not on a caller's stream: agreement, aborts */
  ncclRegion_t window;
  ncclRegion_t slots; /* of replicas, from the first registration on: slots, then flags of their tiles */
  size_t slotFlagsOffset;
  size_t windowBytes, failMarkOffset, metaOffset, partialsOffset;
  kernelGroup_t kernel;
  int32_t expertBlocks;           /* nBlocks of the kernels of weights and gradients */
  bool isStuck;                   /* a meeting has failed; it may be pending still in NCCL or on `stream` */
  cudaEvent_t work[KERNEL_LANES]; /* after each lane's last call that was enqueued outside a capture */
  void *pinned;                   /* mapped: the failure, then the status of each route */
  kernelFailure_t *failure, *deviceFailure;       /* and as mapped */
  kernelRouteStatus_t *statuses, *deviceStatuses; /* [maxRoutes][KERNEL_LANES], and as mapped */
  char *agreeBuffer;                              /* device: (R + 1) messages, each with its stamp */
  uint64_t nAgreements;                           /* so far, which tells messages apart */
  void *deviceBlock;                              /* state, chunk counts */
  ncclRegion_t *regions;                          /* [nRegions] */
  int nRegions;
} ncclRank_t;

/* The NCCL part of a route. */
typedef struct {
  kernelRoute_t kernel;
  void *deviceBlock;
  kernelRouteStatus_t *status;    /* [KERNEL_LANES] in the group's pinned memory */
  int32_t nUpdates;               /* enqueued; a status of an older update says nothing of this one */
  ultraepPlannerConfig_t planner; /* of the last update: registering experts may change the group's */
  bool isCaptured;                /* an update was captured into a graph */
  int32_t *hostLoads;             /* for ultraepRoutePlan */
  void *planWorkspace;
  size_t planBytes;
} ncclRoute_t;

static inline ncclRank_t *nccl_rank(ultraepGroup_t group) {
  return group->impl;
}

extern const backend_t ncclBackend;

/* Makes the device the thread's current one where it is not; leave, with what enter returned, undoes that. */
int nccl_device_enter(int device);
void nccl_device_leave(int entered);

static inline void nccl_kernel_set_lane(kernelGroup_t *kernel, int lane) {
  kernel->lane = lane;
  kernel->laneState = &kernel->state->lanes[lane];
}

/* Records a CUDA or NCCL error. */
ultraepResult_t nccl_cuda_error(cudaError_t error, const char *what);
ultraepResult_t nccl_nccl_error(const ncclRank_t *self, int result, const char *what);

/* Stream-ordered memory, ready for use on any stream when the call returns; null on failure, which is
 * recorded. */
void *nccl_device_alloc(ncclRank_t *self, size_t bytes, const char *what);
void nccl_device_free(ncclRank_t *self, void *ptr);
/* Whether a graph is being captured from the stream. */
bool nccl_is_captured(cudaStream_t stream);
/* Remembers that a lane's work was enqueued (not when captured); waits for all that was, in both lanes. */
void nccl_work_enqueued(ncclRank_t *self, int lane, cudaStream_t stream, bool captured);
cudaError_t nccl_work_wait(ncclRank_t *self);

int64_t nccl_now_ms(void);
/* A meeting has failed, and NCCL's call or kernel may stay pending: nothing may wait for it or free what it
 * uses, and from now on the group has failed. nccl_give_up: by the timeout. */
void nccl_fail(ncclRank_t *self, ultraepResult_t code);
ultraepResult_t nccl_give_up(ncclRank_t *self, const char *phase);

/* Makes a call of NCCL that may wait for other ranks, at most the group's timeout. argument (bytes <= 64) is
 * given to `run` as a copy, which comes back when the call has ended. */
typedef int (*ncclCall_t)(const ncclSymbols_t *nccl, ncclComm_t comm, void *argument);
ultraepResult_t nccl_call(ncclRank_t *self, ncclCall_t run, void *argument, size_t bytes, const char *what);
/* Between begin and its end, and in threads of nccl_call, NCCL is called for us and not for the program: what
 * NCCL then asks by its public names may lead to the plugin, which tells the two apart by it. */
void nccl_own_calls(bool begin);
bool nccl_is_own_thread(void);

/* Waits for the group's own stream, but not for ever: a rank that never comes leaves NCCL's kernel waiting.
 */
ultraepResult_t nccl_stream_wait(ncclRank_t *self, const char *phase);
/* A rank without a group: what it needs to meet the communicator's other ranks, and for regions. The current
 * device is the communicator's. */
ultraepResult_t nccl_rank_open(ncclComm_t comm, int timeoutMs, ncclRank_t **rank);
/* Collective, before the first region: the way to the peers' memory, by ULTRAEP_PEERS. */
ultraepResult_t nccl_rank_choose_peers(ncclRank_t *self);
void nccl_rank_close(ncclRank_t *rank);
/* Collective: gives every rank's message (bytes <= NCCL_AGREE_BYTES) to all, in order of rank; messages holds
 * R * bytes. Waits at most the group's timeout for each of its two steps. What NCCL gave for a rank's message
 * without being it (the communicator was aborted) is ultraepRemoteError, and the group has failed. */
#define NCCL_AGREE_BYTES 512
ultraepResult_t nccl_agree(ncclRank_t *self, const void *mine, void *messages, size_t bytes,
                           const char *phase);
/* Of the rank's agreeBuffer. */
size_t nccl_agree_buffer_bytes(const ncclRank_t *self);

/* Collective: allocates (ptr null) or takes memory and finds the peers' pointers. `zero` clears it before any
 * peer can reach it. All ranks have the region afterwards, or none. */
ultraepResult_t nccl_region_open(ncclRank_t *self, void *ptr, size_t bytes, bool zero, ncclRegion_t *region);
void nccl_region_close(ncclRank_t *self, ncclRegion_t *region, bool owned);

/* These look at the host's memory alone. */
ultraepResult_t nccl_group_check(ultraepGroup_t group, const char *phase);
void nccl_group_status(ultraepGroup_t group, ultraepStatus_t *status);
/* These, and those below, want the communicator's device to be current: nccl_backend.c sees to it. */
ultraepResult_t nccl_group_counters(ultraepGroup_t group, ultraepCounters_t *counters);
void nccl_group_abort(ultraepGroup_t group);
void nccl_group_destroy(ultraepGroup_t group);

ultraepResult_t nccl_mem_create(ultraepGroup_t group, int number, void *ptr, size_t bytes);
ultraepResult_t nccl_mem_destroy(ultraepGroup_t group, int number);

ultraepResult_t nccl_route_create(ultraepRoute_t route);
void nccl_route_destroy(ultraepRoute_t route);
ultraepResult_t nccl_route_update(ultraepRoute_t route, const int32_t *topkIdx, const float *topkWeights,
                                  int nTokens, cudaStream_t stream);
ultraepResult_t nccl_route_plan(ultraepRoute_t route, ultraepPlan_t *plan);
ultraepResult_t nccl_route_dispatch(const int32_t *topkIdx, const float *topkWeights, int nTokens,
                                    const backendExchange_t *exchange, cudaStream_t stream);
/* How the route's last update, and the calls on it in either lane, came out, as far as it is known without
 * waiting. */
ultraepResult_t nccl_route_status(ultraepRoute_t route);
/* What a lane's call on the route is refused for; see nccl_exchange.c. */
ultraepResult_t nccl_route_check(ultraepRoute_t route, int lane);
/* A number that ranks share when they are in the same call with the same places: a hash of `words`, never 0,
 * below KERNEL_CHECK_BAD_ENTRY. */
uint32_t nccl_check_word(const uint64_t *words, size_t n);
ultraepResult_t nccl_dispatch(const backendExchange_t *exchange, cudaStream_t stream);
ultraepResult_t nccl_combine(const backendExchange_t *exchange, cudaStream_t stream);

ultraepResult_t nccl_experts_register(ultraepGroup_t group, groupLayer_t *layer);
void nccl_gate_changed(ultraepGroup_t group);
ultraepResult_t nccl_weights_sync(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream);
ultraepResult_t nccl_grads_reduce(ultraepRoute_t route, const groupLayer_t *layer, cudaStream_t stream);

#endif
