/* Events of NCCL's profiler interface in all table versions: what the traffic record wants of them, and one
 * version in terms of an older one, for a profiler library that has only that. */
#ifndef ULTRAEP_PROFILER_EVENT_H_
#define ULTRAEP_PROFILER_EVENT_H_

#include "nccl_profiler_abi.h"

typedef struct {
  uint64_t type;
  const void *parent; /* handle; what it was up to v4 */
  /* Of sends and receives alone: */
  bool isSend, isRecv; /* neither: some other type */
  int peer, rank;
  uint64_t bytes;
  uint64_t commHash; /* 0 from v4 on: init was told */
} profiler_facts_t;

/* version: of the event, 1 to 7. */
void profiler_event_read(int version, const void *event, profiler_facts_t *facts);

typedef union {
  nccl_abi_event_v1_t v1;
  nccl_abi_event_v2_t v2;
  nccl_abi_event_v3_t v3;
  nccl_abi_event_v4_t v4;
  nccl_abi_event_v5_t v5;
  nccl_abi_event_v6_t v6;
  nccl_abi_event_v7_t v7;
} profiler_event_t;

/* Writes the event in terms of an older version. False where that has no such event. The communicator's name
 * and id are for versions up to 3, where from is a newer one. */
bool profiler_event_convert(int from, int to, const void *event, const char *commName, uint64_t commHash,
                            profiler_event_t *converted);

typedef union {
  nccl_abi_state_v1_t v1;
  nccl_abi_state_v4_t v4;
} profiler_state_t;

/* The same for a state and its arguments (may be null, and stay so). Sets *converted to what to pass on. */
bool profiler_state_convert(int from, int to, int state, void *arguments, profiler_state_t *memory,
                            void **converted);

/* Whether a profiler with that mask is given events of that type: it asks for it, or for one that is a child
 * of it. */
bool profiler_event_is_wanted(uint64_t type, int mask);

#endif
