/* Worlds: how the threads that are ranks find each other. A rank's k-th group is every other rank's k-th
 * group. */
#include "host.h"

#include <stdlib.h>

#define WORLD_MAGIC 0x75657077u

struct ultraepHostWorld {
  uint32_t magic;
  int nRanks;
  pthread_mutex_t lock;
  int64_t *nGroups;     /* [R] groups that each rank has joined */
  hostShared_t *shared; /* groups that some rank has not joined or not left yet */
};

static void world_shared_free(hostShared_t *shared) {
  for (int r = 0; r < shared->nRanks; r++) host_window_free(&shared->windows[r]);
  free(shared->windows);
  free(shared);
}

static ultraepResult_t world_shared_make(int nRanks, int64_t index, hostShared_t **shared) {
  hostShared_t *made = calloc(1, sizeof(*made));
  if (!made) goto fail;
  made->windows = calloc((size_t)nRanks, sizeof(*made->windows));
  if (!made->windows) goto free_shared;
  made->index = index;
  for (; made->nRanks < nRanks; made->nRanks++)
    if (host_window_make(&made->windows[made->nRanks], nRanks) != ultraepSuccess) goto free_windows;
  *shared = made;
  return ultraepSuccess;

free_windows:
  world_shared_free(made);
  return ultraepSystemError;
free_shared:
  free(made);
fail:
  return error_set(ultraepSystemError, "no memory for the windows of %d ranks", nRanks);
}

static ultraepResult_t world_check(ultraepHostWorld_t world) {
  if (!world) return error_set(ultraepInvalidArgument, "world is null");
  if (world->magic != WORLD_MAGIC)
    return error_set(ultraepInvalidArgument, "%p is not a world", (void *)world);
  return ultraepSuccess;
}

ultraepResult_t ultraepHostWorldCreate(ultraepHostWorld_t *world, int nRanks) {
  if (!world) return error_set(ultraepInvalidArgument, "world is null");
  if (nRanks < 1 || nRanks > ULTRAEP_MAX_RANKS)
    return error_set(ultraepInvalidArgument, "nRanks is %d: must be in 1..%d", nRanks, ULTRAEP_MAX_RANKS);
  ultraepHostWorld_t made = calloc(1, sizeof(*made));
  if (!made) goto fail;
  made->nGroups = calloc((size_t)nRanks, sizeof(*made->nGroups));
  if (!made->nGroups) goto free_world;
  if (pthread_mutex_init(&made->lock, NULL) != 0) goto free_counts;
  made->magic = WORLD_MAGIC;
  made->nRanks = nRanks;
  *world = made;
  return ultraepSuccess;

free_counts:
  free(made->nGroups);
free_world:
  free(made);
fail:
  return error_set(ultraepSystemError, "no memory for a world of %d ranks", nRanks);
}

ultraepResult_t ultraepHostWorldDestroy(ultraepHostWorld_t world) {
  ultraepResult_t result = world_check(world);
  if (result != ultraepSuccess) return result;
  int nPresent = 0;
  pthread_mutex_lock(&world->lock);
  for (hostShared_t *s = world->shared; s; s = s->next) nPresent += s->nPresent;
  pthread_mutex_unlock(&world->lock);
  if (nPresent > 0)
    return error_set(ultraepInvalidUsage, "the world has groups on %d ranks: destroy them first", nPresent);
  while (world->shared) { /* groups that some rank never joined */
    hostShared_t *shared = world->shared;
    world->shared = shared->next;
    world_shared_free(shared);
  }
  pthread_mutex_destroy(&world->lock);
  free(world->nGroups);
  world->magic = 0;
  free(world);
  return ultraepSuccess;
}

ultraepResult_t host_world_join(ultraepHostWorld_t world, int rank, hostShared_t **shared) {
  ultraepResult_t result = ultraepSuccess;
  pthread_mutex_lock(&world->lock);
  int64_t index = world->nGroups[rank];
  hostShared_t *found = world->shared;
  while (found && found->index != index) found = found->next;
  if (!found) {
    result = world_shared_make(world->nRanks, index, &found);
    if (result != ultraepSuccess) goto unlock;
    found->next = world->shared;
    world->shared = found;
  }
  world->nGroups[rank]++;
  found->nJoined++;
  found->nPresent++;
  *shared = found;
unlock:
  pthread_mutex_unlock(&world->lock);
  return result;
}

void host_world_leave(ultraepHostWorld_t world, hostShared_t *shared) {
  pthread_mutex_lock(&world->lock);
  bool last = --shared->nPresent == 0 && shared->nJoined == shared->nRanks;
  if (last) {
    hostShared_t **link = &world->shared;
    while (*link != shared) link = &(*link)->next;
    *link = shared->next;
  }
  pthread_mutex_unlock(&world->lock);
  if (last) world_shared_free(shared);
}

ultraepResult_t host_world_check(ultraepHostWorld_t world, int rank, int *nRanks) {
  ultraepResult_t result = world_check(world);
  if (result != ultraepSuccess) return result;
  if (rank < 0 || rank >= world->nRanks)
    return error_set(ultraepInvalidArgument, "rank is %d: must be in 0..%d", rank, world->nRanks - 1);
  *nRanks = world->nRanks;
  return ultraepSuccess;
}
