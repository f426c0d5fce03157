/* Scheduled communicators: made by all ranks together, launched, ended. */
#include "schedule.h"

#include "nccl_backend.h"
#include "p2p.h"
#include "schedule_place.h"
#include "schedule_share.h"
#include "settings.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum {
  COMM_VERSION = 2,               /* of the agreement and the kernel's protocol */
  COMM_FIRST_TIMEOUT_MS = 600000, /* in which all ranks come, where the program waits */
  COMM_SETUP_TIMEOUT_MS = 60000,  /* and go on */
  COMM_ABORT_WAIT_MS = 5000
};

struct scheduleComm {
  scheduleUse_t use; /* first */
  ncclRank_t *self;  /* null: it is lost */
  int nRanks;
  ncclRegion_t window;
  kernelP2p_t p2p;
  void *pinned; /* mapped: the failure, then the maps */
  kernelP2pFailure_t *failure;
  scheduleShare_t *share;
  pthread_mutex_t lock; /* of launching */
  /* Order of launches: while all are on one stream and none is captured, that stream's own; nothing but their
   * number is kept. From the first one that is not, each waits for an event and records it. */
  unsigned long long only; /* the stream, by its id: its handle may come again */
  uint64_t launched;
  uint64_t newest; /* number of the last launch, see comm_follows; 0: none, or it failed */
  bool usesEvents;
  bool hasMet; /* what the ranks tried to do together last has come to an end that all know */
  bool isLost; /* or not: neither we nor NCCL can use it */
  cudaEvent_t last;
  schedulePlace_t *places;
  atomic_int broken; /* NCCL's code of a launch that failed: peers wait for it in vain */
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
  return comm->nRanks;
}

int schedule_comm_error(const scheduleComm_t *comm) {
  const volatile kernelP2pFailure_t *failure = comm->failure;
  const int broken = atomic_load_explicit(&comm->broken, memory_order_relaxed);

  if (broken != P2P_NCCL_SUCCESS) return broken;
  switch (failure->code) {
  case ultraepSuccess:
    return P2P_NCCL_SUCCESS;
  case ultraepInvalidUsage: /* sizes differ */
    return P2P_NCCL_INVALID_USAGE;
  default:
    return P2P_NCCL_REMOTE_ERROR;
  }
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
  size_t bytes = failure + (size_t)comm->nRanks * KERNEL_P2P_SLOTS * sizeof(kernelP2pMap_t);
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
                            .overlaps = settings->p2pOverlap,
                            .timeoutNs = (uint64_t)settings->p2pTimeoutMs * 1000000,
                            .maps = (kernelP2pMap_t *)(mapped + failure),
                            .failure = (kernelP2pFailure_t *)mapped};
  if (comm->p2p.nBlocks > multiprocessors) comm->p2p.nBlocks = multiprocessors;
  comm->p2p.state = nccl_device_alloc(self, kernelP2pStateBytes(geometry), "the state of scheduling");
  comm->lanes = calloc(2 * (size_t)comm->nRanks, sizeof(*comm->lanes));
  comm->counts = calloc(2 * (size_t)comm->nRanks, sizeof(*comm->counts));
  return comm->p2p.state && comm->lanes && comm->counts ? ultraepSuccess : ultraepSystemError;
}

