/* Scheduled communicators: made by all ranks together, launched, ended. */
#include "schedule.h"

#include "nccl_backend.h"
#include "p2p.h"
#include "schedule_share.h"
#include "settings.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum {
  COMM_VERSION = 1, /* of the agreement and the kernel's protocol */
  COMM_SETUP_TIMEOUT_MS = 60000,
  COMM_ABORT_WAIT_MS = 5000,
  COMM_GROUPS = 8, /* that do not fit the kernel's argument and are under way */
  COMM_GROUP_OPS = 4096
};

/* Lanes and operations of a group in memory that the device reads. */
typedef struct {
  kernelP2pLane_t *lanes; /* [2 * nRanks], then ops */
  kernelP2pOp_t *ops;     /* [COMM_GROUP_OPS] */
  cudaEvent_t done;
  bool isKept; /* a graph may read it at any time */
} commGroup_t;

struct scheduleComm {
  ncclRank_t *self;
  ncclRegion_t window;
  kernelP2p_t p2p;
  void *pinned; /* mapped: the failure, then the maps */
  kernelP2pFailure_t *failure;
  scheduleShare_t *share;
  pthread_mutex_t lock; /* of launching */
  /* Order of launches: while all are on one stream and none is captured, that stream's own; nothing but their
   * number is kept. From the first one that is not, each waits for an event and records it. */
  void *only;
  uint64_t launched;
  bool usesEvents;
  cudaEvent_t last;
  commGroup_t groups[COMM_GROUPS];
  /* [room] to sort a group in */
  kernelP2pOp_t *sorted;
  int32_t *from, *counts;
  kernelP2pLane_t *lanes;
  int room;
};

/* What ranks tell each other when a communicator is made. Up to `share` all must be equal. */
typedef struct {
  int32_t version, code; /* code: what this rank met, 0: nothing */
  kernelP2pGeometry_t geometry;
  scheduleShareRank_t share;
} commOffer_t;
_Static_assert(sizeof(commOffer_t) <= NCCL_AGREE_BYTES, "an offer is one message");

int schedule_comm_ranks(const scheduleComm_t *comm) {
  return comm->self->nRanks;
}

int schedule_comm_error(const scheduleComm_t *comm) {
  const volatile kernelP2pFailure_t *failure = comm->failure;

  switch (failure->code) {
  case ultraepSuccess:
    return P2P_NCCL_SUCCESS;
  case ultraepInvalidUsage: /* sizes differ */
    return P2P_NCCL_INVALID_USAGE;
  default:
    return P2P_NCCL_REMOTE_ERROR;
  }
}

/* Where NCCL's own log says so much: that a communicator is scheduled, and what came of it. */
static bool comm_logs(void) {
  const char *level = getenv("NCCL_DEBUG");

  return level && (strcasecmp(level, "INFO") == 0 || strcasecmp(level, "TRACE") == 0);
}

/* ---- making ---- */

static int comm_ctas(const settings_t *settings) {
  const char *text = getenv("NCCL_MAX_CTAS");
  int ctas = settings->p2pCtas > 0 ? settings->p2pCtas : text ? atoi(text) : 0;

  return ctas > 0 && ctas <= 128 ? ctas : 16;
}

static ultraepResult_t comm_cuda(cudaError_t error) {
  return error == cudaSuccess ? ultraepSuccess : nccl_cuda_error(error, "scheduling");
}

