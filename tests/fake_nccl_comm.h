/* What the files of the fake NCCL share: its communicator, and its plugins. */
#ifndef ULTRAEP_TESTS_FAKE_NCCL_COMM_H_
#define ULTRAEP_TESTS_FAKE_NCCL_COMM_H_

#include "fake_nccl.h"
#include "plugin_events.h"

struct fake_comm {
  char front[5000]; /* the contexts lie far behind the handle, as NCCL's do */
  struct nccl_profiled profiled;
  void *tunerContext;
  char back[3000];
  int rank, nRanks;
  int blocking, busy, error; /* busy: answers until it is ready; error: how it is then */
  int nChildren;
  int awaits; /* it is not ready before all of its ranks have called */
  uint64_t hash;
};

void fake_plugins_open(struct fake_comm *comm);
void fake_plugins_close(struct fake_comm *comm);
/* The thread has issued an operation; in a group it is told at the group's end. Thread-safe. */
void fake_operation(struct fake_comm *comm, int kind, size_t count, int type, int peer);
void fake_group_enter(void);
/* Returns how deep the thread still is. */
int fake_group_leave(void);
int fake_group_depth(void);
/* The operations that the thread has issued in its group are not told. */
void fake_group_drop(void);

#endif
