/* The calls that make communicators: the originals, and each new communicator's id (comm_id.h). */
#include "comm_id.h"
#include "p2p.h"
#include "schedule.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { COMM_NO_COLOUR = -1 };               /* of a split: the rank gets no communicator */
enum { COMM_KIND_SPLIT, COMM_KIND_SHRINK }; /* what a child's id is made of, besides the colour */

/* A communicator that is asked for and not there yet: NCCL will put its handle where the caller said, and
 * that place is the caller's until it is told that all is done, by the group's end or, from a non-blocking
 * parent, by ncclCommGetAsyncError. */
typedef struct comm_awaited {
  void **place;
  uint64_t id;
  const void *parent;
  const void *thread; /* in whose group it is asked for; null: the parent says when */
  struct comm_awaited *next;
} comm_awaited_t;

static pthread_mutex_t commAwaitedLock = PTHREAD_MUTEX_INITIALIZER;
static comm_awaited_t *commAwaited;
static atomic_int commAwaitedCount;
static _Thread_local char commThread; /* its address names the thread */

static void comm_awaited_add(void **place, uint64_t id, const void *parent, const void *thread) {
  comm_awaited_t *awaited = calloc(1, sizeof(*awaited));

  if (!awaited) return;
  *awaited = (comm_awaited_t){.place = place, .id = id, .parent = parent, .thread = thread};
  pthread_mutex_lock(&commAwaitedLock);
  awaited->next = commAwaited;
  commAwaited = awaited;
  atomic_fetch_add(&commAwaitedCount, 1);
  pthread_mutex_unlock(&commAwaitedLock);
}

/* ---- for schedule.h: ready communicators that this thread's group has made ---- */
enum { COMM_READY = 64 }; /* further ones are left to NCCL, on all ranks alike */
static _Thread_local struct {
  void *comms[COMM_READY];
  int n;
} commReady;

static void comm_ready_add(void *comm) {
  if (comm && commReady.n < COMM_READY) commReady.comms[commReady.n++] = comm;
}
static void comm_ready_end(bool isReady) {
  int n = commReady.n;

  commReady.n = 0;
  if (isReady && n > 0) schedule_comms_made(commReady.comms, n);
}

static void comm_awaited_done(comm_awaited_t *awaited, int result) {
  if (result == P2P_NCCL_SUCCESS && awaited->id != 0) comm_id_set(*awaited->place, awaited->id);
  if (result == P2P_NCCL_SUCCESS && awaited->thread) comm_ready_add(*awaited->place);
  free(awaited);
  atomic_fetch_sub(&commAwaitedCount, 1);
}

/* What the thread's group (thread) or the parent (thread null) now has done, or failed to do. */
static void comm_awaited_end(const void *thread, const void *parent, int result) {
  comm_awaited_t **at = &commAwaited;

  pthread_mutex_lock(&commAwaitedLock);
  while (*at) {
    comm_awaited_t *awaited = *at;

    if (awaited->thread != thread || (!thread && awaited->parent != parent)) {
      at = &awaited->next;
    } else if (result == P2P_NCCL_IN_PROGRESS) {
      awaited->thread = NULL;
      at = &awaited->next;
    } else {
      *at = awaited->next;
      comm_awaited_done(awaited, result);
    }
  }
  pthread_mutex_unlock(&commAwaitedLock);
}

void p2p_comm_group_ended(int result) {
  if (atomic_load_explicit(&commAwaitedCount, memory_order_relaxed) > 0)
    comm_awaited_end(&commThread, NULL, result);
  comm_ready_end(result == P2P_NCCL_SUCCESS);
}

void p2p_comm_forget(const void *comm) {
  if (atomic_load_explicit(&commAwaitedCount, memory_order_relaxed) > 0)
    comm_awaited_end(NULL, comm, P2P_NCCL_INVALID_USAGE);
  comm_id_forget(comm);
}

int p2p_comm_async_error(void *comm, int *error) {
  p2p_error_fn original = (p2p_error_fn)p2p_original(P2P_COMM_ASYNC_ERROR);
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  result = original(comm, error);
  if (result == P2P_NCCL_SUCCESS && *error == P2P_NCCL_SUCCESS) {
    const scheduleComm_t *scheduled = schedule_find(comm);

    if (scheduled) *error = schedule_comm_error(scheduled);
  }
  if (result == P2P_NCCL_SUCCESS && atomic_load_explicit(&commAwaitedCount, memory_order_relaxed) > 0 &&
      *error != P2P_NCCL_IN_PROGRESS) {
    comm_awaited_end(NULL, comm, *error);
  }
  return result;
}

/* ---- from unique ids ---- */
/* An older record at this address is another communicator's, whose end went unseen. */
static void comm_made(const void *comm, uint64_t id) {
  p2p_comm_gone(comm);
  comm_id_set(comm, id);
}

/* The handle is there at once, also in a group and from a non-blocking call. */
static int comm_made_by_ids(int result, void *const *comm, const p2p_unique_id_t *ids, int nIds, int nRanks) {
  if (!p2p_counts() || (result != P2P_NCCL_SUCCESS && result != P2P_NCCL_IN_PROGRESS)) return result;
  if (comm && *comm && ids && nIds > 0)
    comm_made(*comm, comm_id_hash((uint64_t)nRanks, ids, (size_t)nIds * sizeof(*ids)));
  if (comm && result == P2P_NCCL_SUCCESS) comm_ready_add(*comm);
  if (p2p_group_depth() == 0) comm_ready_end(true);
  return result;
}