/* What this rank can do by itself. */
static ultraepResult_t comm_prepare(scheduleComm_t *comm, const kernelP2pGeometry_t *geometry) {
  ncclRank_t *self = comm->self;
  const settings_t *settings = settings_get();
  size_t failure = (sizeof(kernelP2pFailure_t) + 255) / 256 * 256;
  size_t bytes = failure + (size_t)self->nRanks * KERNEL_P2P_SLOTS * sizeof(kernelP2pMap_t);
  int major = 0, limit = 0, multiprocessors = 0;
  char *mapped = NULL;
  cudaError_t error = (cudaError_t)kernelP2pLoad();

  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, self->device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, self->device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, self->device);
  if (error == cudaSuccess) error = cudaHostAlloc(&comm->pinned, bytes, cudaHostAllocMapped);
  if (error == cudaSuccess) error = cudaHostGetDevicePointer((void **)&mapped, comm->pinned, 0);
  if (error == cudaSuccess) error = cudaEventCreateWithFlags(&comm->last, cudaEventDisableTiming);
  if (error != cudaSuccess) return comm_cuda(error);
  memset(comm->pinned, 0, bytes);
  comm->failure = comm->pinned;
  comm->p2p = (kernelP2p_t){.geometry = *geometry,
                            .rank = self->rank,
                            .nBlocks = comm_ctas(settings),
                            .hasBulk = major >= 9,
                            .sharedBytes = limit,
                            .timeoutNs = (uint64_t)settings->p2pTimeoutMs * 1000000,
                            .maps = (kernelP2pMap_t *)(mapped + failure),
                            .failure = (kernelP2pFailure_t *)mapped};
  if (comm->p2p.nBlocks > multiprocessors) comm->p2p.nBlocks = multiprocessors;
  comm->p2p.state = nccl_device_alloc(self, kernelP2pStateBytes(geometry), "the state of scheduling");
  comm->lanes = calloc(2 * (size_t)self->nRanks, sizeof(*comm->lanes));
  comm->counts = calloc(2 * (size_t)self->nRanks, sizeof(*comm->counts));
  return comm->p2p.state && comm->lanes && comm->counts ? ultraepSuccess : ultraepSystemError;
}

static void comm_free(scheduleComm_t *comm) {
  schedule_share_close(comm->share);
  if (!comm->self->isStuck) {
    nccl_region_close(comm->self, &comm->window, true);
    nccl_device_free(comm->self, comm->p2p.state);
    (void)cudaStreamSynchronize(comm->self->stream);
    if (comm->pinned) (void)cudaFreeHost(comm->pinned);
    for (int i = 0; i < COMM_GROUPS; i++) {
      if (comm->groups[i].lanes) (void)cudaFreeHost(comm->groups[i].lanes);
      if (comm->groups[i].done) (void)cudaEventDestroy(comm->groups[i].done);
    }
  }
  if (comm->last) (void)cudaEventDestroy(comm->last);
  nccl_rank_close(comm->self);
  pthread_mutex_destroy(&comm->lock);
  free(comm->sorted);
  free(comm->from);
  free(comm->lanes);
  free(comm->counts);
  free(comm);
}

/* All ranks can, and alike: else null, on all of them. */
static ultraepResult_t comm_agree(scheduleComm_t *comm, const commOffer_t *mine) {
  ncclRank_t *self = comm->self;
  commOffer_t *all = calloc((size_t)self->nRanks, sizeof(*all));
  scheduleShareRank_t *ranks = calloc((size_t)self->nRanks, sizeof(*ranks));
  ultraepResult_t result = all && ranks ? nccl_agree(self, mine, all, sizeof(*mine), "schedule")
                                        : error_set(ultraepSystemError, "no memory for scheduling");

  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++) {
    ranks[r] = all[r].share;
    if (all[r].code != ultraepSuccess)
      result = error_set(ultraepRemoteError, "rank %d cannot", r);
    else if (all[r].version != all[0].version ||
             memcmp(&all[r].geometry, &all[0].geometry, sizeof(all[0].geometry)) != 0)
      result =
          error_set(ultraepInvalidUsage, "ULTRAEP_P2P settings or versions differ between ranks 0 and %d", r);
  }
  if (result == ultraepSuccess && comm->share)
    if (schedule_share_start(comm->share, ranks,
                             (kernelP2pMap_t *)((char *)comm->pinned + (sizeof(kernelP2pFailure_t) + 255) /
                                                                           256 * 256)) != ultraepSuccess) {
      schedule_share_close(comm->share);
      comm->share = NULL;
    }
  free(all);
  free(ranks);
  return result;
}

