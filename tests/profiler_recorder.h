/* Another profiler library, which events are handed on to: it has the table of one version alone, and says
 * what it was called with. RECORDER_MASK in the environment is its mask, RECORDER_FAIL=1 makes its init fail.
 */
#ifndef ULTRAEP_TESTS_PROFILER_RECORDER_H_
#define ULTRAEP_TESTS_PROFILER_RECORDER_H_

#include "plugin_events.h"

struct recorder_log {
  int version;
  int inits, finalizes, contexts; /* contexts: open */
  long starts[EVENT_TYPES], stops, states;
  long open;         /* events that were started and not stopped */
  char error[200];   /* the first thing that no profiler could live with */
  uint64_t initHash; /* of the last init; 0 up to v3 */
  int initRank;
  int *mask; /* where its mask is */
  /* Of the last send or receive. */
  char function[16], type[16];
  uint64_t count, hash;
  int peer, rank;
  void *context, *parent;
};

#endif
