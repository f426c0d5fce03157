/* Peers' memory through NCCL's symmetric windows. */
#include "nccl_backend.h"

#include <pthread.h>
#include <time.h>

/* Threads that unmap the same allocations one beside the other have met a fault of the driver
 * (peer_memory.c), and NCCL unmaps those of all ranks on each: ranks of a process take turns. NCCL's calls
 * under it are local; should a version's wait for another rank, turns end after a second. */
static pthread_mutex_t windowLock = PTHREAD_MUTEX_INITIALIZER;

static bool window_lock(void) {
  struct timespec until;
  (void)clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec++;
  return pthread_mutex_timedlock(&windowLock, &until) == 0;
}

static void window_unlock(bool isLocked) {
  if (isLocked) (void)pthread_mutex_unlock(&windowLock);
}

static ultraepResult_t window_alloc(ncclRank_t *self, size_t bytes, void **ptr) {
  int status = self->nccl->MemAlloc(ptr, bytes);
  if (status == 0) return ultraepSuccess;
  return error_set(ultraepSystemError, "no device memory: %zu bytes asked for (ncclMemAlloc: %s)", bytes,
                   self->nccl->GetErrorString(status));
}

static void window_release(ncclRank_t *self, void *ptr) {
  bool isLocked = window_lock();
  (void)self->nccl->MemFree(ptr);
  window_unlock(isLocked);
}

typedef struct {
  void *base;
  size_t bytes;
  ncclWindow_t window; /* out */
} windowCall_t;

static int window_register(const ncclSymbols_t *nccl, ncclComm_t comm, void *argument) {
  windowCall_t *x = argument;
  return nccl->CommWindowRegister(comm, x->base, x->bytes, &x->window, NCCL_WINDOW_SYMMETRIC);
}

static ultraepResult_t window_find_peers(const ncclRank_t *self, ncclRegion_t *region) {
  for (int r = 0; r < self->nRanks; r++) {
    void *peer = NULL;
    int result = self->nccl->GetPeerDevicePointer(region->window, 0, r, &peer);
    if (result != 0) return nccl_nccl_error(self, result, "ncclGetPeerDevicePointer");
    if (!peer)
      return error_set(
          ultraepInvalidUsage,
          "rank %d cannot reach rank %d's memory: all ranks of a group must be in one NVLink domain",
          self->rank, r);
    region->peers[r] = peer;
  }
  return ultraepSuccess;
}

static ultraepResult_t window_open(ncclRank_t *self, ncclRegion_t *region) {
  windowCall_t call = {region->base, region->bytes, NULL};
  ultraepResult_t result = nccl_call(self, window_register, &call, sizeof(call), "ncclCommWindowRegister");
  region->window = call.window;
  if (result != ultraepSuccess) return result;
  if (!region->window)
    return error_set(ultraepInvalidUsage, "NCCL gave no window: this communicator has no symmetric memory "
                                          "(cuMem and peer access between all its GPUs are needed)");
  return window_find_peers(self, region);
}

static void window_close(ncclRank_t *self, ncclRegion_t *region) {
  if (!region->window) return;
  bool isLocked = window_lock();
  (void)self->nccl->CommWindowDeregister(self->comm, region->window);
  window_unlock(isLocked);
  region->window = NULL;
}

const ncclPeers_t ncclPeersWindow = {
    .alignment = NCCL_WINDOW_ALIGNMENT,
    .needsOffsets = true,
    .alloc = window_alloc,
    .release = window_release,
    .open = window_open,
    .close = window_close,
};