static ultraepResult_t comm_make(void *handle, scheduleComm_t **made) {
  const settings_t *settings = settings_get();
  scheduleComm_t *comm = calloc(1, sizeof(*comm));
  commOffer_t mine = {.version = COMM_VERSION};
  ultraepResult_t result;

  if (!comm) return ultraepSystemError;
  result = nccl_rank_open(handle, COMM_SETUP_TIMEOUT_MS, &comm->self);
  if (result != ultraepSuccess) {
    free(comm);
    return result;
  }
  pthread_mutex_init(&comm->lock, NULL);
  mine.geometry = (kernelP2pGeometry_t){.nRanks = comm->self->nRanks,
                                        .nStages = settings->p2pStages,
                                        .stageBytes = (uint64_t)settings->p2pStageKb * 1024,
                                        .eagerBytes = (uint64_t)settings->p2pEagerKb * 1024};
  if (mine.geometry.eagerBytes > mine.geometry.stageBytes)
    mine.geometry.eagerBytes = mine.geometry.stageBytes;
  if (mine.geometry.eagerBytes > KERNEL_P2P_MOST_EAGER) mine.geometry.eagerBytes = KERNEL_P2P_MOST_EAGER;
  result = comm->self->nRanks < 2 || comm->self->nRanks > KERNEL_P2P_MAX_RANKS
               ? error_set(ultraepInvalidUsage, "%d ranks", comm->self->nRanks)
               : comm_prepare(comm, &mine.geometry);
  if (result == ultraepSuccess && settings->p2pShare != SETTINGS_SHARE_OFF)
    (void)schedule_share_open(&comm->share, comm->self->rank, comm->self->nRanks, comm->self->device,
                              settings->p2pShare == SETTINGS_SHARE_ALL, &mine.share);
  mine.code = (int32_t)result;
  /* Whatever this rank has met: the others wait for it here. */
  ultraepResult_t agreed = comm_agree(comm, &mine);
  if (result == ultraepSuccess) result = agreed;
  if (agreed == ultraepSuccess) agreed = nccl_rank_choose_peers(comm->self);
  if (result == ultraepSuccess) result = agreed;
  if (result == ultraepSuccess) {
    kernelP2pLayout_t layout;

    kernelP2pLayout(&mine.geometry, &layout);
    result = nccl_region_open(comm->self, NULL, layout.bytes, true, &comm->window);
  }
  /* A window that one rank could not map ends scheduling on all. */
  mine.code = (int32_t)result;
  if (agreed == ultraepSuccess) {
    scheduleShare_t *share = comm->share;

    comm->share = NULL; /* started already */
    agreed = comm_agree(comm, &mine);
    comm->share = share;
    if (result == ultraepSuccess) result = agreed;
  }
  if (result != ultraepSuccess) {
    comm_free(comm);
    return result;
  }
  comm->p2p.windows = comm->window.devicePeers;
  *made = comm;
  return ultraepSuccess;
}

/* One communicator, on its device. */
static void *comm_open(void *handle) {
  const ncclSymbols_t *nccl;
  scheduleComm_t *made = NULL;
  int before = -1, device;
  ultraepResult_t result = nccl_symbols_find(&nccl);

  if (result == ultraepSuccess && nccl->CommCuDevice(handle, &device) != 0) result = ultraepInvalidUsage;
  if (result == ultraepSuccess) {
    (void)cudaGetDevice(&before);
    (void)cudaSetDevice(device);
    result = comm_make(handle, &made);
    if (before >= 0) (void)cudaSetDevice(before);
  }
  if (result == ultraepSuccess && comm_logs())
    settings_warn("communicator %p, rank %d of %d: sends and receives are scheduled, %d blocks", handle,
                  made->self->rank, made->self->nRanks, made->p2p.nBlocks);
  if (result == ultraepSuccess)
    schedule_add_comm(handle, made);
  else
    settings_warn("sends and receives of a communicator are left to NCCL: %s", ultraepGetLastError());
  return NULL;
}

void schedule_comms_made(void *const *comms, int n) {
  pthread_t *threads = n > 1 ? calloc((size_t)n, sizeof(*threads)) : NULL;
  bool *started = n > 1 ? calloc((size_t)n, sizeof(*started)) : NULL;

  if (settings_get()->p2p != SETTINGS_P2P_SCHEDULE) n = 0;
  if (n == 1) comm_open(comms[0]);
  /* Ranks of one communicator may be among them, which wait for each other. */
  for (int i = 0; i < n && n > 1 && threads && started; i++)
    started[i] = pthread_create(&threads[i], NULL, comm_open, comms[i]) == 0;
  for (int i = 0; i < n && n > 1 && threads && started; i++)
    if (started[i]) pthread_join(threads[i], NULL);
  free(threads);
  free(started);
}

/* ---- launching ---- */

