/* A stand-in for NCCL in tests without GPUs: the real names, weak with pnccl twins as NCCL's are, which
 * record what they were called with, in one record for all threads. Every communicator loads the libraries in
 * NCCL_TUNER_PLUGIN and NCCL_PROFILER_PLUGIN and uses their tables of the versions in FAKE_NCCL_TUNER (5, 6)
 * and FAKE_NCCL_PROFILER (1 to 7; by default 7); the last one closes them, as NCCL does. Operations reach the
 * profiler when the thread's outermost group ends. */
#ifndef ULTRAEP_TESTS_FAKE_NCCL_H_
#define ULTRAEP_TESTS_FAKE_NCCL_H_

#include <stddef.h>
#include <stdint.h>

typedef struct {
  char bytes[128];
} fake_id;

/* The front of ncclConfig_t: null for the defaults. NCCL_COMM_BLOCKING goes first, as with NCCL. */
struct fake_config {
  size_t size;
  unsigned magic, version;
  int blocking;
};
#define FAKE_CONFIG(value)                                                                                   \
  { .size = sizeof(struct fake_config), .magic = 0xcafebeef, .version = 23007, .blocking = (value) }

enum { FAKE_SUCCESS, FAKE_INVALID = 4, FAKE_IN_PROGRESS = 7, FAKE_NO_COLOUR = -1 };

int ncclSend(const void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int ncclRecv(void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int ncclGroupStart(void);
int ncclGroupEnd(void);
/* Its operations are not told to the profiler. */
int ncclGroupSimulateEnd(void *info);
int ncclAllReduce(const void *send, void *recv, size_t count, int type, int op, void *comm, void *stream);
int ncclAlltoAll(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
int ncclGather(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream);
int ncclScatter(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream);
int ncclPutSignal(const void *buffer, size_t count, int type, int peer, void *window, size_t offset,
                  int signal, int context, unsigned flags, void *comm, void *stream);
int ncclCommInitRank(void **comm, int nRanks, fake_id id, int rank);
int ncclCommInitRankConfig(void **comm, int nRanks, fake_id id, int rank, void *config);
int ncclCommInitRankScalable(void **comm, int nRanks, int rank, int nIds, const fake_id *ids, void *config);
int ncclCommInitAll(void **comms, int nDevices, const int *devices);
/* In a group, and from a non-blocking parent, *comm comes later. A split outside of groups returns in
 * progress then, or, with state.lateSuccess, success, as NCCL's does. */
int ncclCommSplit(void *parent, int colour, int key, void **comm, void *config);
int ncclCommShrink(void *parent, int *excluded, int nExcluded, void **comm, void *config, int flags);
int ncclCommGrow(void *parent, int nRanks, const fake_id *id, int rank, void **comm, void *config);
/* Of a non-blocking communicator: in progress state.polls times after it was made and once after each
 * operation, then done. As NCCL's, not for two threads at a time. Operations ask it by its public name, as
 * NCCL's do, and fail while it says in progress. */
int ncclCommGetAsyncError(void *comm, int *error);
int ncclCommDestroy(void *comm);
int ncclCommAbort(void *comm);
int ncclCommFinalize(void *comm);
int ncclCommRevoke(void *comm, int flags);
/* Fail for a non-blocking communicator that is busy. */
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
 * how many log lines there were and the last of them; where splits find the size and the rank of theirs; how
 * new non-blocking communicators come out, and after how many questions; whether one from unique ids is ready
 * only when all of its ranks have called, as NCCL's: then ranks need threads, a group or not to block. */
struct fake_state {
  struct fake_call last;
  long calls;
  int depth, result, lines, comms;
  char line[512];
  int childRanks, childRank;
  int polls, initError, lateSuccess, awaitsRanks;
};
struct fake_state *fake_nccl_state(void);
/* state.calls, while other threads call. */
long fake_nccl_calls(void);
/* The logger, as NCCL gives it to plugins. */
void fake_nccl_log(int level, unsigned long subsystems, const char *where, int line, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
/* The id that it tells plugins. */
uint64_t fake_nccl_hash(const void *comm);
/* What its profiler knows the communicator by; null without one. */
void *fake_nccl_context(const void *comm);

#endif
