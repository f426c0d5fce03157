#include "p2p_pending.h"

#include "comm_id.h"
#include "p2p.h"
#include "schedule.h"
#include "settings.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PENDING_CONFIG_MAGIC 0xcafebeefu
enum { PENDING_SLICE_NS = 200000 }; /* how often NCCL is asked */

/* The first fields of ncclConfig_t, the same since it exists. */
typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking; /* any value but 0: it does */
} pending_config_t;

typedef enum {
  PENDING_GROUP,   /* its thread's group has not ended */
  PENDING_PROGRAM, /* the program asks NCCL, and no thread of ours */
  PENDING_IDLE,    /* a thread of ours is to ask, but there is none yet */
  PENDING_NCCL,    /* NCCL makes it */
  PENDING_SETUP    /* NCCL has; we set it up */
} pending_phase_t;

typedef struct pending_entry {
  void *asked; /* says when it is there */
  void *comm;  /* null: at *place, once it is there */
  void **place;
  uint64_t id;
  bool isNonBlocking;
  pending_phase_t phase;
  const void *thread; /* of the group */
  bool isAborted;
  scheduleSetup_t setup;
  attendance_t *attendance;
  struct pending_entry *next;
} pending_entry_t;

/* A communicator that does not block, whose children do not either. */
typedef struct pending_handle {
  const void *comm;
  struct pending_handle *next;
} pending_handle_t;

static pthread_mutex_t pendingLock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t pendingChanged = PTHREAD_COND_INITIALIZER; /* entries went */
static pending_entry_t *pendingEntries;
atomic_int p2pPendingCount;
static pending_handle_t *pendingHandles;
static _Thread_local char pendingThread; /* its address names the thread */
static _Thread_local int pendingPasses;

void p2p_pending_pass(bool begins) {
  pendingPasses += begins ? 1 : -1;
}

bool p2p_pending_passes(void) {
  return pendingPasses > 0 || schedule_is_own_thread();
}

/* ---- which do not block ---- */

static void pending_handle_drop(const void *comm) {
  for (pending_handle_t **at = &pendingHandles; *at; at = &(*at)->next) {
    pending_handle_t *handle = *at;

    if (handle->comm != comm) continue;
    *at = handle->next;
    free(handle);
    return;
  }
}

/* Under the lock. Where memory is short, a later split has to tell by itself. */
static void pending_handle_set(const void *comm, bool isNonBlocking) {
  pending_handle_t *handle;

  pending_handle_drop(comm); /* of one whose end went unseen */
  handle = isNonBlocking ? calloc(1, sizeof(*handle)) : NULL;
  if (!handle) return;
  *handle = (pending_handle_t){comm, pendingHandles};
  pendingHandles = handle;
}

static bool pending_handle_find(const void *comm) {
  bool found = false;

  pthread_mutex_lock(&pendingLock);
  for (const pending_handle_t *handle = pendingHandles; handle && !found; handle = handle->next)
    found = handle->comm == comm;
  pthread_mutex_unlock(&pendingLock);
  return found;
}

bool p2p_pending_non_blocking(const void *config, const void *parent) {
  const char *text = getenv("NCCL_COMM_BLOCKING"); /* goes before any config */
  pending_config_t fields;
  char *end = NULL;
  long forced = text ? strtol(text, &end, 0) : -1;

  if (text && end != text && (forced == 0 || forced == 1)) return forced == 0;
  if (!config) return parent && pending_handle_find(parent);
  memcpy(&fields, config, offsetof(pending_config_t, blocking));
  if (fields.magic != PENDING_CONFIG_MAGIC || fields.size < sizeof(fields)) return false;
  memcpy(&fields, config, sizeof(fields));
  return fields.blocking == 0;
}

/* ---- entries, under the lock ---- */

static void *pending_comm(const pending_entry_t *entry) {
  return entry->comm ? entry->comm : __atomic_load_n(entry->place, __ATOMIC_ACQUIRE);
}

