/* Groups on an ncclComm_t: create, status, abort, destroy. */
#include "nccl_backend.h"

#include "config.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define GROUP_REFUSAL_TIMEOUT_MS 30000 /* for telling the others of a config whose own timeout is unknown */

static pthread_once_t groupPeersOnce = PTHREAD_ONCE_INIT;

static void group_warn_peers(void) {
  fprintf(stderr, "ultraep: %s=%.200s does not fit (auto|window|ipc); the default auto is used\n",
          CONFIG_PEERS_VARIABLE, getenv(CONFIG_PEERS_VARIABLE));
}

static const char *const ncclPhases[] = {"", "route", "dispatch", "combine", "memory", "weights", "grads"};

ultraepResult_t nccl_cuda_error(cudaError_t error, const char *what) {
  return error_set(ultraepUnhandledCudaError, "%s: %s", what, cudaGetErrorString(error));
}

ultraepResult_t nccl_nccl_error(const ncclRank_t *self, int result, const char *what) {
  ultraepResult_t code =
      result > 0 && result <= ultraepTimeout ? (ultraepResult_t)result : ultraepInternalError;
  return error_set(code, "%s: %s", what, self->nccl->GetErrorString(result));
}

/* ---- memory and work ---- */

void *nccl_device_alloc(ncclRank_t *self, size_t bytes, const char *what) {
  void *ptr = NULL;
  cudaError_t error = cudaMallocAsync(&ptr, bytes, self->stream);
  if (error == cudaSuccess) error = cudaMemsetAsync(ptr, 0, bytes, self->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
  if (error == cudaSuccess) return ptr;
  (void)nccl_cuda_error(error, what);
  nccl_device_free(self, ptr);
  return NULL;
}

void nccl_device_free(ncclRank_t *self, void *ptr) {
  if (ptr) (void)cudaFreeAsync(ptr, self->stream);
}

bool nccl_is_captured(cudaStream_t stream) {
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &capture) == cudaSuccess && capture != cudaStreamCaptureStatusNone;
}

void nccl_work_enqueued(ncclRank_t *self, int lane, cudaStream_t stream, bool captured) {
  if (!captured) (void)cudaEventRecord(self->work[lane], stream);
}

cudaError_t nccl_work_wait(ncclRank_t *self) {
  cudaError_t result = cudaSuccess;
  for (int lane = 0; lane < KERNEL_LANES; lane++) {
    cudaError_t error = self->work[lane] ? cudaEventSynchronize(self->work[lane]) : cudaSuccess;
    if (error != cudaSuccess) result = error;
  }
  return result;
}

/* ---- what ranks agree on ---- */

typedef struct {
  uint64_t host; /* 0: not known */
  char bus[24];
} groupDevice_t;

typedef struct {
  int32_t result, reserved; /* what this rank has met so far */
  configPeers_t peers;
  groupDevice_t device;
  ultraepConfig_t config;
} groupOffer_t;
_Static_assert(sizeof(groupOffer_t) <= NCCL_AGREE_BYTES, "an offer is one message");

/* What this rank says of its peers' memory: what it is told to, else the environment. */
static configPeers_t group_peers(const ncclRank_t *self, int32_t wish) {
  configPeers_t peers = {.wish = wish, .hasWindows = self->nccl->hasWindows};
  const char *text = getenv(CONFIG_PEERS_VARIABLE);
  if (peers.wish == ULTRAEP_PEERS_AUTO && text && text[0] && !config_peers_read(text, &peers.wish))
    (void)pthread_once(&groupPeersOnce, group_warn_peers);
  return peers;
}

static groupDevice_t group_device(const ncclRank_t *self) {
  groupDevice_t device = {.host = peer_host_id()};
  bool isKnown = cudaDeviceGetPCIBusId(device.bus, sizeof(device.bus), self->device) == cudaSuccess;
  return isKnown ? device : (groupDevice_t){.host = 0};
}

/* Whether every rank has a GPU of its own. */
static bool group_has_own_devices(const groupOffer_t *offers, int n) {
  for (int r = 0; r < n; r++) {
    if (offers[r].device.host == 0) return false;
    for (int i = 0; i < r; i++)
      if (memcmp(&offers[i].device, &offers[r].device, sizeof(offers[r].device)) == 0) return false;
  }
  return true;
}

