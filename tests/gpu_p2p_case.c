#include "gpu_p2p_case.h"

#include "gpu_common.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

double p2p_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- devices ---- */

static int nP2pDevices = 1; /* that ranks take in turn */

/* One device's kernels may use all others' memory. */
static cudaError_t device_open(int device) {
  cudaError_t error = cudaSetDevice(device);
  for (int peer = 0; peer < nP2pDevices && error == cudaSuccess; peer++) {
    if (peer == device) continue;
    error = cudaDeviceEnablePeerAccess(peer, 0);
    if (error != cudaErrorPeerAccessAlreadyEnabled) continue;
    (void)cudaGetLastError();
    error = cudaSuccess;
  }
  return error == cudaSuccess ? (cudaError_t)kernelP2pLoad() : error;
}

/* Where not all devices reach each other, it is one. */
static cudaError_t devices_open(void) {
  int can = 1, n = 1;
  cudaError_t error = cudaGetDeviceCount(&n);
  if (n > P2P_MAX_RANKS) n = P2P_MAX_RANKS;
  for (int pair = 0; pair < n * n && error == cudaSuccess && can; pair++)
    if (pair / n != pair % n) error = cudaDeviceCanAccessPeer(&can, pair / n, pair % n);
  nP2pDevices = can ? n : 1;
  for (int device = 0; device < nP2pDevices && error == cudaSuccess; device++) error = device_open(device);
  return error;
}

cudaError_t p2p_use(int rank) {
  return cudaSetDevice(rank % nP2pDevices);
}

cudaError_t p2p_synchronize(const p2pWorld_t *world) {
  cudaError_t error = cudaSuccess;
  for (int r = 0; r < world->nRanks && error == cudaSuccess; r++) {
    error = p2p_use(r);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
  }
  return error;
}

/* ---- ranks ---- */

static cudaError_t zeroed(int rank, void **made, size_t bytes) {
  cudaError_t error = p2p_use(rank);
  if (error == cudaSuccess) error = cudaMalloc(made, bytes);
  return error == cudaSuccess ? cudaMemset(*made, 0, bytes) : error;
}

static cudaError_t pinned(void **made, size_t bytes) {
  cudaError_t error = cudaHostAlloc(made, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (error == cudaSuccess) memset(*made, 0, bytes);
  return error;
}

static cudaError_t rank_make(p2pWorld_t *world, int rank) {
  p2pRank_t *made = &world->ranks[rank];
  size_t nMaps = (size_t)world->nRanks * KERNEL_P2P_SLOTS;
  cudaError_t error = p2p_use(rank);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&made->stream, cudaStreamNonBlocking);
  if (error == cudaSuccess)
    error = zeroed(rank, (void **)&made->p2p.state, kernelP2pStateBytes(&made->p2p.geometry));
  if (error == cudaSuccess) error = pinned((void **)&made->failure, sizeof(*made->failure));
  if (error == cudaSuccess) error = pinned((void **)&made->maps, nMaps * sizeof(*made->maps));
  if (error == cudaSuccess) error = pinned(&made->pinned, sizeof(made->lanes) + sizeof(made->ops));
  if (error == cudaSuccess) error = cudaMalloc((void **)&made->p2p.windows, sizeof(world->windows));
  if (error == cudaSuccess)
    error =
        cudaMemcpy((void *)made->p2p.windows, world->windows, sizeof(world->windows), cudaMemcpyHostToDevice);
  if (error != cudaSuccess) return error;
  for (int r = 0; r < world->nRanks; r++) made->maps[r * KERNEL_P2P_SLOTS].generation = 7;
  made->p2p.failure = made->failure; /* unified addressing */
  made->p2p.maps = made->maps;
  return cudaSuccess;
}

