/* Symmetric memory from NCCL: windows, and every rank's memory as seen from this one. */
#include "nccl_backend.h"

#include <stdlib.h>
#include <string.h>

static ultraepResult_t region_find_peers(const ncclRank_t *self, ncclRegion_t *region) {
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
  cudaError_t error =
      cudaMemcpyAsync(region->devicePeers, region->peers, (size_t)self->nRanks * sizeof(char *),
                      cudaMemcpyHostToDevice, self->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
  return error == cudaSuccess ? ultraepSuccess : nccl_cuda_error(error, "cudaMemcpy");
}

typedef struct {
  void *base;
  size_t bytes;
  ncclWindow_t window; /* out */
} regionWindow_t;

static int region_register(const ncclSymbols_t *nccl, ncclComm_t comm, void *argument) {
  regionWindow_t *x = argument;
  return nccl->CommWindowRegister(comm, x->base, x->bytes, &x->window, NCCL_WINDOW_SYMMETRIC);
}

/* Where a caller's memory begins in its allocation: NCCL wants that alike on all ranks. 0 where the driver
 * does not tell. */
static uint64_t region_offset(void *ptr) {
#if CUDART_VERSION >= 12050
  void *function = NULL;
  unsigned long long base = 0;
  size_t bytes = 0;
  enum cudaDriverEntryPointQueryResult found;
  if (!ptr || cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &function, 12000, cudaEnableDefault,
                                               &found) != cudaSuccess)
    return 0;
  int (*range)(unsigned long long *, size_t *, unsigned long long) = NULL;
  memcpy(&range, &function, sizeof(range));
  if (!range || range(&base, &bytes, (unsigned long long)(uintptr_t)ptr) != 0) return 0;
  return (uint64_t)(uintptr_t)ptr - base;
#else
  (void)ptr;
  return 0;
#endif
}