/* The way to the peers, alike on all ranks. */
static ultraepResult_t group_choose_peers(ncclRank_t *self, const configPeers_t *ranks, int32_t *peers) {
  int rank = 0;
  const char *flaw = config_peers_choose(ranks, self->nRanks, peers, &rank);
  if (flaw) return error_set(ultraepInvalidUsage, "create: rank %d: %s", rank, flaw);
  self->peers = *peers == ULTRAEP_PEERS_WINDOW ? &ncclPeersWindow : &ncclPeersIpc;
  return ultraepSuccess;
}

/* What the ranks have agreed on. */
typedef struct {
  int32_t peers;      /* the way to them */
  bool isFree;        /* nobody wished for it */
  bool hasOwnDevices; /* every rank has a GPU of its own */
} groupTerms_t;

/* Every rank can go on, and with the same config; a rank that cannot is not waited for later. */
static ultraepResult_t group_agree_config(ncclRank_t *self, const ultraepConfig_t *config,
                                          ultraepResult_t own, groupTerms_t *terms) {
  groupOffer_t mine = {.result = (int32_t)own}, *all = calloc((size_t)self->nRanks, sizeof(*all));
  configPeers_t *ranks = calloc((size_t)self->nRanks, sizeof(*ranks));
  if (own == ultraepSuccess) {
    mine.config = *config;
    mine.peers = group_peers(self, config->peers);
    mine.device = group_device(self);
  }
  ultraepResult_t result = all && ranks ? nccl_agree(self, &mine, all, sizeof(mine), "create")
                                        : error_set(ultraepSystemError, "no memory for a group");
  if (own != ultraepSuccess) result = own;
  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++) {
    const char *field = all[r].result == 0 ? config_difference(&all[0].config, &all[r].config) : NULL;
    if (all[r].result != 0)
      result = error_set(ultraepRemoteError, "create: rank %d cannot make the group: %s", r,
                         ultraepGetErrorString((ultraepResult_t)all[r].result));
    else if (field)
      result = error_set(ultraepInvalidArgument, "config.%s differs between ranks 0 and %d", field, r);
  }
  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++) ranks[r] = all[r].peers;
  if (result == ultraepSuccess) result = group_choose_peers(self, ranks, &terms->peers);
  terms->isFree = result == ultraepSuccess;
  for (int r = 0; r < self->nRanks && terms->isFree; r++)
    terms->isFree = all[r].peers.wish == ULTRAEP_PEERS_AUTO;
  terms->hasOwnDevices = result == ultraepSuccess && group_has_own_devices(all, self->nRanks);
  free(ranks);
  free(all);
  return result;
}

/* ---- create ---- */

static size_t group_align(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/* Flags and the failure mark; loads by parity; then, where the modes need them, metadata of routes and
 * partial sums. */
static void group_lay_out_window(ultraepGroup_t group) {
  ncclRank_t *self = nccl_rank(group);
  const ultraepConfig_t *config = &group->config;
  size_t nRanks = (size_t)self->nRanks, nRows = (size_t)group->maxRecvRows;
  bool usesMeta =
      config->dispatchMode == ULTRAEP_DISPATCH_ONCE || config->combineMode == ULTRAEP_COMBINE_PARTIAL;
  self->failMarkOffset = KERNEL_FLAG_KINDS * nRanks * sizeof(uint64_t);
  self->kernel.loadsOffset = group_align(self->failMarkOffset + sizeof(uint64_t));
  self->metaOffset =
      group_align(self->kernel.loadsOffset + 2 * nRanks * (size_t)config->nExperts * sizeof(int32_t));
  self->partialsOffset = self->metaOffset;
  if (usesMeta) self->partialsOffset += (size_t)config->maxRoutes * group_align(nRows * sizeof(kernelMeta_t));
  self->windowBytes = self->partialsOffset;
  if (config->combineMode == ULTRAEP_COMBINE_PARTIAL)
    self->windowBytes += nRows * (size_t)config->hidden * (config->dataType == ULTRAEP_FLOAT32 ? 4 : 2);
  self->kernel.usesMeta = config->combineMode == ULTRAEP_COMBINE_PARTIAL ? 2 : usesMeta;
}

static ultraepResult_t group_look_at_device(ultraepGroup_t group) {
  ncclRank_t *self = nccl_rank(group);
  int limit = 0, major = 0, multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, self->device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, self->device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, self->device);
  if (error != cudaSuccess) return nccl_cuda_error(error, "cudaDeviceGetAttribute");
  self->kernel.sharedBytes = limit;
  self->kernel.hasBulk = major >= 9;
  /* Blocks of one kernel wait for each other, so all of them must be resident. */
  if (self->kernel.nBlocks > multiprocessors) self->kernel.nBlocks = multiprocessors;
  self->expertBlocks = group->config.expertCtas > 0 ? group->config.expertCtas : self->kernel.nBlocks;
  if (self->expertBlocks > multiprocessors) self->expertBlocks = multiprocessors;
  size_t needed = kernelRouteSharedBytes(&self->kernel.planner);
  if (needed > (size_t)limit)
    return error_set(
        ultraepInvalidUsage,
        "%d ranks, %d experts and %d slots need %zu bytes of shared memory to route, this device has %d",
        group->nRanks, group->config.nExperts, group->config.nSlots, needed, limit);
  return ultraepSuccess;
}

