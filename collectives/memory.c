/* Symmetric memory: the table of regions. */
#include "error.h"
#include "group.h"

#include <stdlib.h>
#include <string.h>

#define PHASE "memory"
#define MAX_REGIONS 65535 /* a place travels in one 64-bit word: 16 bits of region, 48 of offset */
#define MAX_REGION_BYTES (UINT64_C(1) << 47)

bool group_find_place(ultraepGroup_t group, const void *start, uint64_t bytes, groupPlace_t *place) {
  uintptr_t first = (uintptr_t)start;
  for (int i = 0; i < group->nRegions; i++) {
    const groupRegion_t *region = &group->regions[i];
    uintptr_t base = (uintptr_t)region->base;
    if (!region->base || first < base || first - base > region->bytes) continue;
    if (bytes > region->bytes - (first - base)) continue;
    *place = (groupPlace_t){.region = i, .offset = first - base};
    return true;
  }
  return false;
}

static bool memory_overlaps(ultraepGroup_t group, const void *ptr, size_t bytes) {
  uintptr_t first = (uintptr_t)ptr;
  for (int i = 0; i < group->nRegions; i++) {
    uintptr_t base = (uintptr_t)group->regions[i].base;
    if (base && first < base + group->regions[i].bytes && base < first + bytes) return true;
  }
  return false;
}

/* The lowest free number: ranks that make and free regions in the same order agree on it. */
static ultraepResult_t memory_take_number(ultraepGroup_t group, int *number) {
  for (int i = 0; i < group->nRegions; i++)
    if (!group->regions[i].base) {
      *number = i;
      return ultraepSuccess;
    }
  if (group->nRegions == MAX_REGIONS)
    return error_set(ultraepInvalidUsage, "a group has at most %d regions", MAX_REGIONS);
  unsigned char **peers = calloc((size_t)group->nRanks, sizeof(*peers));
  groupRegion_t *regions = realloc(group->regions, ((size_t)group->nRegions + 1) * sizeof(*regions));
  if (regions) group->regions = regions;
  if (!peers || !regions) {
    free(peers);
    return error_set(ultraepSystemError, "no memory for the table of regions");
  }
  *number = group->nRegions++;
  group->regions[*number] = (groupRegion_t){.peers = peers};
  return ultraepSuccess;
}

static ultraepResult_t memory_create(ultraepGroup_t group, void *ptr, size_t bytes, int *number) {
  if (bytes == 0 || bytes > MAX_REGION_BYTES)
    return error_set(ultraepInvalidArgument, "bytes is %zu: must be in 1..2^47", bytes);
  ultraepResult_t result = memory_take_number(group, number);
  return result == ultraepSuccess ? group->backend->memCreate(group, *number, ptr, bytes) : result;
}

ultraepResult_t ultraepMemAlloc(ultraepGroup_t group, void **ptr, size_t bytes) {
  ultraepResult_t result = group_enter(group, PHASE);
  if (result != ultraepSuccess) return result;
  if (!ptr) return error_set(ultraepInvalidArgument, "ptr is null");
  int number;
  result = memory_create(group, NULL, bytes, &number);
  if (result == ultraepSuccess) *ptr = group->regions[number].base;
  return result;
}

ultraepResult_t ultraepMemRegister(ultraepGroup_t group, void *ptr, size_t bytes) {
  ultraepResult_t result = group_enter(group, PHASE);
  if (result != ultraepSuccess) return result;
  if (!ptr) return error_set(ultraepInvalidArgument, "ptr is null");
  if ((uintptr_t)ptr % 16 != 0)
    return error_set(ultraepInvalidArgument, "ptr = %p is not aligned to 16 bytes", ptr);
  if (bytes > UINTPTR_MAX - (uintptr_t)ptr)
    return error_set(ultraepInvalidArgument, "ptr = %p has no room for %zu bytes", ptr, bytes);
  if (memory_overlaps(group, ptr, bytes))
    return error_set(ultraepInvalidArgument, "[%p, +%zu) overlaps a region of the group", ptr, bytes);
  int number;
  return memory_create(group, ptr, bytes, &number);
}

ultraepResult_t ultraepMemFree(ultraepGroup_t group, void *ptr) {
  ultraepResult_t result = group_enter(group, PHASE);
  if (result != ultraepSuccess) return result;
  if (!ptr) return error_set(ultraepInvalidArgument, "ptr is null");
  for (int i = 0; i < group->nRegions; i++) {
    if (group->regions[i].base != ptr) continue;
    result = group->backend->memDestroy(group, i);
    if (result == ultraepSuccess) group_drop_layers(group, i);
    return result;
  }
  return error_set(ultraepInvalidArgument, "ptr = %p is not the start of a region of the group", ptr);
}
