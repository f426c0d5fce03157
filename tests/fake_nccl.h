/* A stand-in for NCCL in tests without GPUs: the real names, weak with pnccl twins as NCCL's are, which
 * record what they were called with, in one record for all threads. The first communicator loads the library
 * in NCCL_TUNER_PLUGIN as tuner, the last one closes it, as NCCL does. */
#ifndef ULTRAEP_TESTS_FAKE_NCCL_H_
#define ULTRAEP_TESTS_FAKE_NCCL_H_

#include <stddef.h>

int ncclSend(const void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int ncclRecv(void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int ncclGroupStart(void);
int ncclGroupEnd(void);
int ncclAlltoAll(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
int ncclCommInitRank(void **comm, int nRanks, int rank);
int ncclCommDestroy(void *comm);
int ncclCommAbort(void *comm);
int ncclCommFinalize(void *comm);
int ncclCommCount(const void *comm, int *count);
int ncclCommUserRank(const void *comm, int *rank);

struct fake_call {
  const char *name;
  const void *send;
  void *recv;
  size_t count;
  int type, peer;
  void *comm, *stream;
};

/* What the last call was given, how many there were, how deep groups are nested, what calls are to return,
 * how many log lines there were and the last of them. */
struct fake_state {
  struct fake_call last;
  long calls;
  int depth, result, lines;
  char line[512];
};
struct fake_state *fake_nccl_state(void);
/* The logger, as NCCL gives it to plugins. */
void fake_nccl_log(int level, unsigned long subsystems, const char *where, int line, const char *format, ...);

#endif