static void comm_free(scheduleComm_t *comm) {
  if (!comm->self) {
    free(comm);
    return;
  }
  schedule_share_close(comm->share);
  if (!comm->self->isStuck) {
    nccl_region_close(comm->self, &comm->window, true);
    nccl_device_free(comm->self, comm->p2p.state);
    (void)cudaStreamSynchronize(comm->self->stream);
    if (comm->pinned) (void)cudaFreeHost(comm->pinned);
  }
  schedule_places_free(comm->places, comm->self->isStuck);
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
  commOffer_t *all = calloc((size_t)comm->nRanks, sizeof(*all));
  scheduleShareRank_t *ranks = calloc((size_t)comm->nRanks, sizeof(*ranks));
  ultraepResult_t result = all && ranks ? nccl_agree(self, mine, all, sizeof(*mine), "schedule")
                                        : error_set(ultraepSystemError, "no memory for scheduling");

  comm->hasMet = result == ultraepSuccess;
  for (int r = 0; r < comm->nRanks && result == ultraepSuccess; r++) {
    ranks[r] = all[r].share;
    if (all[r].code != ultraepSuccess)
      result = error_set(ultraepRemoteError, "rank %d cannot", r);
    else if (all[r].version != all[0].version ||
             memcmp(&all[r].geometry, &all[0].geometry, sizeof(all[0].geometry)) != 0)
      result =
          error_set(ultraepInvalidUsage, "ULTRAEP_P2P settings or versions differ between ranks 0 and %d", r);
  }
  if (result == ultraepInvalidUsage) settings_warn("scheduling: %s", ultraepGetLastError());
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

/* Whatever this rank has met so far, the others wait for it here: all can go on, or none does. */
static ultraepResult_t comm_meet(scheduleComm_t *comm, commOffer_t *mine, ultraepResult_t own) {
  ultraepResult_t agreed;

  mine->code = (int32_t)own;
  agreed = comm_agree(comm, mine);
  return own == ultraepSuccess ? agreed : own;
}

static ultraepResult_t comm_open_window(scheduleComm_t *comm) {
  kernelP2pLayout_t layout;

  kernelP2pLayout(&comm->p2p.geometry, &layout);
  return nccl_region_open(comm->self, NULL, layout.bytes, true, &comm->window);
}

static uint64_t comm_power_of_two(uint64_t most) {
  while (most & (most - 1)) most &= most - 1;
  return most;
}

/* Where it is not said: what keeps all of a rank's stages small, though not so small that they slow it down.
 */
static uint64_t comm_stage_bytes(const settings_t *settings, uint64_t nStages) {
  const uint64_t all = (uint64_t)64 << 20;
  uint64_t bytes = (uint64_t)settings->p2pStageKb * 1024;

  if (bytes > 0) return comm_power_of_two(bytes);
  for (bytes = 512 << 10; bytes > 64 << 10 && bytes * nStages > all;) bytes /= 2;
  return bytes;
}

static kernelP2pGeometry_t comm_geometry(const settings_t *settings, int nRanks) {
  kernelP2pGeometry_t geometry = {.nRanks = nRanks,
                                  .nStages = (int32_t)comm_power_of_two((uint64_t)settings->p2pStages),
                                  .eagerBytes = (uint64_t)settings->p2pEagerKb * 1024};

  geometry.stageBytes = comm_stage_bytes(settings, (uint64_t)nRanks * (uint64_t)geometry.nStages);
  if (geometry.eagerBytes > geometry.stageBytes) geometry.eagerBytes = geometry.stageBytes;
  if (geometry.eagerBytes > KERNEL_P2P_MOST_EAGER) geometry.eagerBytes = KERNEL_P2P_MOST_EAGER;
  return geometry;
}

/* All that the ranks do together. */
static ultraepResult_t comm_set_up(scheduleComm_t *comm) {
  const settings_t *settings = settings_get();
  const int nRanks = comm->nRanks;
  commOffer_t mine = {.version = COMM_VERSION, .geometry = comm_geometry(settings, nRanks)};
  ultraepResult_t result = comm_prepare(comm, &mine.geometry);
  scheduleShare_t *share;

  if (result == ultraepSuccess && settings->p2pShare != SETTINGS_SHARE_OFF)
    (void)schedule_share_open(&comm->share, comm->self->rank, nRanks, comm->self->device,
                              settings->p2pShare == SETTINGS_SHARE_ALL, &mine.share);
  result = comm_meet(comm, &mine, result);
  comm->self->timeoutMs = COMM_SETUP_TIMEOUT_MS;
  if (result != ultraepSuccess) return result; /* on all ranks */
  result = nccl_rank_choose_peers(comm->self);
  if (result != ultraepSuccess) return result;
  result = comm_open_window(comm);
  /* A window that one rank could not map ends scheduling on all. */
  share = comm->share;
  comm->share = NULL; /* started already */
  result = comm_meet(comm, &mine, result);
  comm->share = share;
  return result;
}

/* Where the program waits in the call that makes the communicator, all ranks are there, though one's call may
 * make others, too. Else one may come as late as one that it sends to. */
static int comm_patience_ms(const scheduleSetup_t *setup) {
  const int asked = settings_get()->p2pTimeoutMs, ms = asked > 0 ? asked : INT32_MAX;

  return setup || ms < COMM_FIRST_TIMEOUT_MS ? ms : COMM_FIRST_TIMEOUT_MS;
}

typedef struct {
  void *handle;
  scheduleSetup_t *setup;
  int result; /* NCCL's code, for the program's call */
} commOpening_t;

/* Sets it up; where that fails it is lost, or all ranks know and leave it to NCCL. */
static ultraepResult_t comm_make(const commOpening_t *opening, scheduleComm_t *comm) {
  scheduleSetup_t *setup = opening->setup;
  ultraepResult_t result = nccl_rank_open(opening->handle, comm_patience_ms(setup), &comm->self);

  comm->isLost = result != ultraepSuccess; /* the others wait */
  if (comm->isLost) return result;
  pthread_mutex_init(&comm->lock, NULL);
  schedule_setup_watch(setup, &comm->self->failure->abort);
  result = comm_set_up(comm);
  schedule_setup_watch(setup, NULL);
  comm->isLost = !comm->hasMet || comm->self->isStuck;
  if (comm->isLost) comm->self->isStuck = true; /* NCCL may still use its memory */
  comm->p2p.windows = comm->window.devicePeers;
  return result;
}

/* What all ranks find alike, without a word. */
static ultraepResult_t comm_look(void *handle, int *nRanks, int *device) {
  const ncclSymbols_t *nccl;
  ultraepResult_t result = nccl_symbols_find(&nccl);

  if (result != ultraepSuccess) return result;
  if (nccl->CommCount(handle, nRanks) != 0 || nccl->CommCuDevice(handle, device) != 0)
    return error_set(ultraepInvalidUsage, "its size or device is not known");
  if (*nRanks < 2 || *nRanks > KERNEL_P2P_MAX_RANKS)
    return error_set(ultraepInvalidUsage, "%d rank%s", *nRanks, *nRanks == 1 ? "" : "s");
  /* Over memory that ranks map themselves it has not been measured: only where it is asked for. */
  if (!nccl->hasWindows && !settings_get()->p2pIsAsked)
    return error_set(ultraepInvalidUsage,
                     "NCCL before 2.29: ULTRAEP_P2P=schedule on all ranks schedules them");
  return ultraepSuccess;
}

static void comm_left_to_nccl(void) {
  if (settings_tells_unscheduled())
    settings_warn("sends and receives of a communicator are left to NCCL: %s", ultraepGetLastError());
}

/* What became of the communicator. Where its ranks have not met it is lost: what they have begun on it
 * together would meet the program's next call on this one. */
static void comm_opened(commOpening_t *opening, ultraepResult_t result, scheduleComm_t *comm) {
  bool isAborted = schedule_setup_is_aborted(opening->setup);

  if (result == ultraepSuccess) {
    if (settings_is_verbose())
      settings_warn("communicator %p, rank %d of %d: sends and receives are scheduled, %d blocks",
                    opening->handle, comm->self->rank, comm->nRanks, comm->p2p.nBlocks);
    schedule_add_comm(opening->handle, comm);
  } else if (comm->isLost && !isAborted) {
    opening->result = comm->self ? P2P_NCCL_REMOTE_ERROR : P2P_NCCL_SYSTEM_ERROR;
    atomic_store(&comm->broken, opening->result);
    settings_warn("communicator %p cannot be used, as its ranks could not agree who moves its data: %s; with "
                  "ULTRAEP_P2P=observe on all ranks NCCL does",
                  opening->handle, ultraepGetLastError());
    schedule_add_comm(opening->handle, comm);
  } else {
    if (!isAborted) comm_left_to_nccl();
    comm_free(comm);
  }
}

static void comm_open_there(commOpening_t *opening) {
  scheduleComm_t *comm = calloc(1, sizeof(*comm));
  int device, entered;
  ultraepResult_t result;

  if (!comm) {
    opening->result = P2P_NCCL_SYSTEM_ERROR;
    settings_warn("communicator %p cannot be used: no memory for scheduling", opening->handle);
    return;
  }
  result = comm_look(opening->handle, &comm->nRanks, &device);
  if (result != ultraepSuccess) {
    comm_left_to_nccl();
    free(comm);
    return;
  }
  entered = nccl_device_enter(device);
  result = comm_make(opening, comm);
  comm_opened(opening, result, comm);
  nccl_device_leave(entered);
}

/* One communicator, on its device. The program may be capturing a graph, here or in another thread, which
 * memory that is allocated meanwhile must not end. */
static void *comm_open(void *argument) {
  enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;

  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  nccl_own_calls(true);
  comm_open_there(argument);
  nccl_own_calls(false);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  return NULL;
}

bool schedule_is_wanted(void) {
  return settings_get()->p2p == SETTINGS_P2P_SCHEDULE;
}

bool schedule_is_own_thread(void) {
  return nccl_is_own_thread();
}

typedef struct {
  commOpening_t opening;
  pthread_t thread;
  bool isStarted;
} commThread_t;

/* Ranks of one communicator may be among them, which wait for each other. */
static int comms_open(void *const *comms, scheduleSetup_t *const *setups, int n) {
  commThread_t *threads = calloc((size_t)n, sizeof(*threads));
  int result = P2P_NCCL_SUCCESS;

  if (!threads) {
    settings_warn("%d communicators cannot be used: no memory to set them up", n);
    return P2P_NCCL_SYSTEM_ERROR;
  }
  for (int i = 0; i < n; i++) {
    threads[i].opening = (commOpening_t){.handle = comms[i], .setup = setups ? setups[i] : NULL};
    threads[i].isStarted =
        i + 1 < n && pthread_create(&threads[i].thread, NULL, comm_open, &threads[i].opening) == 0;
  }
  for (int i = 0; i < n; i++)
    if (!threads[i].isStarted) comm_open(&threads[i].opening);
  for (int i = 0; i < n; i++) {
    if (threads[i].isStarted) pthread_join(threads[i].thread, NULL);
    if (result == P2P_NCCL_SUCCESS) result = threads[i].opening.result;
  }
  free(threads);
  return result;
}

int schedule_comms_made(void *const *comms, scheduleSetup_t *const *setups, int n) {
  commOpening_t one;

  if (!schedule_is_wanted() || n == 0) return P2P_NCCL_SUCCESS;
  if (n > 1) return comms_open(comms, setups, n);
  one = (commOpening_t){.handle = comms[0], .setup = setups ? setups[0] : NULL};
  comm_open(&one);
  return one.result;
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

static unsigned long long comm_stream_id(cudaStream_t stream) {
  unsigned long long id = 0;

  return cudaStreamGetId(stream, &id) == cudaSuccess ? id : (unsigned long long)(uintptr_t)stream;
}

static cudaError_t comm_order(scheduleComm_t *comm, cudaStream_t stream, unsigned long long id,
                              bool captured) {
  if (!comm->usesEvents) {
    if (!captured && (comm->launched == 0 || comm->only == id)) return cudaSuccess;
    comm->usesEvents = true;
    if (comm->launched == 0) return cudaSuccess;
    cudaError_t error = (cudaError_t)kernelP2pAwait(&comm->p2p, comm->launched, comm->self->stream);
    if (error == cudaSuccess) error = cudaEventRecord(comm->last, comm->self->stream);
    if (error != cudaSuccess) return error;
  }
  return cudaStreamWaitEvent(stream, comm->last, captured ? cudaEventWaitExternal : cudaEventWaitDefault);
}
/* Launches of all communicators are numbered; here is the newest of each stream, several of which may share
 * an entry. */
#define COMM_STREAMS 64
static _Atomic uint64_t commLaunches;
static _Atomic uint64_t commNewest[COMM_STREAMS];

/* Whether the launch that is next in the stream comes directly after this communicator's last one. */
static bool comm_follows(scheduleComm_t *comm, unsigned long long id) {
  const uint64_t number = atomic_fetch_add(&commLaunches, 1) + 1, last = comm->newest;
  const uint64_t newest = atomic_exchange(&commNewest[id % COMM_STREAMS], number);

  comm->newest = number;
  return last != 0 && newest == last && !comm->usesEvents;
}

static cudaError_t comm_record(scheduleComm_t *comm, cudaStream_t stream, unsigned long long id,
                               bool captured) {
  comm->launched++;
  if (!comm->usesEvents) {
    comm->only = id;
    return cudaSuccess;
  }
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

static int comm_launch_group(scheduleComm_t *comm, int nLanes, int nOps, cudaStream_t stream,
                             unsigned long long id, bool captured) {
  kernelP2pGroup_t group = {comm->lanes, comm->sorted, nLanes, nOps, !captured && comm_follows(comm, id)};
  schedulePlace_t *place = NULL;
  cudaError_t error;

  if (!kernelP2pFits(nLanes, nOps)) {
    place = schedule_place_take(&comm->places, &group, stream, captured);
    if (!place) return P2P_NCCL_SYSTEM_ERROR;
  }
  error = (cudaError_t)kernelP2pLaunch(&comm->p2p, &group, stream);
  if (error != cudaSuccess) comm->newest = 0;
  if (error == cudaSuccess && place && !captured) error = schedule_place_launched(place, stream);
  return comm_result(error);
}

static int comm_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n) {
  cudaStream_t stream = ops[0].stream;
  bool captured = nccl_is_captured(stream);
  const unsigned long long id = captured ? 0 : comm_stream_id(stream); /* then unused */
  int nLanes, result;

  if (!comm_make_room(comm, n)) return P2P_NCCL_SYSTEM_ERROR;
  nLanes = schedule_lanes(ops, n, comm->nRanks, comm->lanes, comm->sorted, comm->from, comm->counts);
  comm_share_buffers(comm, comm->lanes, nLanes, ops);
  result = comm_result(comm_join(ops, n, stream, true));
  if (result == P2P_NCCL_SUCCESS) result = comm_result(comm_order(comm, stream, id, captured));
  if (result == P2P_NCCL_SUCCESS) result = comm_launch_group(comm, nLanes, n, stream, id, captured);
  if (result == P2P_NCCL_SUCCESS) result = comm_result(comm_record(comm, stream, id, captured));
  return result == P2P_NCCL_SUCCESS ? comm_result(comm_join(ops, n, stream, false)) : result;
}

/* What is looked up and allocated meanwhile must not end a capture. */
int schedule_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n) {
  enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  int entered, result;

  if (comm->isLost) return P2P_NCCL_REMOTE_ERROR;
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  entered = nccl_device_enter(comm->self->device);
  pthread_mutex_lock(&comm->lock);
  result = comm_launch(comm, ops, n);
  if (result != P2P_NCCL_SUCCESS) atomic_store(&comm->broken, result);
  pthread_mutex_unlock(&comm->lock);
  nccl_device_leave(entered);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
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
  int entered;

  if (!comm) return;
  if (comm->isLost) { /* nothing was launched */
    schedule_wait_unused(comm);
    comm_free(comm);
    return;
  }
  entered = nccl_device_enter(comm->self->device);
  if (abort) comm->failure->abort = 1;
  schedule_wait_unused(comm);
  if (comm_wait(comm, abort ? COMM_ABORT_WAIT_MS : -1)) {
    if (kernelP2pLeave(&comm->p2p, comm->self->stream) == cudaSuccess)
      (void)cudaStreamSynchronize(comm->self->stream);
  } else {
    comm->self->isStuck = true; /* a kernel may still use the memory */
  }
  if (settings_is_verbose())
    settings_warn("communicator %p, rank %d of %d: %llu scheduled groups were launched", handle,
                  comm->self->rank, comm->nRanks, (unsigned long long)comm->launched);
  comm_free(comm);
  nccl_device_leave(entered);
}
