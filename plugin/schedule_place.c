#include "schedule_place.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { PLACE_BYTES = 64 << 10 }; /* at least, so that most groups fit any */

/* What a place and a graph that reads it share: the graph may end before or after the place. */
typedef struct {
  atomic_int owners;
  atomic_bool isRead;
} place_kept_t;

struct schedulePlace {
  char *memory;
  size_t bytes;
  cudaEvent_t done;   /* after the last launch that was not captured */
  place_kept_t *kept; /* by the last captured one; null: by none */
  struct schedulePlace *next;
};

static void place_kept_release(place_kept_t *kept) {
  if (kept && atomic_fetch_sub(&kept->owners, 1) == 1) free(kept);
}

/* CUDA calls it, in a thread of its own, when nothing is left of the graph. */
static void CUDART_CB place_graph_ended(void *argument) {
  place_kept_t *kept = argument;

  atomic_store(&kept->isRead, false);
  place_kept_release(kept);
}

static cudaError_t place_graph(cudaStream_t stream, cudaGraph_t *graph) {
  enum cudaStreamCaptureStatus status;
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, &status, NULL, graph, NULL, NULL, NULL);
#else
  return cudaStreamGetCaptureInfo_v2(stream, &status, NULL, graph, NULL, NULL);
#endif
}

/* The graph that is being captured reads the place as long as it lives: for ever, where it cannot tell. */
static bool place_keep(schedulePlace_t *place, cudaStream_t stream) {
  place_kept_t *kept = calloc(1, sizeof(*kept));
  cudaGraph_t graph = NULL;
  cudaUserObject_t object;

  if (!kept) return false;
  atomic_store(&kept->owners, 2);
  atomic_store(&kept->isRead, true);
  place_kept_release(place->kept);
  place->kept = kept;
  if (place_graph(stream, &graph) != cudaSuccess || !graph ||
      cudaUserObjectCreate(&object, kept, place_graph_ended, 1, cudaUserObjectNoDestructorSync) !=
          cudaSuccess) {
    atomic_store(&kept->owners, 1);
    return true;
  }
  if (cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) == cudaSuccess) return true;
  (void)cudaUserObjectRelease(object, 1); /* it says that nothing reads the place: nothing does yet */
  return false;
}

static bool place_is_free(const schedulePlace_t *place) {
  if (place->kept && atomic_load(&place->kept->isRead)) return false;
  return cudaEventQuery(place->done) == cudaSuccess;
}

static schedulePlace_t *place_make(schedulePlace_t **places, size_t bytes) {
  schedulePlace_t *place = calloc(1, sizeof(*place));

  if (!place) return NULL;
  place->bytes = bytes > PLACE_BYTES ? bytes : PLACE_BYTES;
  if (cudaHostAlloc((void **)&place->memory, place->bytes, 0) != cudaSuccess) goto free_place;
  if (cudaEventCreateWithFlags(&place->done, cudaEventDisableTiming) != cudaSuccess) goto free_memory;
  place->next = *places;
  *places = place;
  return place;

free_memory:
  (void)cudaFreeHost(place->memory);
free_place:
  free(place);
  return NULL;
}

schedulePlace_t *schedule_place_take(schedulePlace_t **places, kernelP2pGroup_t *group, cudaStream_t stream,
                                     bool captured) {
  const size_t lanes = (size_t)group->nLanes * sizeof(kernelP2pLane_t);
  const size_t first = (lanes + 15) / 16 * 16, ops = (size_t)group->nOps * sizeof(kernelP2pOp_t);
  schedulePlace_t *place = *places;

  while (place && (place->bytes < first + ops || !place_is_free(place))) place = place->next;
  if (!place) place = place_make(places, first + ops);
  if (!place || (captured && !place_keep(place, stream))) return NULL;
  memcpy(place->memory, group->lanes, lanes);
  memcpy(place->memory + first, group->ops, ops);
  group->lanes = (const kernelP2pLane_t *)place->memory;
  group->ops = (const kernelP2pOp_t *)(place->memory + first);
  return place;
}

cudaError_t schedule_place_launched(schedulePlace_t *place, cudaStream_t stream) {
  return cudaEventRecord(place->done, stream);
}

void schedule_places_free(schedulePlace_t *places, bool isStuck) {
  while (places) {
    schedulePlace_t *place = places;

    places = place->next;
    if (!isStuck) (void)cudaFreeHost(place->memory);
    (void)cudaEventDestroy(place->done);
    place_kept_release(place->kept);
    free(place);
  }
}
