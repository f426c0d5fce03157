/* The profiler library that ULTRAEP_PROFILER_FORWARD names: NCCL loads only one, so this one hands it every
 * event it would get from NCCL, with its own contexts and handles. Its newest table not newer than NCCL's is
 * used; events are put in that table's terms where it is older. */
#ifndef ULTRAEP_PROFILER_FORWARD_H_
#define ULTRAEP_PROFILER_FORWARD_H_

#include "profiler_event.h"

/* What NCCL's table's init was told; 0 and null up to v3. */
typedef struct {
  int version; /* of the table that NCCL uses */
  const char *commName;
  uint64_t commHash;
  int nNodes, nRanks, rank;
  nccl_abi_logger_t logger;
} profiler_init_t;

/* One rank of one communicator, at the other library. */
typedef struct {
  bool isOpen;
  void *context;
  const char *commName;
  uint64_t commHash;
} profiler_forward_t;

/* The first call loads the library. What goes wrong is a line on stderr; then no event goes there. */
void profiler_forward_init(profiler_forward_t *forward, const profiler_init_t *init);
void profiler_forward_finalize(profiler_forward_t *forward);
/* What the other library asks for now; 0 where there is none. */
int profiler_forward_mask(void);

/* forward: null where the context that came with the event is not of this process. */
void profiler_forward_start(const profiler_forward_t *forward, int version, const profiler_facts_t *facts,
                            void *event, void **handle);
void profiler_forward_stop(void *handle);
void profiler_forward_state(int version, void *handle, int state, void *arguments);

#endif