static int comm_result(cudaError_t error) {
  return error == cudaSuccess ? P2P_NCCL_SUCCESS : P2P_NCCL_CUDA_ERROR;
}

static bool comm_make_room(scheduleComm_t *comm, int n) {
  if (n <= comm->room) return true;
  kernelP2pOp_t *sorted = realloc(comm->sorted, (size_t)n * sizeof(*sorted));
  if (sorted) comm->sorted = sorted;
  int32_t *from = realloc(comm->from, (size_t)n * sizeof(*from));
  if (from) comm->from = from;
  if (sorted && from) comm->room = n;
  return sorted && from;
}

/* A place for a group that does not fit the kernel's argument: one that no launch reads any more. */
static commGroup_t *comm_place(scheduleComm_t *comm, bool captured) {
  size_t lanes = 2 * (size_t)comm->self->nRanks * sizeof(kernelP2pLane_t);

  for (int i = 0; i < COMM_GROUPS; i++) {
    commGroup_t *group = &comm->groups[i];

    if (group->isKept || (group->done && cudaEventQuery(group->done) != cudaSuccess)) continue;
    if (!group->lanes && (cudaHostAlloc((void **)&group->lanes,
                                        lanes + COMM_GROUP_OPS * sizeof(kernelP2pOp_t), 0) != cudaSuccess ||
                          cudaEventCreateWithFlags(&group->done, cudaEventDisableTiming) != cudaSuccess))
      return NULL;
    group->ops = (kernelP2pOp_t *)((char *)group->lanes + lanes);
    group->isKept = captured;
    return group;
  }
  return NULL;
}

static cudaError_t comm_order(scheduleComm_t *comm, cudaStream_t stream, bool captured) {
  if (!comm->usesEvents) {
    if (!captured && (comm->launched == 0 || comm->only == (void *)stream)) return cudaSuccess;
    comm->usesEvents = true;
    if (comm->launched == 0) return cudaSuccess;
    cudaError_t error = (cudaError_t)kernelP2pAwait(&comm->p2p, comm->launched, comm->self->stream);
    if (error == cudaSuccess) error = cudaEventRecord(comm->last, comm->self->stream);
    if (error != cudaSuccess) return error;
  }
  return cudaStreamWaitEvent(stream, comm->last, captured ? cudaEventWaitExternal : cudaEventWaitDefault);
}
static cudaError_t comm_record(scheduleComm_t *comm, cudaStream_t stream, bool captured) {
  comm->only = stream;
  comm->launched++;
  if (!comm->usesEvents) return cudaSuccess;
  return cudaEventRecordWithFlags(comm->last, stream,
                                  captured ? cudaEventRecordExternal : cudaEventRecordDefault);
}

/* Other streams of the group: joined before (with their own event), and after. */
static cudaError_t comm_join(const scheduleOp_t *ops, int n, cudaStream_t stream, bool before) {
  cudaError_t error = cudaSuccess;

  for (int i = 1; i < n && error == cudaSuccess; i++) {
    cudaStream_t other = ops[i].stream;
    cudaEvent_t event;
    bool isNew = other != stream;

    for (int j = 1; j < i && isNew; j++) isNew = ops[j].stream != ops[i].stream;
    if (!isNew) continue;
    error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (error != cudaSuccess) break;
    error = cudaEventRecord(event, before ? other : stream);
    if (error == cudaSuccess) error = cudaStreamWaitEvent(before ? stream : other, event, 0);
    (void)cudaEventDestroy(event);
  }
  return error;
}

static void comm_share_buffers(scheduleComm_t *comm, const kernelP2pLane_t *lanes, int nLanes,
                               const scheduleOp_t *ops) {
  if (!comm->share) return;
  for (int lane = 0; lane < nLanes; lane++) {
    if (!lanes[lane].isRecv || lanes[lane].peer == comm->self->rank) continue;
    for (int i = lanes[lane].first; i < lanes[lane].first + lanes[lane].n; i++) {
      kernelP2pOp_t *op = &comm->sorted[i];

      if (op->bytes > comm->p2p.geometry.eagerBytes)
        schedule_share_find(comm->share, ops[comm->from[i]].buffer, op->bytes, &op->slot, &op->generation);
    }
  }
}

