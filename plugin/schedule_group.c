/* Collecting the calls of a group. */
#include "schedule.h"

#include "p2p.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* ---- which communicators ---- */

typedef struct schedule_entry {
  const void *handle;
  scheduleComm_t *comm;
  struct schedule_entry *next;
} schedule_entry_t;

static pthread_rwlock_t scheduleLock = PTHREAD_RWLOCK_INITIALIZER;
static schedule_entry_t *scheduleEntries;
static atomic_int scheduleCount; /* so that without any the data path costs one load */

scheduleComm_t *schedule_find(const void *handle) {
  scheduleComm_t *found = NULL;

  if (atomic_load_explicit(&scheduleCount, memory_order_acquire) == 0) return NULL;
  pthread_rwlock_rdlock(&scheduleLock);
  for (schedule_entry_t *entry = scheduleEntries; entry && !found; entry = entry->next)
    if (entry->handle == handle) found = entry->comm;
  pthread_rwlock_unlock(&scheduleLock);
  return found;
}

void schedule_add_comm(const void *handle, scheduleComm_t *comm) {
  schedule_entry_t *entry = calloc(1, sizeof(*entry));

  if (!entry) return;
  *entry = (schedule_entry_t){.handle = handle, .comm = comm};
  pthread_rwlock_wrlock(&scheduleLock);
  entry->next = scheduleEntries;
  scheduleEntries = entry;
  atomic_fetch_add(&scheduleCount, 1);
  pthread_rwlock_unlock(&scheduleLock);
}

scheduleComm_t *schedule_remove_comm(const void *handle) {
  scheduleComm_t *comm = NULL;

  if (atomic_load_explicit(&scheduleCount, memory_order_acquire) == 0) return NULL;
  pthread_rwlock_wrlock(&scheduleLock);
  for (schedule_entry_t **at = &scheduleEntries; *at && !comm; at = &(*at)->next) {
    schedule_entry_t *entry = *at;

    if (entry->handle != handle) continue;
    comm = entry->comm;
    *at = entry->next;
    free(entry);
    atomic_fetch_sub(&scheduleCount, 1);
    break;
  }
  pthread_rwlock_unlock(&scheduleLock);
  return comm;
}

/* ---- a thread's group ---- */

typedef struct {
  scheduleComm_t *comm;
  scheduleOp_t op;
} schedule_call_t;

typedef struct {
  schedule_call_t *calls;
  scheduleOp_t *ops; /* of one communicator, as it is launched */
  int n, room;
} schedule_calls_t;

static pthread_key_t scheduleKey; /* frees a thread's arrays when it ends */
static pthread_once_t scheduleKeyOnce = PTHREAD_ONCE_INIT;
static _Thread_local schedule_calls_t *scheduleCalls;

static void schedule_calls_free(void *made) {
  schedule_calls_t *calls = made;

  free(calls->calls);
  free(calls->ops);
  free(calls);
}

static void schedule_key_make(void) {
  (void)pthread_key_create(&scheduleKey, schedule_calls_free);
}

static schedule_calls_t *schedule_calls(void) {
  if (!scheduleCalls) {
    pthread_once(&scheduleKeyOnce, schedule_key_make);
    scheduleCalls = calloc(1, sizeof(*scheduleCalls));
    if (scheduleCalls) (void)pthread_setspecific(scheduleKey, scheduleCalls);
  }
  return scheduleCalls;
}

static bool schedule_make_room(schedule_calls_t *calls) {
  int room = calls->room ? 2 * calls->room : 64;
  schedule_call_t *more;
  scheduleOp_t *ops;

  if (calls->n < calls->room) return true;
  more = realloc(calls->calls, (size_t)room * sizeof(*more));
  if (more) calls->calls = more;
  ops = realloc(calls->ops, (size_t)room * sizeof(*ops));
  if (ops) calls->ops = ops;
  if (more && ops) calls->room = room;
  return more && ops;
}

int schedule_add(scheduleComm_t *comm, const scheduleOp_t *op, int depth) {
  int error = schedule_comm_error(comm);
  schedule_calls_t *calls;

  if (error != P2P_NCCL_SUCCESS) return error;
  if (op->peer < 0 || op->peer >= schedule_comm_ranks(comm) || (!op->buffer && op->bytes > 0))
    return P2P_NCCL_INVALID_ARGUMENT;
  if (depth == 0) return schedule_launch(comm, op, 1);
  calls = schedule_calls();
  if (!calls || !schedule_make_room(calls)) return P2P_NCCL_SYSTEM_ERROR;
  calls->calls[calls->n++] = (schedule_call_t){.comm = comm, .op = *op};
  return P2P_NCCL_SUCCESS;
}

int schedule_group_ended(bool launch) {
  schedule_calls_t *calls = scheduleCalls;
  int result = P2P_NCCL_SUCCESS;

  if (!calls || calls->n == 0) return result;
  for (int first = 0; first < calls->n; first++) {
    scheduleComm_t *comm = calls->calls[first].comm;
    int n = 0, status;

    if (!comm) continue; /* launched with an earlier one */
    for (int i = first; i < calls->n; i++) {
      if (calls->calls[i].comm != comm) continue;
      calls->ops[n++] = calls->calls[i].op;
      calls->calls[i].comm = NULL;
    }
    status = launch ? schedule_launch(comm, calls->ops, n) : P2P_NCCL_SUCCESS;
    if (result == P2P_NCCL_SUCCESS) result = status;
  }
  calls->n = 0;
  return result;
}

/* ---- lanes ---- */

int schedule_lanes(const scheduleOp_t *ops, int n, int nRanks, kernelP2pLane_t *lanes, kernelP2pOp_t *sorted,
                   int32_t *from, int32_t *counts) {
  int nLanes = 0;
  int32_t at = 0;

  memset(counts, 0, 2 * (size_t)nRanks * sizeof(*counts));
  for (int i = 0; i < n; i++) counts[2 * ops[i].peer + ops[i].isRecv]++;
  for (int key = 0; key < 2 * nRanks; key++) {
    if (counts[key] > 0)
      lanes[nLanes++] = (kernelP2pLane_t){.peer = key / 2, .first = at, .n = counts[key], .isRecv = key % 2};
    at += counts[key];
    counts[key] = at - counts[key]; /* where the next of the lane goes */
  }
  for (int i = 0; i < n; i++) {
    int32_t to = counts[2 * ops[i].peer + ops[i].isRecv]++;

    from[to] = i;
    sorted[to] = (kernelP2pOp_t){
        .address = (uint64_t)(uintptr_t)ops[i].buffer, .bytes = ops[i].bytes, .slot = KERNEL_P2P_NO_SLOT};
  }
  return nLanes;
}