static void group_set_kernel(ultraepGroup_t group) {
  ncclRank_t *self = nccl_rank(group);
  const ultraepPlannerConfig_t *planner = &group->planner;
  self->kernel = (kernelGroup_t){
      .planner = {.nRanks = planner->nRanks,
                  .nExperts = planner->nExperts,
                  .nSlots = planner->nSlots,
                  .nDomainRanks = planner->nDomainRanks ? planner->nDomainRanks : planner->nRanks,
                  .relayCopies = planner->relayCopies,
                  .perRank = planner->nExperts / planner->nRanks,
                  .tolerancePpm = planner->tolerancePpm,
                  .rowPs = planner->rowPs,
                  .copyPs = planner->copyPs,
                  .replicaRows = planner->replicaRows},
      .rank = self->rank,
      .topK = group->config.topK,
      .alignment = group->config.alignment,
      .nSegments = group->nSegments,
      .nBlocks = config_blocks(&group->config),
      .maxRecvRows = group->maxRecvRows,
      .timeoutNs = (uint64_t)group->config.timeoutMs * 1000000,
  };
}

/* What ranks need to meet at all: nothing here depends on the config but the number of routes. */
static ultraepResult_t group_make_meeting(ncclRank_t *self, int maxRoutes) {
  size_t failure = group_align(sizeof(kernelFailure_t));
  size_t pinned = failure + (size_t)maxRoutes * KERNEL_LANES * sizeof(kernelRouteStatus_t);
  char *mapped = NULL;
  cudaError_t error = cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking);
  for (int lane = 0; lane < KERNEL_LANES && error == cudaSuccess; lane++)
    error = cudaEventCreateWithFlags(&self->work[lane], cudaEventDisableTiming);
  if (error == cudaSuccess) error = cudaHostAlloc(&self->pinned, pinned, cudaHostAllocMapped);
  if (error == cudaSuccess) error = cudaHostGetDevicePointer((void **)&mapped, self->pinned, 0);
  if (error != cudaSuccess) return nccl_cuda_error(error, "a group's memory");
  memset(self->pinned, 0, pinned);
  self->failure = self->pinned;
  self->statuses = (kernelRouteStatus_t *)((char *)self->pinned + failure);
  self->deviceFailure = (kernelFailure_t *)mapped;
  self->deviceStatuses = (kernelRouteStatus_t *)(mapped + failure);
  self->agreeBuffer = nccl_device_alloc(self, nccl_agree_buffer_bytes(self), "a group's messages");
  return self->agreeBuffer ? ultraepSuccess : ultraepUnhandledCudaError;
}