const char *p2p_world_make(p2pWorld_t *world, int nRanks, int nBlocks, uint64_t stageBytes, int nStages,
                           uint64_t eagerBytes, bool portable) {
  kernelP2pGeometry_t geometry = {nRanks, nStages, stageBytes, eagerBytes};
  kernelP2pLayout_t layout;
  int major = 0, limit = 0, multiprocessors = 0;
  memset(world, 0, sizeof(*world));
  world->nRanks = nRanks;
  kernelP2pLayout(&geometry, &layout);
  cudaError_t error = devices_open();
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  if (nBlocks > multiprocessors) nBlocks = multiprocessors;
  for (int r = 0; r < nRanks && error == cudaSuccess; r++)
    error = zeroed(r, &world->windows[r], layout.bytes);
  for (int r = 0; r < nRanks && error == cudaSuccess; r++) {
    world->ranks[r].p2p = (kernelP2p_t){.geometry = geometry,
                                        .rank = r,
                                        .nBlocks = nBlocks,
                                        .hasBulk = major >= 9 && !portable,
                                        .sharedBytes = limit,
                                        .timeoutNs = 20000000000u};
    error = rank_make(world, r);
  }
  if (error == cudaSuccess) error = p2p_synchronize(world);
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

void p2p_world_free(p2pWorld_t *world) {
  for (int r = 0; r < world->nRanks; r++) {
    p2pRank_t *rank = &world->ranks[r];
    (void)p2p_use(r);
    (void)cudaFree(world->windows[r]);
    (void)cudaFree(rank->p2p.state);
    (void)cudaFree((void *)rank->p2p.windows);
    (void)cudaFreeHost(rank->failure);
    (void)cudaFreeHost(rank->maps);
    (void)cudaFreeHost(rank->pinned);
    if (rank->stream) (void)cudaStreamDestroy(rank->stream);
  }
}

/* The lane of one peer and direction, with its operations. */
static bool lane_make(p2pRank_t *rank, int number, int peer, bool isRecv, const p2pTransfer_t *transfers,
                      int n) {
  kernelP2pLane_t *lane = &rank->lanes[rank->group.nLanes];
  *lane = (kernelP2pLane_t){.peer = peer, .first = rank->group.nOps, .isRecv = isRecv};
  for (int i = 0; i < n; i++) {
    const p2pTransfer_t *t = &transfers[i];
    if ((isRecv ? t->to : t->from) != number || (isRecv ? t->from : t->to) != peer) continue;
    if (rank->group.nOps == P2P_MAX_OPS) return false;
    rank->ops[rank->group.nOps++] =
        (kernelP2pOp_t){.address = (uint64_t)(uintptr_t)(isRecv ? t->recv : t->send),
                        .bytes = isRecv ? t->recvBytes : t->sendBytes,
                        .slot = t->isMapped ? 0 : KERNEL_P2P_NO_SLOT,
                        .generation = 7};
    lane->n++;
  }
  rank->group.nLanes += lane->n > 0;
  return true;
}

bool p2p_groups_make(p2pWorld_t *world, const p2pTransfer_t *transfers, int n) {
  for (int r = 0; r < world->nRanks; r++) {
    p2pRank_t *rank = &world->ranks[r];
    rank->group = (kernelP2pGroup_t){.lanes = rank->lanes, .ops = rank->ops};
    for (int peer = 0; peer < world->nRanks; peer++)
      if (!lane_make(rank, r, peer, false, transfers, n) || !lane_make(rank, r, peer, true, transfers, n))
        return false;
    if (kernelP2pFits(rank->group.nLanes, rank->group.nOps)) continue;
    memcpy(rank->pinned, rank->lanes, sizeof(rank->lanes));
    memcpy((char *)rank->pinned + sizeof(rank->lanes), rank->ops, sizeof(rank->ops));
    rank->group.lanes = rank->pinned;
    rank->group.ops = (kernelP2pOp_t *)((char *)rank->pinned + sizeof(rank->lanes));
  }
  return true;
}

cudaError_t p2p_launch(p2pWorld_t *world, unsigned ranks) {
  cudaError_t error = cudaSuccess;
  for (int r = 0; r < world->nRanks && error == cudaSuccess; r++) {
    p2pRank_t *rank = &world->ranks[r];
    if (!(ranks >> r & 1)) continue;
    error = p2p_use(r);
    if (error == cudaSuccess) error = (cudaError_t)kernelP2pLaunch(&rank->p2p, &rank->group, rank->stream);
  }
  return error;
}

bool p2p_wait(p2pWorld_t *world, double seconds) {
  double end = p2p_seconds() + seconds * GPU_PATIENCE;
  for (int r = 0; r < world->nRanks;) {
    cudaError_t state = cudaStreamQuery(world->ranks[r].stream);
    if (state == cudaSuccess) {
      r++;
    } else if (state != cudaErrorNotReady || p2p_seconds() > end) {
      return false;
    } else {
      nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
  }
  return true;
}
