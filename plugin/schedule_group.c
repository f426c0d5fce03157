/* Which communicators are scheduled, and collecting the calls of a group. */
#include "schedule.h"

#include "p2p.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- which communicators ---- */

static pthread_rwlock_t scheduleLock = PTHREAD_RWLOCK_INITIALIZER;
static scheduleUse_t *scheduleUses;
atomic_int scheduleCount;

static scheduleUse_t *schedule_use(scheduleComm_t *comm) {
  return (scheduleUse_t *)comm;
}

/* By handle, or (handle null) by number. */
static scheduleComm_t *schedule_hold_use(const void *handle, uint64_t number) {
  scheduleUse_t *found;

  pthread_rwlock_rdlock(&scheduleLock);
  for (found = scheduleUses; found; found = found->next)
    if (handle ? found->handle == handle : found->number == number) break;
  if (found) atomic_fetch_add(&found->users, 1);
  pthread_rwlock_unlock(&scheduleLock);
  return (scheduleComm_t *)found;
}

scheduleComm_t *schedule_hold_find(const void *handle) {
  return handle ? schedule_hold_use(handle, 0) : NULL;
}

bool schedule_is_scheduled(const void *handle) {
  scheduleComm_t *comm = schedule_hold(handle);

  schedule_release(comm);
  return comm != NULL;
}

void schedule_add_comm(const void *handle, scheduleComm_t *comm) {
  static uint64_t number;
  scheduleUse_t *use = schedule_use(comm);

  pthread_rwlock_wrlock(&scheduleLock);
  use->handle = handle;
  use->number = ++number;
  use->next = scheduleUses;
  scheduleUses = use;
  atomic_fetch_add(&scheduleCount, 1);
  pthread_rwlock_unlock(&scheduleLock);
}

scheduleComm_t *schedule_remove_comm(const void *handle) {
  scheduleUse_t **at, *use;

  if (atomic_load_explicit(&scheduleCount, memory_order_acquire) == 0) return NULL;
  pthread_rwlock_wrlock(&scheduleLock);
  for (at = &scheduleUses; *at && (*at)->handle != handle;) at = &(*at)->next;
  use = *at;
  if (use) {
    *at = use->next;
    atomic_fetch_sub(&scheduleCount, 1);
  }
  pthread_rwlock_unlock(&scheduleLock);
  return (scheduleComm_t *)use;
}

/* Calls are short, so that nothing is to be woken. */
void schedule_wait_unused(scheduleComm_t *comm) {
  while (atomic_load(&schedule_use(comm)->users) > 0) nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
}

/* ---- setting up ---- */

void schedule_setup_init(scheduleSetup_t *setup) {
  *setup = (scheduleSetup_t){.isAborted = false};
  pthread_mutex_init(&setup->lock, NULL);
}

void schedule_setup_watch(scheduleSetup_t *setup, volatile int32_t *abort) {
  if (!setup) return;
  pthread_mutex_lock(&setup->lock);
  setup->abort = abort;
  if (abort && setup->isAborted) __atomic_store_n(abort, 1, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&setup->lock);
}

void schedule_setup_abort(scheduleSetup_t *setup) {
  pthread_mutex_lock(&setup->lock);
  setup->isAborted = true;
  if (setup->abort) __atomic_store_n(setup->abort, 1, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&setup->lock);
}

bool schedule_setup_is_aborted(scheduleSetup_t *setup) {
  bool isAborted;

  if (!setup) return false;
  pthread_mutex_lock(&setup->lock);
  isAborted = setup->isAborted;
  pthread_mutex_unlock(&setup->lock);
  return isAborted;
}

/* ---- a thread's group ---- */

/* The communicator by its number: until the group ends another thread may end it. */
typedef struct {
  uint64_t number; /* 0: launched */
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
  calls->calls[calls->n++] = (schedule_call_t){.number = schedule_use(comm)->number, .op = *op};
  return P2P_NCCL_SUCCESS;
}

static int schedule_launch_number(uint64_t number, const scheduleOp_t *ops, int n) {
  scheduleComm_t *comm = schedule_hold_use(NULL, number);
  int result = comm ? schedule_launch(comm, ops, n) : P2P_NCCL_INVALID_USAGE;

  schedule_release(comm);
  return result;
}

int schedule_group_ended(bool launch) {
  schedule_calls_t *calls = scheduleCalls;
  int result = P2P_NCCL_SUCCESS;

  if (!calls || calls->n == 0) return result;
  for (int first = 0; first < calls->n && launch; first++) {
    const uint64_t number = calls->calls[first].number;
    int n = 0, status;

    if (number == 0) continue; /* launched with an earlier one */
    for (int i = first; i < calls->n; i++) {
      if (calls->calls[i].number != number) continue;
      calls->ops[n++] = calls->calls[i].op;
      calls->calls[i].number = 0;
    }
    status = schedule_launch_number(number, calls->ops, n);
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