static ultraepResult_t group_allocate(ultraepGroup_t group) {
  ncclRank_t *self = nccl_rank(group);
  size_t counts = (size_t)self->kernel.nBlocks * (size_t)group->config.nExperts * sizeof(int32_t);
  size_t state = group_align(sizeof(kernelState_t));
  cudaError_t error = (cudaError_t)kernelsLoad();
  if (error != cudaSuccess) return nccl_cuda_error(error, "the kernels");
  self->deviceBlock = nccl_device_alloc(self, state + counts, "a group's state");
  if (!self->deviceBlock) return ultraepUnhandledCudaError;
  self->kernel.failure = self->deviceFailure;
  self->kernel.state = self->deviceBlock;
  nccl_kernel_set_lane(&self->kernel, KERNEL_LANE_EXCHANGE);
  self->kernel.chunkCounts = (int32_t *)((char *)self->deviceBlock + state);
  group->privateBytes = (int64_t)(state + counts + nccl_agree_buffer_bytes(self));
  return ultraepSuccess;
}

/* After a meeting that timed out, what NCCL's pending kernel may still touch stays allocated: the
 * communicator is lost with it, and waiting for it could take for ever. */
static void group_release(ncclRank_t *self) {
  if (!self->isStuck) {
    for (int i = 0; i < self->nRegions; i++) nccl_region_close(self, &self->regions[i], false);
    nccl_region_close(self, &self->slots, true);
    nccl_region_close(self, &self->window, true);
    nccl_device_free(self, self->agreeBuffer);
    nccl_device_free(self, self->deviceBlock);
    if (self->stream) (void)cudaStreamSynchronize(self->stream);
    (void)cudaFreeHost(self->pinned);
  }
  peer_socket_close(&self->socket);
  for (int lane = 0; lane < KERNEL_LANES; lane++)
    if (self->work[lane]) (void)cudaEventDestroy(self->work[lane]);
  if (self->stream && !self->isStuck) (void)cudaStreamDestroy(self->stream);
  free(self->regions);
  free(self);
}

/* What must hold before anything is made: NCCL's functions, the communicator's rank and device. */
static ultraepResult_t group_look_at_comm(ncclComm_t comm, ncclRank_t *self) {
  int current = -1;
  ultraepResult_t result = nccl_symbols_find(&self->nccl);
  if (result != ultraepSuccess) return result;
  self->comm = comm;
  int status = self->nccl->CommCount(comm, &self->nRanks);
  if (status == 0) status = self->nccl->CommUserRank(comm, &self->rank);
  if (status == 0) status = self->nccl->CommCuDevice(comm, &self->device);
  if (status != 0) return nccl_nccl_error(self, status, "comm");
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess) return nccl_cuda_error(error, "cudaGetDevice");
  if (current != self->device)
    return error_set(ultraepInvalidUsage, "the current device is %d, the communicator's is %d", current,
                     self->device);
  return ultraepSuccess;
}

/* This rank's part: whether it could make the group, before any peer is asked. */
static ultraepResult_t group_prepare(ultraepGroup_t *group, ncclRank_t *self, const ultraepConfig_t *config) {
  ultraepGroup_t made;
  ultraepResult_t result = group_make(&made, &ncclBackend, config, self->rank, self->nRanks,
                                      config->domainRanks ? config->domainRanks : self->nRanks);
  if (result != ultraepSuccess) return result;
  made->impl = self;
  group_set_kernel(made);
  result = group_look_at_device(made);
  if (result == ultraepSuccess) result = group_allocate(made);
  if (result == ultraepSuccess)
    *group = made;
  else
    group_free(made);
  return result;
}

ultraepResult_t nccl_rank_open(ncclComm_t comm, int timeoutMs, ncclRank_t **rank) {
  ncclRank_t *self = calloc(1, sizeof(*self));
  if (!self) return error_set(ultraepSystemError, "no memory for a rank");
  self->socket = PEER_SOCKET_NONE;
  ultraepResult_t result = group_look_at_comm(comm, self);
  self->timeoutMs = timeoutMs;
  if (result == ultraepSuccess) result = group_make_meeting(self, 1);
  if (result == ultraepSuccess)
    *rank = self;
  else
    group_release(self);
  return result;
}

ultraepResult_t nccl_rank_choose_peers(ncclRank_t *self) {
  configPeers_t mine = group_peers(self, ULTRAEP_PEERS_AUTO),
                *all = calloc((size_t)self->nRanks, sizeof(*all));
  int32_t peers = ULTRAEP_PEERS_AUTO;
  ultraepResult_t result = all ? nccl_agree(self, &mine, all, sizeof(mine), "create")
                               : error_set(ultraepSystemError, "no memory for a rank");
  if (result == ultraepSuccess) result = group_choose_peers(self, all, &peers);
  free(all);
  return result;
}