static pending_entry_t *pending_add(const p2pMade_t *made, pending_phase_t phase) {
  pending_entry_t *entry = calloc(1, sizeof(*entry));

  if (!entry) {
    attendance_close(made->attendance);
    return NULL;
  }
  *entry = (pending_entry_t){.asked = made->parent ? made->parent : *made->place,
                             .comm = made->parent ? NULL : *made->place,
                             .place = made->place,
                             .id = made->id,
                             .isNonBlocking = made->isNonBlocking,
                             .phase = phase,
                             .thread = &pendingThread,
                             .attendance = made->attendance,
                             .next = pendingEntries};
  schedule_setup_init(&entry->setup);
  pendingEntries = entry;
  atomic_fetch_add(&p2pPendingCount, 1);
  return entry;
}

static pending_entry_t *pending_unlink(pending_entry_t **at) {
  pending_entry_t *entry = *at;

  *at = entry->next;
  return entry;
}

static pending_entry_t *pending_take(pending_entry_t **at) {
  atomic_fetch_sub(&p2pPendingCount, 1);
  return pending_unlink(at);
}

/* Of one that was taken. */
static void pending_free(pending_entry_t *entry) {
  attendance_close(entry->attendance);
  pthread_mutex_destroy(&entry->setup.lock);
  free(entry);
}

static void pending_remove(pending_entry_t **at) {
  pending_free(pending_take(at));
}

/* The communicator is there: it gets its id, in place of what was known of one whose end went unseen. */
static void pending_note(const pending_entry_t *entry, void *comm) {
  pending_handle_set(comm, entry->isNonBlocking);
  if (entry->id == 0) return;
  p2p_comm_gone(comm);
  comm_id_set(comm, entry->id);
}

static bool pending_is_of(const pending_entry_t *entry, const void *comm) {
  return entry->asked == comm || (entry->phase != PENDING_GROUP && pending_comm(entry) == comm);
}

/* Whether its ranks meet. */
static bool pending_meets(const attendance_t *attendance) {
  if (attendance_is_full(attendance)) return true;
  if (settings_tells_unscheduled())
    settings_warn(
        "sends and receives of a communicator are left to NCCL: not all of its ranks' calls to make "
        "it were seen (libultraep-preload.so sees them all)");
  return false;
}

static bool pending_is_ours(const pending_entry_t *entry) {
  return entry->phase >= PENDING_IDLE;
}

/* Sets up those that are there; result is NCCL's, which goes before what became of them. */
static int pending_schedule(void *const *comms, int n, int result) {
  const int met = n > 0 ? schedule_comms_made(comms, NULL, n) : P2P_NCCL_SUCCESS;

  return result == P2P_NCCL_SUCCESS ? met : result;
}

/* ---- the thread ---- */

static bool pending_is_given_up(const void *asked) {
  bool given = true;

  pthread_mutex_lock(&pendingLock);
  for (const pending_entry_t *entry = pendingEntries; entry && given; entry = entry->next)
    given = entry->asked != asked || entry->phase != PENDING_NCCL || entry->isAborted;
  pthread_mutex_unlock(&pendingLock);
  return given;
}

static int pending_ask(void *asked) {
  p2p_error_fn original = (p2p_error_fn)p2p_original(P2P_COMM_ASYNC_ERROR);
  int state = P2P_NCCL_SUCCESS, result = original ? original(asked, &state) : P2P_NCCL_INVALID_USAGE;

  return result == P2P_NCCL_SUCCESS ? state : result;
}

static int pending_wait_for_nccl(void *asked) {
  while (!pending_is_given_up(asked)) {
    const int state = pending_ask(asked);

    if (state != P2P_NCCL_IN_PROGRESS) return state;
    nanosleep(&(struct timespec){.tv_nsec = PENDING_SLICE_NS}, NULL);
  }
  return P2P_NCCL_INVALID_USAGE;
}

/* What the thread needs, allocated before it starts. */
typedef struct {
  void *asked;
  void **comms;             /* [n] */
  scheduleSetup_t **setups; /* [n] */
  int n;
} pending_work_t;

static void pending_work_free(pending_work_t *work) {
  free(work->comms);
  free(work->setups);
  free(work);
}