int p2p_comm_init_rank(void **comm, int nRanks, p2p_unique_id_t id, int rank) {
  p2p_init_rank_fn original = (p2p_init_rank_fn)p2p_original(P2P_COMM_INIT_RANK);

  if (!original) return P2P_NCCL_INVALID_USAGE;
  return comm_made_by_ids(original(comm, nRanks, id, rank), comm, &id, 1, nRanks);
}

int p2p_comm_init_rank_config(void **comm, int nRanks, p2p_unique_id_t id, int rank, void *config) {
  p2p_init_rank_config_fn original = (p2p_init_rank_config_fn)p2p_original(P2P_COMM_INIT_RANK_CONFIG);

  if (!original) return P2P_NCCL_INVALID_USAGE;
  return comm_made_by_ids(original(comm, nRanks, id, rank, config), comm, &id, 1, nRanks);
}

int p2p_comm_init_rank_scalable(void **comm, int nRanks, int rank, int nIds, const p2p_unique_id_t *ids,
                                void *config) {
  p2p_init_rank_scalable_fn original = (p2p_init_rank_scalable_fn)p2p_original(P2P_COMM_INIT_RANK_SCALABLE);

  if (!original) return P2P_NCCL_INVALID_USAGE;
  return comm_made_by_ids(original(comm, nRanks, rank, nIds, ids, config), comm, ids, nIds, nRanks);
}

/* All ranks are here, so any id will do that no other process has. */
static uint64_t comm_id_local(void) {
  static atomic_ullong count;
  struct {
    char host[64];
    long pid;
    unsigned long long count;
    struct timespec time;
  } bytes;

  memset(&bytes, 0, sizeof(bytes));
  (void)gethostname(bytes.host, sizeof(bytes.host));
  bytes.pid = (long)getpid();
  bytes.count = atomic_fetch_add(&count, 1);
  clock_gettime(CLOCK_REALTIME, &bytes.time);
  return comm_id_hash(0, &bytes, sizeof(bytes));
}

int p2p_comm_init_all(void **comms, int nDevices, const int *devices) {
  p2p_init_all_fn original = (p2p_init_all_fn)p2p_original(P2P_COMM_INIT_ALL);
  uint64_t id;
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  result = original(comms, nDevices, devices);
  if (!p2p_counts() || result != P2P_NCCL_SUCCESS || !comms) return result;
  id = comm_id_local();
  for (int i = 0; i < nDevices; i++) {
    comm_made(comms[i], id);
    comm_ready_add(comms[i]);
  }
  if (p2p_group_depth() == 0) comm_ready_end(true);
  return result;
}

/* ---- from other communicators: the handle may come later ---- */
static int comm_made_by_parent(int result, void **comm, const void *parent, uint64_t id) {
  if ((result != P2P_NCCL_SUCCESS && result != P2P_NCCL_IN_PROGRESS) || !comm) return result;
  if (p2p_group_depth() > 0) {
    comm_awaited_add(comm, id, parent, &commThread);
  } else if (result == P2P_NCCL_IN_PROGRESS) {
    comm_awaited_add(comm, id, parent, NULL);
  } else if (*comm) {
    if (id != 0) comm_made(*comm, id);
    comm_ready_add(*comm);
    comm_ready_end(true);
  }
  return result;
}

int p2p_comm_split(void *parent, int colour, int key, void **comm, void *config) {
  p2p_split_fn original = (p2p_split_fn)p2p_original(P2P_COMM_SPLIT);
  uint64_t id;
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  /* Ranks that get none are asked, too, so that all count alike. */
  id = comm_id_child(parent, (uint64_t)(uint32_t)colour << 8 | COMM_KIND_SPLIT);
  result = original(parent, colour, key, comm, config);
  return colour != COMM_NO_COLOUR ? comm_made_by_parent(result, comm, parent, id) : result;
}

int p2p_comm_shrink(void *parent, int *excluded, int nExcluded, void **comm, void *config, int flags) {
  p2p_shrink_fn original = (p2p_shrink_fn)p2p_original(P2P_COMM_SHRINK);
  uint64_t id;
  int result;

  if (!original) return P2P_NCCL_INVALID_USAGE;
  id = comm_id_child(parent, COMM_KIND_SHRINK);
  result = original(parent, excluded, nExcluded, comm, config, flags);
  return comm_made_by_parent(result, comm, parent, id);
}

/* New ranks have the unique id alone, old ones the parent alone: no id of ours that both could compute. The
 * parent counts its child. */
int p2p_comm_grow(void *parent, int nRanks, const p2p_unique_id_t *id, int rank, void **comm, void *config) {
  p2p_grow_fn original = (p2p_grow_fn)p2p_original(P2P_COMM_GROW);

  if (!original) return P2P_NCCL_INVALID_USAGE;
  if (parent) (void)comm_id_child(parent, 0);
  return original(parent, nRanks, id, rank, comm, config);
}

/* The library goes. */
__attribute__((destructor)) static void p2p_comm_finish(void) {
  pthread_mutex_lock(&commAwaitedLock);
  while (commAwaited) {
    comm_awaited_t *awaited = commAwaited;

    commAwaited = awaited->next;
    free(awaited);
  }
  atomic_store(&commAwaitedCount, 0);
  pthread_mutex_unlock(&commAwaitedLock);
}
