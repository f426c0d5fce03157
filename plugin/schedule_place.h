/* Memory of groups that do not fit the kernel's argument: pinned, one place a group, until no launch reads it
 * any more. There are as many places as there are such groups under way, and captured ones whose graphs
 * live. */
#ifndef ULTRAEP_SCHEDULE_PLACE_H_
#define ULTRAEP_SCHEDULE_PLACE_H_

#include "kernel_p2p.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>

typedef struct schedulePlace schedulePlace_t;

/* A copy of the group in a place, which *group then points to; null where memory is short. captured: the
 * stream's graph, and what is instantiated from it, keeps the place. */
schedulePlace_t *schedule_place_take(schedulePlace_t **places, kernelP2pGroup_t *group, cudaStream_t stream,
                                     bool captured);
/* After the launch: not of a captured one. */
cudaError_t schedule_place_launched(schedulePlace_t *place, cudaStream_t stream);
/* All of them; no kernel reads them, unless isStuck. Graphs that live may be destroyed later. */
void schedule_places_free(schedulePlace_t *places, bool isStuck);

#endif