static pending_work_t *pending_work_make(void *asked, int n) {
  pending_work_t *work = calloc(1, sizeof(*work));

  if (!work) return NULL;
  *work = (pending_work_t){.asked = asked,
                           .comms = calloc((size_t)n, sizeof(void *)),
                           .setups = calloc((size_t)n, sizeof(scheduleSetup_t *))};
  if (work->comms && work->setups) return work;
  pending_work_free(work);
  return NULL;
}

static void pending_set_up(pending_work_t *work) {
  pthread_mutex_lock(&pendingLock);
  for (pending_entry_t *entry = pendingEntries; entry; entry = entry->next) {
    void *comm;

    if (entry->asked != work->asked || entry->phase != PENDING_NCCL) continue;
    entry->phase = PENDING_SETUP;
    comm = pending_comm(entry);
    if (!comm) continue;
    pending_note(entry, comm);
    if (entry->isAborted || !pending_meets(entry->attendance)) continue;
    work->comms[work->n] = comm;
    work->setups[work->n++] = &entry->setup;
  }
  pthread_mutex_unlock(&pendingLock);
  /* One that is lost says so itself when it is asked. */
  if (work->n > 0) (void)schedule_comms_made(work->comms, work->setups, work->n);
}

static void *pending_run(void *argument) {
  pending_work_t *work = argument;

  p2p_pending_pass(true);
  if (pending_wait_for_nccl(work->asked) == P2P_NCCL_SUCCESS) pending_set_up(work);
  pthread_mutex_lock(&pendingLock);
  for (pending_entry_t **at = &pendingEntries; *at;) {
    if ((*at)->asked == work->asked && (*at)->phase >= PENDING_NCCL)
      pending_remove(at);
    else
      at = &(*at)->next;
  }
  pthread_cond_broadcast(&pendingChanged);
  pthread_mutex_unlock(&pendingLock);
  pending_work_free(work);
  return NULL;
}

static bool pending_run_start(pending_work_t *work) {
  pthread_t thread;

  if (pthread_create(&thread, NULL, pending_run, work) != 0) return false;
  (void)pthread_detach(thread);
  return true;
}

/* Under the lock: one thread for all that this one is asked about. Where there is none to be had, the
 * program's next question tries again. */
static void pending_start(void *asked) {
  pending_work_t *work;
  int n = 0;

  for (const pending_entry_t *entry = pendingEntries; entry; entry = entry->next)
    n += entry->asked == asked && entry->phase == PENDING_IDLE;
  work = n > 0 ? pending_work_make(asked, n) : NULL;
  if (!work) return;
  if (!pending_run_start(work)) {
    pending_work_free(work);
    return;
  }
  for (pending_entry_t *entry = pendingEntries; entry; entry = entry->next)
    if (entry->asked == asked && entry->phase == PENDING_IDLE) entry->phase = PENDING_NCCL;
}

/* ---- calls that make communicators ---- */

/* NCCL's splits that do not block say success before the child is there. */
static bool pending_is_later(const p2pMade_t *made, int result) {
  if (result == P2P_NCCL_IN_PROGRESS || !*made->place) return true;
  if (!schedule_is_wanted()) return false;
  if (made->parent ? pending_handle_find(made->parent) : made->isNonBlocking && !made->waits) return true;
  return pending_ask(made->parent ? made->parent : *made->place) == P2P_NCCL_IN_PROGRESS;
}

/* Outside of groups. */
static int pending_made_later(const p2pMade_t *made, int n, int result) {
  const bool isOurs = schedule_is_wanted();
  bool hasRoom = true;

  pthread_mutex_lock(&pendingLock);
  for (int i = 0; i < n; i++) {
    const pending_entry_t *entry;

    if (!isOurs && made[i].id == 0) continue;
    entry = pending_add(&made[i], isOurs ? PENDING_IDLE : PENDING_PROGRAM);
    if (!entry) hasRoom = false;
    if (entry && isOurs) pending_start(entry->asked);
  }
  pthread_mutex_unlock(&pendingLock);
  /* Its set-up would miss on this rank alone. */
  if (isOurs && !hasRoom) return P2P_NCCL_SYSTEM_ERROR;
  return isOurs && made->saysState ? P2P_NCCL_IN_PROGRESS : result;
}

