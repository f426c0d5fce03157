#include "schedule_double.h"

#include "fake_nccl.h"
#include "p2p.h"
#include "schedule.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

struct scheduleComm {
  scheduleUse_t use;
  int nRanks;
};

__attribute__((visibility("default"))) struct schedule_double scheduleDouble = {
    .failingRank = -1, .isScheduled = schedule_is_scheduled};

static _Thread_local int doubleOwn;

bool schedule_is_wanted(void) {
  return true;
}
bool schedule_is_own_thread(void) {
  return doubleOwn > 0;
}

static void double_pause(void) {
  nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
}

/* ---- NCCL ---- */
/* As nccl_symbols.c: what the program sees, else the one that was loaded out of sight. */
static void *double_symbol(const char *name) {
  void *library = dlopen("libtakeover_nccl.so", RTLD_NOW | RTLD_NOLOAD), *symbol = dlsym(RTLD_DEFAULT, name);

  if (!symbol && library) symbol = dlsym(library, name);
  if (library) dlclose(library);
  return symbol;
}

typedef struct {
  void *comm;
  const volatile int32_t *abort;
  int result;
} double_call_t;

/* As nccl_call.c: from another thread, and until it is done. */
static void *double_call(void *argument) {
  double_call_t *call = argument;
  __typeof__(ncclAllReduce) *allReduce = (__typeof__(ncclAllReduce) *)double_symbol("ncclAllReduce");
  p2p_error_fn asyncError = (p2p_error_fn)double_symbol("ncclCommGetAsyncError");
  int state = FAKE_IN_PROGRESS;

  doubleOwn++;
  call->result = allReduce(NULL, NULL, 1, 0, 0, call->comm, NULL);
  while ((call->result == FAKE_SUCCESS || call->result == FAKE_IN_PROGRESS) && state == FAKE_IN_PROGRESS) {
    call->result = asyncError(call->comm, &state);
    if (__atomic_load_n(call->abort, __ATOMIC_ACQUIRE)) break;
  }
  if (call->result == FAKE_SUCCESS) call->result = state;
  doubleOwn--;
  return NULL;
}

static int double_ask_nccl(void *comm, const volatile int32_t *abort) {
  double_call_t call = {.comm = comm, .abort = abort};
  pthread_t thread;

  if (pthread_create(&thread, NULL, double_call, &call) != 0) return 2;
  pthread_join(thread, NULL);
  return call.result;
}

/* ---- meetings of a communicator's ranks ---- */
typedef struct double_meeting {
  uint64_t hash;
  int step, nRanks, arrived, left;
  bool hasFailed, isGivenUp;
  struct double_meeting *next;
} double_meeting_t;

static pthread_mutex_t doubleLock = PTHREAD_MUTEX_INITIALIZER;
static double_meeting_t *doubleMeetings;

static double_meeting_t *double_arrive(uint64_t hash, int step, int nRanks, bool fails) {
  double_meeting_t *meeting = doubleMeetings;

  while (meeting && (meeting->hash != hash || meeting->step != step || meeting->arrived == meeting->nRanks))
    meeting = meeting->next;
  if (!meeting) {
    meeting = calloc(1, sizeof(*meeting));
    if (!meeting) abort();
    *meeting = (double_meeting_t){.hash = hash, .step = step, .nRanks = nRanks, .next = doubleMeetings};
    doubleMeetings = meeting;
  }
  meeting->arrived++;
  if (fails) meeting->hasFailed = true;
  return meeting;
}

static void double_leave(double_meeting_t *meeting) {
  double_meeting_t **at = &doubleMeetings;

  if (++meeting->left < meeting->nRanks) return;
  while (*at != meeting) at = &(*at)->next;
  *at = meeting->next;
  free(meeting);
}

/* Whether all can: one that cannot comes, too, as in an agreement. One that is aborted is missed by the
 * others, who give up. */
