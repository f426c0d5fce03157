/* Makes the library of ultraep_perf or ultraep_moe wrong: linked into a second one, these calls stand in for
 * the library's, call them, and then damage one byte. PERF_CORRUPT names what: dispatch, combine, weights; or
 * error: rank 1's combine fails; unweighted: a combine that should weigh does not; grads: replicas' gradients
 * are not added. */
#include "ultraep.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static bool corrupt_wanted(const char *what) {
  const char *wanted = getenv("PERF_CORRUPT");
  return wanted != NULL && strcmp(wanted, what) == 0;
}

/* The library's own function. */
static void *corrupt_next(const char *name) {
  void *next = dlsym(RTLD_NEXT, name);
  if (next == NULL) abort();
  return next;
}

/* The first row that a segment of the route holds, -1 for none. */
static int64_t corrupt_row(ultraepRoute_t route) {
  ultraepSegments_t segments;
  if (ultraepRouteSegments(route, &segments) != ultraepSuccess) return -1;
  for (int32_t i = 0; i < segments.nSegments; i++) {
    if (segments.rows[i] > 0) return segments.firstRow[i];
  }
  return -1;
}

__attribute__((visibility("default"))) ultraepResult_t ultraepAllToAll(const void *sendbuff, void *recvbuff,
                                                                       ultraepDirection_t direction,
                                                                       ultraepRoute_t route,
                                                                       cudaStream_t stream) {
  ultraepResult_t (*next)(const void *, void *, ultraepDirection_t, ultraepRoute_t, cudaStream_t);
  *(void **)&next = corrupt_next("ultraepAllToAll");
  if (direction == ULTRAEP_COMBINE && corrupt_wanted("error")) {
    ultraepSegments_t segments;
    ultraepResult_t result = ultraepRouteSegments(route, &segments);
    if (result == ultraepSuccess && segments.expert[0] > 0) return ultraepInternalError;
  }
  bool weighted = direction != ULTRAEP_COMBINE || !corrupt_wanted("unweighted");
  ultraepResult_t result =
      next(sendbuff, recvbuff, weighted ? direction : ULTRAEP_COMBINE_SUM, route, stream);
  int64_t row = corrupt_row(route);
  if (result != ultraepSuccess || row < 0) return result;
  if (direction == ULTRAEP_DISPATCH && corrupt_wanted("dispatch")) {
    ((unsigned char *)recvbuff)[row * 512 + 511] ^= 0x80; /* rows of 256 bfloat16 */
  }
  if (direction == ULTRAEP_COMBINE && corrupt_wanted("combine")) ((unsigned char *)recvbuff)[100] ^= 1;
  return result;
}

__attribute__((visibility("default"))) ultraepResult_t ultraepWeightsSync(ultraepRoute_t route, int layer,
                                                                          cudaStream_t stream) {
  ultraepResult_t (*next)(ultraepRoute_t, int, cudaStream_t);
  *(void **)&next = corrupt_next("ultraepWeightsSync");
  ultraepResult_t result = next(route, layer, stream);
  ultraepSegments_t segments;
  if (result != ultraepSuccess || !corrupt_wanted("weights")) return result;
  if (ultraepRouteSegments(route, &segments) != ultraepSuccess) return result;
  /* The slots come last: the last segment with an expert is a replica, where there is one. */
  for (int32_t i = segments.nSegments - 1; i >= 0; i--) {
    if (segments.expert[i] < 0) continue;
    ((unsigned char *)segments.weights[0][i])[9] ^= 1;
    break;
  }
  return result;
}

__attribute__((visibility("default"))) ultraepResult_t ultraepGradsReduce(ultraepRoute_t route, int layer,
                                                                          cudaStream_t stream) {
  ultraepResult_t (*next)(ultraepRoute_t, int, cudaStream_t);
  *(void **)&next = corrupt_next("ultraepGradsReduce");
  return corrupt_wanted("grads") ? ultraepSuccess : next(route, layer, stream);
}