ultraepResult_t nccl_region_open(ncclRank_t *self, void *ptr, size_t bytes, bool zero, ncclRegion_t *region) {
  ncclRegion_t made = {.base = ptr};
  ultraepResult_t result = ultraepSuccess;
  int status = ptr ? 0 : self->nccl->MemAlloc(&made.base, bytes);
  if (status != 0)
    result = error_set(ultraepSystemError, "no device memory: %zu bytes asked for (ncclMemAlloc: %s)", bytes,
                       self->nccl->GetErrorString(status));
  made.peers = calloc((size_t)self->nRanks, sizeof(*made.peers));
  if (result == ultraepSuccess && !made.peers)
    result = error_set(ultraepSystemError, "no memory for a region");
  if (result == ultraepSuccess) {
    made.devicePeers = nccl_device_alloc(self, (size_t)self->nRanks * sizeof(char *), "a region's table");
    if (!made.devicePeers) result = ultraepUnhandledCudaError;
  }
  if (result == ultraepSuccess && zero) {
    cudaError_t error = cudaMemsetAsync(made.base, 0, bytes, self->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
    if (error != cudaSuccess) result = nccl_cuda_error(error, "clearing a region");
  }

  /* All ranks or none go on to the registration, which waits for all. */
  uint64_t mine[3] = {bytes, (uint64_t)result, region_offset(ptr)},
           *all = calloc((size_t)self->nRanks, sizeof(mine));
  ultraepResult_t agreed = all ? nccl_agree(self, mine, all, sizeof(mine), "memory")
                               : error_set(ultraepSystemError, "no memory for a region");
  for (int r = 0; r < self->nRanks && agreed == ultraepSuccess && result == ultraepSuccess; r++) {
    const uint64_t *theirs = all + 3 * r;
    if (theirs[1] != 0)
      result = error_set(ultraepRemoteError, "memory: rank %d could not allocate", r);
    else if (theirs[0] != bytes)
      result = error_set(ultraepInvalidUsage, "memory: rank %d asks for %llu bytes, rank %d for %zu", r,
                         (unsigned long long)theirs[0], self->rank, bytes);
    else if (theirs[2] != mine[2])
      result = error_set(ultraepInvalidUsage,
                         "memory: rank %d's memory begins %llu bytes into its allocation, rank %d's %llu", r,
                         (unsigned long long)theirs[2], self->rank, (unsigned long long)mine[2]);
  }
  free(all);
  if (result == ultraepSuccess) result = agreed;
  if (result != ultraepSuccess) goto close_region;

  regionWindow_t window = {made.base, bytes, NULL};
  result = nccl_call(self, region_register, &window, sizeof(window), "ncclCommWindowRegister");
  made.window = window.window;
  if (result == ultraepSuccess && !made.window)
    result = error_set(ultraepInvalidUsage, "NCCL gave no window: this communicator has no symmetric memory "
                                            "(cuMem and peer access between all its GPUs are needed)");
  if (result == ultraepSuccess) result = region_find_peers(self, &made);
  if (result != ultraepSuccess) goto close_region;
  *region = made;
  return ultraepSuccess;

close_region:
  if (!self->isStuck)
    nccl_region_close(self, &made, !ptr);
  else
    free(made.peers); /* NCCL may still be using the rest */
  return result;
}

void nccl_region_close(ncclRank_t *self, ncclRegion_t *region, bool owned) {
  if (region->window) (void)self->nccl->CommWindowDeregister(self->comm, region->window);
  if (owned && region->base) (void)self->nccl->MemFree(region->base);
  nccl_device_free(self, region->devicePeers);
  free(region->peers);
  *region = (ncclRegion_t){0};
}

ultraepResult_t nccl_mem_create(ultraepGroup_t group, int number, void *ptr, size_t bytes) {
  ncclRank_t *self = nccl_rank(group);
  if ((uintptr_t)ptr % NCCL_WINDOW_ALIGNMENT != 0)
    return error_set(ultraepInvalidArgument, "ptr = %p is not aligned to %d bytes, as NCCL's windows must be",
                     ptr, NCCL_WINDOW_ALIGNMENT);
  if (number >= self->nRegions) {
    ncclRegion_t *regions = realloc(self->regions, ((size_t)number + 1) * sizeof(*regions));
    if (!regions) return error_set(ultraepSystemError, "no memory for the table of regions");
    memset(regions + self->nRegions, 0, ((size_t)number + 1 - (size_t)self->nRegions) * sizeof(*regions));
    self->regions = regions;
    self->nRegions = number + 1;
  }
  ncclRegion_t made;
  ultraepResult_t result = nccl_region_open(self, ptr, bytes, false, &made);
  if (result != ultraepSuccess) return result;
  self->regions[number] = made;
  groupRegion_t *region = &group->regions[number];
  *region = (groupRegion_t){.base = made.base, .bytes = bytes, .owned = !ptr, .peers = region->peers};
  for (int r = 0; r < self->nRanks; r++) region->peers[r] = (unsigned char *)made.peers[r];
  return ultraepSuccess;
}

ultraepResult_t nccl_mem_destroy(ultraepGroup_t group, int number) {
  ncclRank_t *self = nccl_rank(group);
  groupRegion_t *region = &group->regions[number];
  /* This rank's work on the region is done, then every rank's. */
  cudaError_t error = nccl_work_wait(self);
  if (error != cudaSuccess) return nccl_cuda_error(error, "ultraepMemFree");
  uint64_t mine = (uint64_t)number, *all = calloc((size_t)self->nRanks, sizeof(mine));
  if (!all) return error_set(ultraepSystemError, "no memory for freeing a region");
  ultraepResult_t result = nccl_agree(self, &mine, all, sizeof(mine), "memory");
  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++)
    if (all[r] != mine)
      result = error_set(ultraepInvalidUsage, "ultraepMemFree: rank %d frees another region than rank %d", r,
                         self->rank);
  free(all);
  if (result != ultraepSuccess) return result;
  nccl_region_close(self, &self->regions[number], region->owned);
  *region = (groupRegion_t){.peers = region->peers};
  return ultraepSuccess;
}
