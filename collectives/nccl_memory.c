/* Symmetric regions: this rank's memory and every other rank's as seen from here, whichever way they are
 * reached (ncclPeers_t). */
#include "nccl_backend.h"

#include <stdlib.h>
#include <string.h>

/* Where a caller's memory begins in its allocation. 0 where the driver does not tell. */
static uint64_t region_offset(const void *ptr) {
  uint64_t base, bytes, bufferId;
  if (!ptr || peer_memory_look(ptr, &base, &bytes, &bufferId) != ultraepSuccess) return 0;
  return (uint64_t)(uintptr_t)ptr - base;
}

/* The caller's memory is this rank's part of a region, and peers reach the communicator's device. */
static ultraepResult_t region_check_device(const ncclRank_t *self, const void *ptr) {
  struct cudaPointerAttributes attributes = {.type = cudaMemoryTypeUnregistered};
  if (cudaPointerGetAttributes(&attributes, ptr) != cudaSuccess) (void)cudaGetLastError();
  if (attributes.type != cudaMemoryTypeDevice || attributes.device == self->device) return ultraepSuccess;
  return error_set(ultraepInvalidUsage, "%p is memory of device %d, the communicator's is %d", ptr,
                   attributes.device, self->device);
}

/* This rank's part, before any peer is asked: memory, tables. Leaves in *made what it has got. */
static ultraepResult_t region_prepare(ncclRank_t *self, bool zero, ncclRegion_t *made) {
  ultraepResult_t result =
      made->base ? region_check_device(self, made->base) : self->peers->alloc(self, made->bytes, &made->base);
  if (result != ultraepSuccess) return result;
  made->peers = calloc((size_t)self->nRanks, sizeof(*made->peers));
  if (!made->peers) return error_set(ultraepSystemError, "no memory for a region");
  made->devicePeers = nccl_device_alloc(self, (size_t)self->nRanks * sizeof(char *), "a region's table");
  if (!made->devicePeers) return ultraepUnhandledCudaError;
  if (!zero) return ultraepSuccess;
  cudaError_t error = cudaMemsetAsync(made->base, 0, made->bytes, self->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
  return error == cudaSuccess ? ultraepSuccess : nccl_cuda_error(error, "clearing a region");
}

typedef struct {
  uint64_t bytes, result, offset;
} regionOffer_t;

/* All ranks or none go on, and with the same region. */
static ultraepResult_t region_agree(ncclRank_t *self, ultraepResult_t own, uint64_t bytes, uint64_t offset) {
  regionOffer_t mine = {bytes, (uint64_t)own, offset}, *all = calloc((size_t)self->nRanks, sizeof(mine));
  ultraepResult_t agreed = all ? nccl_agree(self, &mine, all, sizeof(mine), "memory")
                               : error_set(ultraepSystemError, "no memory for a region");
  ultraepResult_t result = own == ultraepSuccess ? agreed : own;
  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++) {
    if (all[r].result != 0)
      result = error_set(ultraepRemoteError, "memory: rank %d has none for the region: %s", r,
                         ultraepGetErrorString((ultraepResult_t)all[r].result));
    else if (all[r].bytes != bytes)
      result = error_set(ultraepInvalidUsage, "memory: rank %d asks for %llu bytes, rank %d for %llu", r,
                         (unsigned long long)all[r].bytes, self->rank, (unsigned long long)bytes);
    else if (all[r].offset != offset)
      result = error_set(ultraepInvalidUsage,
                         "memory: rank %d's memory begins %llu bytes into its allocation, rank %d's %llu", r,
                         (unsigned long long)all[r].offset, self->rank, (unsigned long long)offset);
  }
  free(all);
  return result;
}

/* The peers' pointers, to the device too. All ranks have theirs, or the call fails on all. */
static ultraepResult_t region_reach(ncclRank_t *self, ncclRegion_t *made) {
  ultraepResult_t own = self->peers->open(self, made);
  if (self->isStuck) return own;
  if (own == ultraepSuccess) {
    cudaError_t error = cudaMemcpyAsync(made->devicePeers, made->peers, (size_t)self->nRanks * sizeof(char *),
                                        cudaMemcpyHostToDevice, self->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(self->stream);
    if (error != cudaSuccess) own = nccl_cuda_error(error, "cudaMemcpy");
  }
  int32_t mine = (int32_t)own, *all = calloc((size_t)self->nRanks, sizeof(mine));
  ultraepResult_t agreed = all ? nccl_agree(self, &mine, all, sizeof(mine), "memory")
                               : error_set(ultraepSystemError, "no memory for a region");
  ultraepResult_t result = own == ultraepSuccess ? agreed : own;
  for (int r = 0; r < self->nRanks && result == ultraepSuccess; r++)
    if (all[r] != ultraepSuccess)
      result = error_set(ultraepRemoteError, "memory: rank %d cannot reach all other ranks' memory: %s", r,
                         ultraepGetErrorString((ultraepResult_t)all[r]));
  free(all);
  return result;
}

ultraepResult_t nccl_region_open(ncclRank_t *self, void *ptr, size_t bytes, bool zero, ncclRegion_t *region) {
  ncclRegion_t made = {.base = ptr, .bytes = bytes};
  ultraepResult_t own = region_prepare(self, zero, &made);
  uint64_t offset = self->peers->needsOffsets ? region_offset(ptr) : 0;
  ultraepResult_t result = region_agree(self, own, bytes, offset);
  if (result == ultraepSuccess) result = region_reach(self, &made);
  if (result == ultraepSuccess) {
    *region = made;
    return ultraepSuccess;
  }
  if (!self->isStuck)
    nccl_region_close(self, &made, !ptr);
  else
    free(made.peers); /* NCCL may still be using the rest */
  return result;
}

void nccl_region_close(ncclRank_t *self, ncclRegion_t *region, bool owned) {
  if (region->base) self->peers->close(self, region);
  if (owned && region->base && !self->isAbandoned) self->peers->release(self, region->base);
  nccl_device_free(self, region->devicePeers);
  free(region->peers);
  self->nLent -= region->isLent;
  *region = (ncclRegion_t){0};
}

ultraepResult_t nccl_mem_create(ultraepGroup_t group, int number, void *ptr, size_t bytes) {
  ncclRank_t *self = nccl_rank(group);
  if ((uintptr_t)ptr % self->peers->alignment != 0)
    return error_set(ultraepInvalidArgument,
                     "ptr = %p is not aligned to %zu bytes, as NCCL's windows must be", ptr,
                     self->peers->alignment);
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
  if (result == ultraepSuccess && self->peers->meetsToFree) {
    self->peers->close(self, &self->regions[number]);
    result = nccl_agree(self, &mine, all, sizeof(mine), "memory");
  }
  free(all);
  if (result != ultraepSuccess) return result;
  nccl_region_close(self, &self->regions[number], region->owned);
  *region = (groupRegion_t){.peers = region->peers};
  return ultraepSuccess;
}