static void pending_leave(const p2pMade_t *made, int n) {
  for (int i = 0; i < n; i++) attendance_close(made[i].attendance);
}

static int pending_made_now(const p2pMade_t *made, int n, int result) {
  void **comms = calloc((size_t)n, sizeof(*comms));
  int nMeeting = 0;

  if (!comms && schedule_is_wanted()) result = P2P_NCCL_SYSTEM_ERROR;
  pthread_mutex_lock(&pendingLock);
  for (int i = 0; i < n && comms; i++) {
    const pending_entry_t entry = {.id = made[i].id, .isNonBlocking = made[i].isNonBlocking};

    pending_note(&entry, *made[i].place);
    if (pending_meets(made[i].attendance)) comms[nMeeting++] = *made[i].place;
  }
  pthread_mutex_unlock(&pendingLock);
  result = pending_schedule(comms, nMeeting, result);
  pending_leave(made, n);
  free(comms);
  return result;
}

int p2p_pending_made(const p2pMade_t *made, int n, int result) {
  const bool isOurs = schedule_is_wanted();
  bool hasRoom = true;

  if (!p2p_issued(result)) pending_leave(made, n);
  if (!p2p_issued(result) || n == 0) return result;
  if (p2p_group_depth() == 0)
    return pending_is_later(made, result) ? pending_made_later(made, n, result)
                                          : pending_made_now(made, n, result);
  pthread_mutex_lock(&pendingLock);
  for (int i = 0; i < n; i++)
    if (isOurs || made[i].id != 0) hasRoom = pending_add(&made[i], PENDING_GROUP) && hasRoom;
  pthread_mutex_unlock(&pendingLock);
  return hasRoom || !isOurs ? result : P2P_NCCL_SYSTEM_ERROR;
}

/* ---- a group's end ---- */

static bool pending_is_mine(const pending_entry_t *entry) {
  return entry->phase == PENDING_GROUP && entry->thread == &pendingThread;
}

/* Under the lock. Sets *isLater if one of them does not block. */
static int pending_count_mine(bool *isLater) {
  int n = 0;

  for (const pending_entry_t *entry = pendingEntries; entry; entry = entry->next) {
    if (!pending_is_mine(entry)) continue;
    n++;
    if (entry->isNonBlocking) *isLater = true;
  }
  return n;
}

/* Under the lock. */
static void pending_group_later(bool isOurs) {
  for (pending_entry_t *entry = pendingEntries; entry; entry = entry->next)
    if (pending_is_mine(entry)) entry->phase = isOurs ? PENDING_IDLE : PENDING_PROGRAM;
  for (pending_entry_t *entry = pendingEntries; entry; entry = entry->next)
    if (entry->phase == PENDING_IDLE && entry->thread == &pendingThread) pending_start(entry->asked);
}

/* Under the lock: takes them out, as a list. */
static pending_entry_t *pending_group_take(void) {
  pending_entry_t *taken = NULL, **end = &taken;

  for (pending_entry_t **at = &pendingEntries; *at;) {
    if (!pending_is_mine(*at)) {
      at = &(*at)->next;
      continue;
    }
    *end = pending_take(at);
    (*end)->next = NULL;
    end = &(*end)->next;
  }
  return taken;
}

/* Under the lock: those of the list that are there and whose ranks meet, into comms, which may be null.
 * Returns how many. */
static int pending_group_there(const pending_entry_t *taken, void **comms) {
  int n = 0;

  for (const pending_entry_t *entry = taken; entry && comms; entry = entry->next) {
    void *comm = pending_comm(entry);

    if (!comm) continue;
    pending_note(entry, comm);
    if (pending_meets(entry->attendance)) comms[n++] = comm;
  }
  return n;
}