static int comm_launch_group(scheduleComm_t *comm, int nLanes, int nOps, cudaStream_t stream, bool captured) {
  kernelP2pGroup_t group = {comm->lanes, comm->sorted, nLanes, nOps};
  commGroup_t *place = NULL;
  cudaError_t error;

  if (!kernelP2pFits(nLanes, nOps)) {
    place = nOps <= COMM_GROUP_OPS ? comm_place(comm, captured) : NULL;
    if (!place) return P2P_NCCL_INVALID_USAGE;
    memcpy(place->lanes, comm->lanes, (size_t)nLanes * sizeof(*place->lanes));
    memcpy(place->ops, comm->sorted, (size_t)nOps * sizeof(*place->ops));
    group.lanes = place->lanes;
    group.ops = place->ops;
  }
  error = (cudaError_t)kernelP2pLaunch(&comm->p2p, &group, stream);
  if (error == cudaSuccess && place && !captured) error = cudaEventRecord(place->done, stream);
  return comm_result(error);
}

static int comm_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n) {
  cudaStream_t stream = ops[0].stream;
  bool captured = nccl_is_captured(stream);
  int nLanes, result;

  if (!comm_make_room(comm, n)) return P2P_NCCL_SYSTEM_ERROR;
  nLanes = schedule_lanes(ops, n, comm->self->nRanks, comm->lanes, comm->sorted, comm->from, comm->counts);
  comm_share_buffers(comm, comm->lanes, nLanes, ops);
  result = comm_result(comm_join(ops, n, stream, true));
  if (result == P2P_NCCL_SUCCESS) result = comm_result(comm_order(comm, stream, captured));
  if (result == P2P_NCCL_SUCCESS) result = comm_launch_group(comm, nLanes, n, stream, captured);
  if (result == P2P_NCCL_SUCCESS) result = comm_result(comm_record(comm, stream, captured));
  return result == P2P_NCCL_SUCCESS ? comm_result(comm_join(ops, n, stream, false)) : result;
}

int schedule_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n) {
  int before = -1, result;

  (void)cudaGetDevice(&before);
  if (before != comm->self->device) (void)cudaSetDevice(comm->self->device);
  pthread_mutex_lock(&comm->lock);
  result = comm_launch(comm, ops, n);
  pthread_mutex_unlock(&comm->lock);
  if (before >= 0 && before != comm->self->device) (void)cudaSetDevice(before);
  return result;
}

/* ---- ending ---- */

/* Waits for the last launch, ms or (below 0) for ever; false if it does not end in time. */
static bool comm_wait(scheduleComm_t *comm, int64_t ms) {
  int64_t end = nccl_now_ms() + ms;
  const volatile kernelP2pFailure_t *failure = comm->failure;
  cudaError_t state = cudaSuccess;

  if (comm->launched == 0) return true;
  if (comm->usesEvents)
    state = cudaStreamWaitEvent(comm->self->stream, comm->last, 0);
  else
    state = (cudaError_t)kernelP2pAwait(&comm->p2p, comm->launched, comm->self->stream);
  if (state != cudaSuccess) return true;
  while (cudaStreamQuery(comm->self->stream) == cudaErrorNotReady) {
    if (ms >= 0 && nccl_now_ms() > end) return false;
    nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
  }
  return comm->usesEvents || failure->nEnded >= comm->launched;
}

void schedule_comm_ends(const void *handle, bool abort) {
  scheduleComm_t *comm = schedule_remove_comm(handle);
  int before = -1;

  if (!comm) return;
  (void)cudaGetDevice(&before);
  (void)cudaSetDevice(comm->self->device);
  if (abort) comm->failure->abort = 1;
  if (comm_wait(comm, abort ? COMM_ABORT_WAIT_MS : -1)) {
    if (kernelP2pLeave(&comm->p2p, comm->self->stream) == cudaSuccess)
      (void)cudaStreamSynchronize(comm->self->stream);
  } else {
    comm->self->isStuck = true; /* a kernel may still use the memory */
  }
  if (comm_logs())
    settings_warn("communicator %p, rank %d of %d: %llu scheduled groups were launched", handle,
                  comm->self->rank, comm->self->nRanks, (unsigned long long)comm->launched);
  comm_free(comm);
  if (before >= 0) (void)cudaSetDevice(before);
}