void nccl_rank_close(ncclRank_t *rank) {
  group_release(rank);
}

/* NCCL may have windows and this communicator none, which shows when the first is opened: then, if nobody
 * asked for windows, it is IPC. */
static ultraepResult_t group_open_window(ultraepGroup_t group, bool isFree) {
  ncclRank_t *self = nccl_rank(group);
  ultraepResult_t result = nccl_region_open(self, NULL, self->windowBytes, true, &self->window);
  if (result == ultraepSuccess || self->isStuck || !isFree || self->peers == &ncclPeersIpc) return result;
  /* Every rank has failed, and comes here. */
  self->peers = &ncclPeersIpc;
  group->config.peers = ULTRAEP_PEERS_IPC;
  return nccl_region_open(self, NULL, self->windowBytes, true, &self->window);
}

ultraepResult_t nccl_group_create(ultraepGroup_t *group, ncclComm_t comm, const ultraepConfig_t *config) {
  ncclRank_t *self = calloc(1, sizeof(*self));
  if (!self) return error_set(ultraepSystemError, "no memory for a group");
  self->socket = PEER_SOCKET_NONE;
  ultraepGroup_t made = NULL;
  groupTerms_t terms = {.peers = ULTRAEP_PEERS_AUTO};
  ultraepResult_t result = group_look_at_comm(comm, self);
  if (result != ultraepSuccess) goto free_self;
  ultraepResult_t own = config_check(config, self->nRanks);
  self->timeoutMs = own == ultraepSuccess ? config->timeoutMs : GROUP_REFUSAL_TIMEOUT_MS;
  result = group_make_meeting(self, own == ultraepSuccess ? config->maxRoutes : 1);
  if (result != ultraepSuccess) goto free_self;
  if (own == ultraepSuccess) own = group_prepare(&made, self, config);
  result = group_agree_config(self, config, own, &terms);
  if (result != ultraepSuccess || !made) goto free_group;
  made->config.peers = terms.peers;
  self->hasOwnDevices = terms.hasOwnDevices;
  made->config.dispatchMode = config_dispatch_mode(config, self->nRanks, terms.hasOwnDevices);
  group_lay_out_window(made);
  result = group_open_window(made, terms.isFree);
  if (result != ultraepSuccess) goto free_group;
  self->kernel.windows = self->window.devicePeers;
  made->windowBytes = (int64_t)self->windowBytes;
  *group = made;
  return ultraepSuccess;

free_group:
  if (made) group_free(made);
free_self:
  group_release(self);
  return result;
}

/* ---- status, abort, destroy ---- */

ultraepResult_t nccl_group_check(ultraepGroup_t group, const char *phase) {
  (void)phase;
  const volatile kernelFailure_t *failure = nccl_rank(group)->failure;
  ultraepResult_t code = (ultraepResult_t)failure->code;
  if (code == ultraepSuccess) {
    if (!failure->abort) return ultraepSuccess;
    return error_set(ultraepRemoteError, "the group was aborted on this rank");
  }
  const char *what = ncclPhases[failure->phase];
  char who[24] = "a rank"; /* where NCCL waited, which does not say for whom */
  if (failure->rank >= 0) snprintf(who, sizeof(who), "rank %d", failure->rank);
  if (code == ultraepTimeout)
    return error_set(code, "%s: %s did not come within %d ms", what, who, group->config.timeoutMs);
  if (code == ultraepInvalidUsage)
    return error_set(code, "%s: %s is in another call, or its symmetric buffer lies elsewhere", what, who);
  return error_set(code, "%s: %s aborted or failed", what, who);
}