static bool double_meet(uint64_t hash, int step, int nRanks, bool fails, const volatile int32_t *aborted) {
  double_meeting_t *meeting;
  bool isGood;

  pthread_mutex_lock(&doubleLock);
  meeting = double_arrive(hash, step, nRanks, fails);
  while (meeting->arrived < meeting->nRanks && !meeting->isGivenUp) {
    pthread_mutex_unlock(&doubleLock);
    double_pause();
    pthread_mutex_lock(&doubleLock);
    if (__atomic_load_n(aborted, __ATOMIC_ACQUIRE)) meeting->isGivenUp = true;
  }
  isGood = !meeting->hasFailed && !meeting->isGivenUp;
  double_leave(meeting);
  pthread_mutex_unlock(&doubleLock);
  return isGood;
}

/* ---- set-up ---- */
typedef struct {
  void *comm;
  scheduleSetup_t *setup;
  pthread_t thread;
} double_opening_t;

static bool double_set_up(void *comm, const volatile int32_t *aborted, int *nRanks) {
  p2p_ask_fn count = (p2p_ask_fn)double_symbol("ncclCommCount");
  p2p_ask_fn userRank = (p2p_ask_fn)double_symbol("ncclCommUserRank");
  uint64_t (*hash)(const void *) = (uint64_t(*)(const void *))double_symbol("fake_nccl_hash");
  int rank = -1;
  bool isGood = count(comm, nRanks) == FAKE_SUCCESS && userRank(comm, &rank) == FAKE_SUCCESS;

  if (!isGood || !hash) return false; /* not to be: its program may ask NCCL only later */
  isGood = double_ask_nccl(comm, aborted) == FAKE_SUCCESS && rank != scheduleDouble.failingRank;
  if (!double_meet(hash(comm), 0, *nRanks, !isGood, aborted)) return false;
  scheduleDouble.held++;
  while (scheduleDouble.isHeld && !__atomic_load_n(aborted, __ATOMIC_ACQUIRE)) double_pause();
  scheduleDouble.held--;
  return double_meet(hash(comm), 1, *nRanks, __atomic_load_n(aborted, __ATOMIC_ACQUIRE) != 0, aborted);
}

static void *double_open(void *argument) {
  const double_opening_t *opening = argument;
  int32_t aborted = 0;
  int nRanks = 0;
  scheduleComm_t *made;

  scheduleDouble.running++;
  doubleOwn++;
  schedule_setup_watch(opening->setup, &aborted);
  made = double_set_up(opening->comm, &aborted, &nRanks) ? calloc(1, sizeof(*made)) : NULL;
  schedule_setup_watch(opening->setup, NULL);
  doubleOwn--;
  if (made) {
    made->nRanks = nRanks;
    scheduleDouble.made++;
    schedule_add_comm(opening->comm, made);
  } else if (schedule_setup_is_aborted(opening->setup)) {
    scheduleDouble.aborted++;
  } else {
    scheduleDouble.failed++;
  }
  scheduleDouble.running--;
  return NULL;
}

int schedule_comms_made(void *const *comms, scheduleSetup_t *const *setups, int n) {
  double_opening_t *openings = calloc((size_t)n, sizeof(*openings));

  if (!openings) abort();
  for (int i = 0; i < n; i++) {
    openings[i] = (double_opening_t){.comm = comms[i], .setup = setups ? setups[i] : NULL};
    if (pthread_create(&openings[i].thread, NULL, double_open, &openings[i]) != 0) abort();
  }
  for (int i = 0; i < n; i++) pthread_join(openings[i].thread, NULL);
  free(openings);
  return 0;
}

/* ---- the rest ---- */
void schedule_comm_ends(const void *handle, bool abort) {
  scheduleComm_t *comm = schedule_remove_comm(handle);

  if (!comm) return;
  schedule_wait_unused(comm);
  scheduleDouble.ended++;
  scheduleDouble.endedByAbort += abort;
  free(comm);
}

int schedule_comm_error(const scheduleComm_t *comm) {
  (void)comm;
  return P2P_NCCL_SUCCESS;
}

int schedule_comm_ranks(const scheduleComm_t *comm) {
  return comm->nRanks;
}

int schedule_launch(scheduleComm_t *comm, const scheduleOp_t *ops, int n) {
  long (*calls)(void) = (long (*)(void))double_symbol("fake_nccl_calls");

  (void)comm, (void)ops;
  scheduleDouble.launched += n;
  if (calls) scheduleDouble.callsBefore = calls();
  return scheduleDouble.launchResult;
}