int p2p_pending_group_check(int result) {
  const bool isOurs = schedule_is_wanted();
  bool isLater = result == P2P_NCCL_IN_PROGRESS;
  pending_entry_t *taken = NULL;
  void **comms = NULL;
  int n;

  pthread_mutex_lock(&pendingLock);
  n = pending_count_mine(&isLater);
  if (n > 0 && p2p_issued(result) && isLater) {
    pending_group_later(isOurs);
    n = 0;
    if (isOurs) result = P2P_NCCL_IN_PROGRESS;
  } else if (n > 0) {
    comms = p2p_issued(result) ? calloc((size_t)n, sizeof(*comms)) : NULL;
    if (!comms && isOurs && p2p_issued(result)) result = P2P_NCCL_SYSTEM_ERROR;
    taken = pending_group_take();
    n = pending_group_there(taken, comms);
  }
  pthread_mutex_unlock(&pendingLock);
  result = pending_schedule(comms, n, result);
  while (taken) pending_free(pending_unlink(&taken));
  free(comms);
  return result;
}

/* ---- what the program asks and ends ---- */

bool p2p_pending_find(const void *comm) {
  bool found = false;

  if (!comm) return false;
  pthread_mutex_lock(&pendingLock);
  for (const pending_entry_t *entry = pendingEntries; entry && !found; entry = entry->next) {
    if (!pending_is_ours(entry) || !pending_is_of(entry, comm)) continue;
    found = true;
    if (entry->phase == PENDING_IDLE) pending_start(entry->asked);
  }
  pthread_mutex_unlock(&pendingLock);
  return found;
}

void p2p_pending_seen(const void *comm, int state) {
  if (atomic_load_explicit(&p2pPendingCount, memory_order_relaxed) == 0 || state == P2P_NCCL_IN_PROGRESS)
    return;
  pthread_mutex_lock(&pendingLock);
  for (pending_entry_t **at = &pendingEntries; *at;) {
    void *made;

    if ((*at)->phase != PENDING_PROGRAM || (*at)->asked != comm) {
      at = &(*at)->next;
      continue;
    }
    made = state == P2P_NCCL_SUCCESS ? pending_comm(*at) : NULL;
    if (made) pending_note(*at, made);
    pending_remove(at);
  }
  pthread_mutex_unlock(&pendingLock);
}

/* Under the lock: an entry of the communicator that is to be waited for. Aborts all of them. */
static const pending_entry_t *pending_end_entries(const void *comm, bool abort) {
  const pending_entry_t *found = NULL;

  for (pending_entry_t **at = &pendingEntries; *at;) {
    pending_entry_t *entry = *at;

    if (!pending_is_ours(entry) || !pending_is_of(entry, comm)) {
      at = &entry->next;
    } else if (abort && entry->phase == PENDING_IDLE) {
      pending_remove(at);
    } else {
      found = entry;
      if (abort && !entry->isAborted) schedule_setup_abort(&entry->setup);
      entry->isAborted |= abort;
      at = &entry->next;
    }
  }
  return found;
}

bool p2p_pending_end(const void *comm, bool abort) {
  const pending_entry_t *entry;
  bool isThere = true;

  if (!comm || atomic_load_explicit(&p2pPendingCount, memory_order_acquire) == 0) return true;
  pthread_mutex_lock(&pendingLock);
  while (isThere && (entry = pending_end_entries(comm, abort)) != NULL) {
    if (!abort && entry->phase != PENDING_SETUP)
      isThere = false;
    else
      pthread_cond_wait(&pendingChanged, &pendingLock);
  }
  pthread_mutex_unlock(&pendingLock);
  return isThere;
}

void p2p_pending_forget(const void *comm) {
  pthread_mutex_lock(&pendingLock);
  pending_handle_drop(comm);
  for (pending_entry_t **at = &pendingEntries; *at;) {
    if (!pending_is_ours(*at) && ((*at)->asked == comm || (*at)->comm == comm))
      pending_remove(at);
    else
      at = &(*at)->next;
  }
  pthread_mutex_unlock(&pendingLock);
}

/* The process ends: threads that are still at work keep their entries. */
__attribute__((destructor)) static void p2p_pending_finish(void) {
  pthread_mutex_lock(&pendingLock);
  for (pending_entry_t **at = &pendingEntries; *at;) {
    if (!pending_is_ours(*at))
      pending_remove(at);
    else
      at = &(*at)->next;
  }
  while (pendingHandles) pending_handle_drop(pendingHandles->comm);
  pthread_mutex_unlock(&pendingLock);
}