void nccl_group_status(ultraepGroup_t group, ultraepStatus_t *status) {
  const volatile kernelFailure_t *failure = nccl_rank(group)->failure;
  *status = (ultraepStatus_t){.code = (ultraepResult_t)failure->code, .missingRank = -1};
  if (status->code != ultraepSuccess) {
    status->missingRank = failure->rank;
    snprintf(status->phase, sizeof(status->phase), "%s", ncclPhases[failure->phase]);
  } else if (failure->abort) {
    status->code = ultraepRemoteError;
    status->missingRank = group->rank;
    snprintf(status->phase, sizeof(status->phase), "abort");
  }
  for (int i = 0; i < group->config.maxRoutes && status->code == ultraepSuccess; i++) {
    if (!group->routes[i]) continue;
    status->code = nccl_route_status(group->routes[i]);
    if (status->code != ultraepSuccess) snprintf(status->phase, sizeof(status->phase), "route");
  }
}

/* Writes one word into every other rank's window, past whatever kernels are doing. */
static void group_tell(const ncclRank_t *self, size_t offset, uint64_t word) {
  cudaStream_t tell; /* of its own, and only now: streams share the device's few queues */
  if (!self->window.peers || cudaStreamCreateWithFlags(&tell, cudaStreamNonBlocking) != cudaSuccess) return;
  for (int r = 0; r < self->nRanks; r++)
    if (r != self->rank)
      (void)cudaMemcpyAsync(self->window.peers[r] + offset, &word, sizeof(word), cudaMemcpyHostToDevice,
                            tell);
  (void)cudaStreamSynchronize(tell);
  (void)cudaStreamDestroy(tell);
}

/* Ends this rank's waits through mapped memory and the peers' through their windows. */
void nccl_group_abort(ultraepGroup_t group) {
  ncclRank_t *self = nccl_rank(group);
  *(volatile int32_t *)&self->failure->abort = 1;
  group_tell(self, self->failMarkOffset, (uint64_t)ultraepRemoteError << 32 | (uint32_t)(self->rank + 1));
}

/* Whether every other rank has said within the timeout that it leaves. */
static bool group_wait_gone(ncclRank_t *self) {
  int64_t deadline = nccl_now_ms() + self->timeoutMs;
  size_t bytes = (size_t)self->nRanks * sizeof(uint64_t);
  const char *flags = (const char *)self->window.base + (size_t)KERNEL_FLAG_GONE * bytes;
  uint64_t *seen = calloc((size_t)self->nRanks, sizeof(*seen));
  bool areGone = false;
  while (seen && !areGone) {
    cudaError_t error = cudaMemcpyAsync(seen, flags, bytes, cudaMemcpyDeviceToHost, self->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
    if (error != cudaSuccess) break;
    areGone = true;
    for (int r = 0; r < self->nRanks; r++) areGone = areGone && (r == self->rank || seen[r] != 0);
    if (!areGone && nccl_now_ms() > deadline) break;
    if (!areGone) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
  }
  free(seen);
  return areGone;
}

/* Kernels of this rank end within the timeout; peers that wait for this rank afterwards learn that it has
 * left. */
void nccl_group_destroy(ultraepGroup_t group) {
  ncclRank_t *self = nccl_rank(group);
  (void)nccl_work_wait(self);
  group_tell(self, ((size_t)KERNEL_FLAG_GONE * (size_t)self->nRanks + (size_t)self->rank) * sizeof(uint64_t),
             1);
  /* What was lent must outlive its use by others: better not freed than too soon. */
  if (self->nLent > 0) self->isAbandoned = self->isStuck || !group_wait_gone(self);
  for (int i = 0; i < group->nRegions; i++) {
    if (!group->regions[i].base) continue;
    nccl_region_close(self, &self->regions[i], group->regions[i].owned);
  }
  group_release(self);
}

ultraepResult_t nccl_group_counters(ultraepGroup_t group, ultraepCounters_t *counters) {
  kernelState_t state;
  ncclRank_t *self = nccl_rank(group);
  cudaError_t error = nccl_work_wait(self);
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(&state, self->kernel.state, sizeof(state), cudaMemcpyDeviceToHost, self->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
  if (error != cudaSuccess) return nccl_cuda_error(error, "ultraepGroupCounters");
  *counters = (ultraepCounters_t){.dispatchBytes = (int64_t)state.dispatchBytes,
                                  .combineBytes = (int64_t)state.combineBytes,
                                  .weightBytes = (int64_t)state.weightBytes,
                                  .gradBytes = (int64_t)state.gradBytes};
  return ultraepSuccess;
}
