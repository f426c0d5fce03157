/* What the parts of the NCCL that is not there share:
 *
 *   nccl.c       communicators and how they begin and end, host calls that ranks make together, windows,
 * memory nccl_p2p.c   meetings of ranks, operations and their tasks in streams, groups
 *
 * Ranks are threads of one process. One lock is over all state; what is copied is copied without it. A thread
 * that waits does so for its own communicator, so that an abort wakes this rank's waits and no others. */
#ifndef ULTRAEP_TESTS_NCCL_EMULATED_H_
#define ULTRAEP_TESTS_NCCL_EMULATED_H_

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NCCL_EXPORT __attribute__((visibility("default")))
/* The name that NCCL's profiling interface has for a function. */
#define NCCL_TWIN(name) extern __typeof__(name) p##name __attribute__((alias(#name), visibility("default")))

enum { /* ncclResult_t */
       NCCL_SUCCESS,
       NCCL_CUDA_ERROR,
       NCCL_SYSTEM_ERROR,
       NCCL_INTERNAL_ERROR,
       NCCL_INVALID_ARGUMENT,
       NCCL_INVALID_USAGE,
       NCCL_REMOTE_ERROR,
       NCCL_IN_PROGRESS
};

typedef struct ncclComm *ncclComm_t;
typedef struct ncclWindow_vidmem *ncclWindow_t;
typedef struct ncclMeeting ncclMeeting_t;

/* What ranks do together: operations in streams, then host calls. */
typedef enum {
  NCCL_ALL_GATHER,
  NCCL_ALL_REDUCE,
  NCCL_BROADCAST,
  NCCL_ALL_TO_ALL,
  NCCL_GATHER,
  NCCL_SCATTER,
  NCCL_SEND,
  NCCL_RECV,
  NCCL_INIT,
  NCCL_SPLIT,
  NCCL_REGISTER,
  NCCL_FINALIZE /* each rank on its own, but it waits, too */
} ncclKind_t;

/* A host call that waits for other ranks: made at once or at the end of the thread's group. */
typedef struct ncclJob {
  struct ncclJob *next;
  ncclKind_t kind;
  ncclComm_t comm, child; /* both held; child: of a split with a colour, else null */
  ncclComm_t *out;        /* where the program has the new communicator, else null */
  int colour, key;
  void *buffer; /* of a window, null: memory that has none */
  size_t bytes;
  ncclWindow_t *window, made;
  pthread_t thread;
  int result;
} ncclJob_t;

typedef struct {
  ncclKind_t kind;
  const void *send;
  void *recv;
  size_t count;
  int type, root; /* root: the peer of a send or receive; the operator of a reduction */
  ncclJob_t *job; /* of a host call */
} ncclOp_t;

/* A rank's part in a meeting. */
typedef struct {
  ncclComm_t comm; /* null: it has not come */
  const ncclOp_t *op;
} ncclPlace_t;

/* What the communicators of all ranks have in common. */
typedef struct ncclWorld {
  struct ncclWorld *next; /* while ranks may still come */
  uint64_t id;
  int nRanks, nTaken, nUsers;
  ncclMeeting_t *meetings;
  bool taken[];
} ncclWorld_t;

struct ncclComm {
  struct ncclComm *next; /* while it is listed */
  uint64_t serial;       /* never used again: tasks find their communicator by it, or find it gone */
  int nHolders;          /* the list, calls, tasks: the last one frees it */
  ncclWorld_t *world;    /* null: a child that is not there yet */
  int rank, device;
  bool isBlocking, isConnected, isListed, isAborted, isFinalized;
  int result;          /* ncclCommGetAsyncError */
  int nJobs, nRunning; /* host calls and tasks that an abort waits for */
  ncclComm_t via;      /* in whose meeting this child is made now */
  /* Tasks that were not captured start in the order of their calls, whichever stream they are in. */
  uint64_t issued, started, finished;
  uint64_t nCollectives, nHostCalls, *nSent, *nReceived; /* of the next one; by peer */
  pthread_mutex_t order;                                 /* of calls: taken before ncclLock */
  pthread_cond_t changed;
  ncclWindow_t windows;
};

#pragma GCC visibility push(hidden)

extern pthread_mutex_t ncclLock;
extern ncclComm_t ncclListed; /* communicators that calls find; under the lock */

void nccl_lock(void);
void nccl_unlock(void);

/* Zeroed memory; where there is none, the test ends. */
void *nccl_need(size_t n, size_t bytes);
/* Returns result, and keeps the text for ncclGetLastError. */
int nccl_fail(int result, const char *text);
/* An error before "in progress" before success. */
int nccl_worse(int one, int other);

/* ---- nccl.c; with the lock held ---- */

/* Holds the communicator, if it is one and there; false otherwise. */
bool nccl_comm_hold(ncclComm_t comm);
/* The same by its serial; null if it is gone. */
ncclComm_t nccl_comm_find(uint64_t serial);
void nccl_comm_drop(ncclComm_t comm);
/* What all ranks have called, when all have come. */
int nccl_host_perform(const ncclPlace_t *places, int n);

/* ---- nccl.c; without the lock ---- */

/* Holds a communicator that can be used now, or says why it cannot be. */
int nccl_comm_use(ncclComm_t comm);
/* Holds it no longer. */
void nccl_comm_release(ncclComm_t comm);
/* Makes the calls of a list, each in a thread of its own if there are several or it does not block. Takes the
 * list. */
int nccl_jobs_run(ncclJob_t *jobs);
/* A call of its own, or a part of the thread's group. Takes what the caller holds of the communicators. */
int nccl_job_issue(ncclJob_t content);
/* The calls are not made: the communicators that they were to make end. */
void nccl_jobs_cancel(ncclJob_t *jobs);

/* ---- nccl_memory.c; with the lock held ---- */

/* Every rank's window in its job, when all ranks' memory is symmetric; else none. */
void nccl_windows_make(const ncclPlace_t *places, int n);
/* Gives the window to the communicator. */
void nccl_window_add(ncclComm_t comm, ncclWindow_t window);
void nccl_windows_free(ncclComm_t comm);
void nccl_window_free(ncclWindow_t window);

/* ---- nccl_p2p.c ---- */

/* Meets the other ranks for each of the operations: counts them, then waits until all are done. With the lock
 * held, but not all the time. */
int nccl_ops_run(ncclComm_t comm, const ncclOp_t *ops, int n);
void nccl_group_enter(void);
/* Adds to the thread's group, takes the job. */
void nccl_group_add_job(ncclJob_t *job);
/* An error in a group ends the group. Returns the error. */
int nccl_group_fail(int result);
/* The end of the outermost group does what was added. */
int nccl_group_leave(void);

#pragma GCC visibility pop

#endif
