#include "fake_nccl_comm.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FAKE_EXPORT __attribute__((visibility("default")))
#define FAKE_TWIN(name) extern __typeof__(name) p##name __attribute__((visibility("default")))
#define FAKE_WEAK(name)                                                                                      \
  extern __typeof__(name) name __attribute__((weak, alias("p" #name), visibility("default")))

static pthread_mutex_t fakeLock = PTHREAD_MUTEX_INITIALIZER;
static struct fake_state fakeState = {.childRanks = 1, .polls = 1};

FAKE_EXPORT struct fake_state *fake_nccl_state(void) {
  return &fakeState;
}

FAKE_EXPORT long fake_nccl_calls(void) {
  long calls;

  pthread_mutex_lock(&fakeLock);
  calls = fakeState.calls;
  pthread_mutex_unlock(&fakeLock);
  return calls;
}

FAKE_EXPORT void fake_nccl_log(int level, unsigned long subsystems, const char *where, int line,
                               const char *format, ...) {
  va_list arguments;

  (void)level, (void)subsystems, (void)where, (void)line;
  pthread_mutex_lock(&fakeLock);
  fakeState.lines++;
  va_start(arguments, format);
  vsnprintf(fakeState.line, sizeof(fakeState.line), format, arguments);
  va_end(arguments);
  pthread_mutex_unlock(&fakeLock);
}

FAKE_EXPORT uint64_t fake_nccl_hash(const void *comm) {
  return ((const struct fake_comm *)comm)->hash;
}

FAKE_EXPORT void *fake_nccl_context(const void *comm) {
  return ((const struct fake_comm *)comm)->profiled.context;
}

static int fake_record(struct fake_call call, int depth) {
  int result;

  pthread_mutex_lock(&fakeLock);
  fakeState.last = call;
  fakeState.calls++;
  fakeState.depth += depth;
  result = fakeState.result;
  pthread_mutex_unlock(&fakeLock);
  return result;
}

/* What an operation returns: an error that the test wants, and nothing is issued; in progress where the
 * communicator does not block. */
static int fake_issue(struct fake_call call) {
  const int result = fake_record(call, 0);
  struct fake_comm *comm = call.comm;
  int state = FAKE_SUCCESS;

  if (comm && !comm->blocking && ncclCommGetAsyncError(comm, &state) != FAKE_SUCCESS) return FAKE_INVALID;
  if (state == FAKE_IN_PROGRESS) return FAKE_INVALID;
  if (result != FAKE_SUCCESS && result != FAKE_IN_PROGRESS) return result;
  if (!comm || comm->blocking || fake_group_depth() > 0) return result;
  comm->busy = 1;
  return FAKE_IN_PROGRESS;
}

static int fake_is_issued(int result) {
  return result == FAKE_SUCCESS || result == FAKE_IN_PROGRESS;
}

enum { FAKE_ALL = -1, FAKE_NONE = -2 };

static _Thread_local int fakeInside;

/* ---- operations ---- */
FAKE_TWIN(ncclSend);
int pncclSend(const void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  const int result =
      fake_issue((struct fake_call){"ncclSend", buffer, NULL, count, type, peer, comm, stream});

  if (fake_is_issued(result) && !fakeInside) fake_operation(comm, OPERATION_SEND, count, type, peer);
  return result;
}
FAKE_WEAK(ncclSend);

FAKE_TWIN(ncclRecv);
int pncclRecv(void *buffer, size_t count, int type, int peer, void *comm, void *stream) {
  const int result =
      fake_issue((struct fake_call){"ncclRecv", NULL, buffer, count, type, peer, comm, stream});

  if (fake_is_issued(result)) fake_operation(comm, OPERATION_RECV, count, type, peer);
  return result;
}
FAKE_WEAK(ncclRecv);

FAKE_TWIN(ncclPutSignal);
int pncclPutSignal(const void *buffer, size_t count, int type, int peer, void *window, size_t offset,
                   int signal, int context, unsigned flags, void *comm, void *stream) {
  (void)window, (void)offset, (void)signal, (void)context, (void)flags;
  return fake_issue((struct fake_call){"ncclPutSignal", buffer, NULL, count, type, peer, comm, stream});
}
FAKE_WEAK(ncclPutSignal);

FAKE_TWIN(ncclAllReduce);
int pncclAllReduce(const void *send, void *recv, size_t count, int type, int op, void *comm, void *stream) {
  const int result =
      fake_issue((struct fake_call){"ncclAllReduce", send, recv, count, type, op, comm, stream});

  if (fake_is_issued(result)) fake_operation(comm, OPERATION_COLL, count, type, 0);
  return result;
}
FAKE_WEAK(ncclAllReduce);

FAKE_TWIN(ncclGroupStart);
int pncclGroupStart(void) {
  fake_group_enter();
  return fake_record((struct fake_call){.name = "ncclGroupStart"}, 1);
}
FAKE_WEAK(ncclGroupStart);

/* An all-to-all and its kin: what the public call says, and what is behind it. From within the public name of
 * a send is called, too, as a collective of NCCL might: that is not the program's operation. */
static int fake_all(struct fake_call call, int sends, int receives) {
  const struct fake_comm *comm = call.comm;
  int result;

  fakeInside = 1;
  fake_group_enter();
  (void)ncclSend(call.send, call.count, call.type, 0, call.comm, call.stream);
  (void)fake_group_leave();
  fakeInside = 0;
  result = fake_issue(call);
  fake_group_enter();
  for (int peer = 0; comm && fake_is_issued(result) && peer < comm->nRanks; peer++) {
    if (sends == FAKE_ALL || sends == peer)
      fake_operation(call.comm, OPERATION_SEND, call.count, call.type, peer);
    if (receives == FAKE_ALL || receives == peer)
      fake_operation(call.comm, OPERATION_RECV, call.count, call.type, peer);
  }
  (void)fake_group_leave();
  return result;
}

FAKE_TWIN(ncclAlltoAll);
int pncclAlltoAll(const void *send, void *recv, size_t count, int type, void *comm, void *stream) {
  return fake_all((struct fake_call){"ncclAlltoAll", send, recv, count, type, -1, comm, stream}, FAKE_ALL,
                  FAKE_ALL);
}
FAKE_WEAK(ncclAlltoAll);

FAKE_TWIN(ncclGather);
int pncclGather(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream) {
  const int isRoot = comm && ((struct fake_comm *)comm)->rank == root;

  return fake_all((struct fake_call){"ncclGather", send, recv, count, type, root, comm, stream}, root,
                  isRoot ? FAKE_ALL : FAKE_NONE);
}
FAKE_WEAK(ncclGather);

FAKE_TWIN(ncclScatter);
int pncclScatter(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream) {
  const int isRoot = comm && ((struct fake_comm *)comm)->rank == root;

  return fake_all((struct fake_call){"ncclScatter", send, recv, count, type, root, comm, stream},
                  isRoot ? FAKE_ALL : FAKE_NONE, root);
}
FAKE_WEAK(ncclScatter);

/* ---- communicators ---- */
FAKE_TWIN(ncclCommCount);
int pncclCommCount(const void *comm, int *count) {
  if (!comm || ((const struct fake_comm *)comm)->busy) return FAKE_INVALID;
  *count = ((const struct fake_comm *)comm)->nRanks;
  return FAKE_SUCCESS;
}
FAKE_WEAK(ncclCommCount);

FAKE_TWIN(ncclCommUserRank);
int pncclCommUserRank(const void *comm, int *rank) {
  if (!comm || ((const struct fake_comm *)comm)->busy) return FAKE_INVALID;
  *rank = ((const struct fake_comm *)comm)->rank;
  return FAKE_SUCCESS;
}
FAKE_WEAK(ncclCommUserRank);

static int fake_blocking(const void *config, int otherwise) {
  const char *text = getenv("NCCL_COMM_BLOCKING");

  if (text && text[0]) return atoi(text);
  return config ? ((const struct fake_config *)config)->blocking : otherwise;
}

static _Thread_local int fakeGroupLater; /* communicators of the group that do not block */

static int fake_comm_make(void **comm, int nRanks, int rank, uint64_t hash, int blocking) {
  struct fake_comm *made = calloc(1, sizeof(*made));

  if (!made) return 2;
  made->rank = rank;
  made->nRanks = nRanks;
  made->hash = hash;
  made->blocking = blocking;
  fake_plugins_open(made);
  pthread_mutex_lock(&fakeLock);
  fakeState.comms++;
  made->busy = made->blocking ? 0 : fakeState.polls;
  made->error = made->blocking ? FAKE_SUCCESS : fakeState.initError;
  pthread_mutex_unlock(&fakeLock);
  if (!blocking && fake_group_depth() > 0) fakeGroupLater++;
  __atomic_store_n(comm, made, __ATOMIC_RELEASE);
  return made->blocking ? FAKE_SUCCESS : FAKE_IN_PROGRESS;
}

/* ---- ranks that wait for each other ---- */
enum { FAKE_MEETINGS = 256, FAKE_AWAITED = 64, FAKE_PATIENCE = 200000 };
static struct {
  uint64_t hash;
  int called;
} fakeMeetings[FAKE_MEETINGS]; /* the newest ones */
static int fakeMeetingCount;
static _Thread_local struct fake_comm *fakeAwaited[FAKE_AWAITED]; /* by the thread's group */
static _Thread_local int fakeAwaitedCount;

/* Under the lock. Null: nobody has called. */
static int *fake_called(uint64_t hash) {
  for (int i = 0; i < FAKE_MEETINGS && i < fakeMeetingCount; i++)
    if (fakeMeetings[i].hash == hash) return &fakeMeetings[i].called;
  return NULL;
}

static int fake_all_called(const struct fake_comm *comm) {
  const int *called;
  int all = 1;

  if (!comm->awaits) return 1;
  pthread_mutex_lock(&fakeLock);
  called = fake_called(comm->hash);
  all = called && *called >= comm->nRanks;
  pthread_mutex_unlock(&fakeLock);
  return all;
}

/* Not for ever: a test whose ranks do not all come is to fail. */
static void fake_await_ranks(const struct fake_comm *comm) {
  for (int i = 0; i < FAKE_PATIENCE && !fake_all_called(comm); i++)
    nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
}

static void fake_group_await(void) {
  for (int i = 0; i < fakeAwaitedCount; i++) fake_await_ranks(fakeAwaited[i]);
  fakeAwaitedCount = 0;
}

/* The rank has called to make it; waits: here, or at the group's end. */
static void fake_join(struct fake_comm *comm, int waits) {
  int *called;

  if (!fakeState.awaitsRanks) return;
  pthread_mutex_lock(&fakeLock);
  comm->awaits = 1;
  called = fake_called(comm->hash);
  if (!called) {
    const int at = fakeMeetingCount++ % FAKE_MEETINGS;

    fakeMeetings[at].hash = comm->hash;
    fakeMeetings[at].called = 0;
    called = &fakeMeetings[at].called;
  }
  (*called)++;
  pthread_mutex_unlock(&fakeLock);
  if (!waits) return;
  if (fake_group_depth() == 0)
    fake_await_ranks(comm);
  else if (fakeAwaitedCount < FAKE_AWAITED)
    fakeAwaited[fakeAwaitedCount++] = comm;
}

static uint64_t fake_hash(const void *bytes, size_t nBytes) {
  uint64_t hash = 5381;

  for (size_t i = 0; i < nBytes; i++) {
    unsigned char byte;

    memcpy(&byte, (const char *)bytes + i, 1);
    hash = hash * 33 + byte;
  }
  return hash;
}

/* waits: the call does, outside a group, also where the communicator does not block. */
static int fake_comm_make_by_ids(void **comm, int nRanks, int rank, const fake_id *ids, int nIds,
                                 int blocking, int waits) {
  const int result =
      fake_comm_make(comm, nRanks, rank, fake_hash(ids, (size_t)nIds * sizeof(*ids)), blocking);

  if (result == FAKE_SUCCESS || result == FAKE_IN_PROGRESS)
    fake_join(*comm, result == FAKE_SUCCESS || (waits && fake_group_depth() == 0));
  return result;
}

FAKE_TWIN(ncclCommInitRank);
int pncclCommInitRank(void **comm, int nRanks, fake_id id, int rank) {
  int result;

  if (fakeState.result > 1) return fakeState.result;
  result = fake_comm_make_by_ids(comm, nRanks, rank, &id, 1, fake_blocking(NULL, 1), 1);
  if (result != FAKE_IN_PROGRESS || fake_group_depth() > 0) return result;
  ((struct fake_comm *)*comm)->busy = 0; /* this call waits in any case */
  return FAKE_SUCCESS;
}
FAKE_WEAK(ncclCommInitRank);

FAKE_TWIN(ncclCommInitRankConfig);
int pncclCommInitRankConfig(void **comm, int nRanks, fake_id id, int rank, void *config) {
  return fake_comm_make_by_ids(comm, nRanks, rank, &id, 1, fake_blocking(config, 1), 0);
}
FAKE_WEAK(ncclCommInitRankConfig);

FAKE_TWIN(ncclCommInitRankScalable);
int pncclCommInitRankScalable(void **comm, int nRanks, int rank, int nIds, const fake_id *ids, void *config) {
  return fake_comm_make_by_ids(comm, nRanks, rank, ids, nIds, fake_blocking(config, 1), 0);
}
FAKE_WEAK(ncclCommInitRankScalable);

FAKE_TWIN(ncclCommInitAll);
int pncclCommInitAll(void **comms, int nDevices, const int *devices) {
  static atomic_ullong count = 1000;
  const uint64_t hash = atomic_fetch_add(&count, 1);
  int result = FAKE_SUCCESS;

  (void)devices;
  for (int i = 0; i < nDevices && result != 2; i++)
    result = fake_comm_make(&comms[i], nDevices, i, hash, fake_blocking(NULL, 1));
  return result;
}
FAKE_WEAK(ncclCommInitAll);

/* ---- from others: at once, at the group's end, or when the parent is asked ---- */
enum { FAKE_CHILDREN = 64 };
struct fake_child {
  struct fake_comm *parent;
  void **place;
  uint64_t hash;
  const void *thread;
  int nRanks, rank, blocking;
};
static struct fake_child fakeChildren[FAKE_CHILDREN];
static int fakeChildCount;
static _Thread_local char fakeThread;

static void fake_child_make(const struct fake_child *child) {
  void *made = NULL;

  (void)fake_comm_make(&made, child->nRanks, child->rank, child->hash, child->blocking);
  if (made) ((struct fake_comm *)made)->busy = 0; /* its parent said so */
  __atomic_store_n(child->place, made, __ATOMIC_RELEASE);
}

/* Makes those of the thread's group, or those that a parent has. */
static void fake_children_make(const void *thread, const void *parent) {
  for (;;) {
    struct fake_child child = {0};

    pthread_mutex_lock(&fakeLock);
    for (int i = 0; i < fakeChildCount && !child.parent; i++) {
      if (thread ? fakeChildren[i].thread != thread || !fakeChildren[i].parent->blocking
                 : fakeChildren[i].parent != parent)
        continue;
      child = fakeChildren[i];
      fakeChildren[i] = fakeChildren[--fakeChildCount];
    }
    pthread_mutex_unlock(&fakeLock);
    if (!child.parent) return;
    fake_child_make(&child);
  }
}

static void fake_children_drop(const struct fake_comm *parent) {
  pthread_mutex_lock(&fakeLock);
  for (int i = fakeChildCount - 1; i >= 0; i--) {
    if (fakeChildren[i].parent == parent) fakeChildren[i] = fakeChildren[--fakeChildCount];
  }
  pthread_mutex_unlock(&fakeLock);
}

static int fake_child(struct fake_comm *parent, int colour, void **comm, const void *config) {
  struct fake_child child = {parent, comm, 0, &fakeThread, fakeState.childRanks, fakeState.childRank, 1};
  uint64_t words[3];
  int state = FAKE_SUCCESS;

  if (!parent) return FAKE_INVALID;
  if (!parent->blocking) (void)ncclCommGetAsyncError(parent, &state);
  if (state != FAKE_SUCCESS) return FAKE_INVALID;
  child.blocking = fake_blocking(config, parent->blocking);
  *comm = NULL;
  words[0] = parent->hash;
  words[1] = (uint64_t)++parent->nChildren;
  words[2] = (uint64_t)colour;
  child.hash = fake_hash(words, sizeof(words));
  if (colour == FAKE_NO_COLOUR) return FAKE_SUCCESS;
  if (fake_group_depth() == 0 && parent->blocking) {
    fake_child_make(&child);
    return FAKE_SUCCESS;
  }
  pthread_mutex_lock(&fakeLock);
  if (fakeChildCount < FAKE_CHILDREN) fakeChildren[fakeChildCount++] = child;
  pthread_mutex_unlock(&fakeLock);
  if (!parent->blocking) parent->busy = fakeState.polls;
  return parent->blocking || fakeState.lateSuccess ? FAKE_SUCCESS : FAKE_IN_PROGRESS;
}

FAKE_TWIN(ncclCommSplit);
int pncclCommSplit(void *parent, int colour, int key, void **comm, void *config) {
  (void)key;
  return fake_child(parent, colour, comm, config);
}
FAKE_WEAK(ncclCommSplit);

FAKE_TWIN(ncclCommShrink);
int pncclCommShrink(void *parent, int *excluded, int nExcluded, void **comm, void *config, int flags) {
  (void)excluded, (void)nExcluded, (void)flags;
  return fake_child(parent, 1 << 20, comm, config);
}
FAKE_WEAK(ncclCommShrink);

FAKE_TWIN(ncclCommGrow);
int pncclCommGrow(void *parent, int nRanks, const fake_id *id, int rank, void **comm, void *config) {
  const struct fake_comm *old = parent;

  int result;

  (void)id;
  result = fake_comm_make(comm, nRanks, old ? old->rank : rank, 31415,
                          fake_blocking(config, old ? old->blocking : 1));
  return result == FAKE_IN_PROGRESS && fakeState.lateSuccess ? FAKE_SUCCESS : result;
}
FAKE_WEAK(ncclCommGrow);

FAKE_TWIN(ncclCommGetAsyncError);
int pncclCommGetAsyncError(void *comm, int *error) {
  struct fake_comm *asked = comm;

  if (!fake_all_called(asked)) {
    *error = FAKE_IN_PROGRESS;
    return FAKE_SUCCESS;
  }
  *error = asked->busy > 0 ? FAKE_IN_PROGRESS : asked->error;
  if (asked->busy > 0) asked->busy--;
  if (*error == FAKE_SUCCESS) fake_children_make(NULL, comm);
  return FAKE_SUCCESS;
}
FAKE_WEAK(ncclCommGetAsyncError);

FAKE_TWIN(ncclGroupEnd);
int pncclGroupEnd(void) {
  const int result = fake_record((struct fake_call){.name = "ncclGroupEnd"}, -1);
  int pending = 0;

  if (fake_group_leave() > 0) return result;
  fake_group_await();
  fake_children_make(&fakeThread, NULL);
  pthread_mutex_lock(&fakeLock);
  for (int i = 0; i < fakeChildCount; i++) pending += fakeChildren[i].thread == &fakeThread;
  pthread_mutex_unlock(&fakeLock);
  pending += fakeGroupLater;
  fakeGroupLater = 0;
  return result == FAKE_SUCCESS && pending > 0 ? FAKE_IN_PROGRESS : result;
}
FAKE_WEAK(ncclGroupEnd);

FAKE_TWIN(ncclGroupSimulateEnd);
int pncclGroupSimulateEnd(void *info) {
  const int result = fake_record((struct fake_call){.name = "ncclGroupSimulateEnd", .recv = info}, -1);

  fake_group_drop();
  if (fake_group_leave() == 0) fake_children_make(&fakeThread, NULL);
  return result;
}
FAKE_WEAK(ncclGroupSimulateEnd);

/* ---- the end ---- */
static int fake_comm_end(struct fake_comm *comm, const char *name) {
  const int result = fake_record((struct fake_call){.name = name, .comm = comm}, 0);

  if (!comm) return FAKE_INVALID;
  fake_children_drop(comm);
  fake_plugins_close(comm);
  pthread_mutex_lock(&fakeLock);
  fakeState.comms--;
  pthread_mutex_unlock(&fakeLock);
  free(comm);
  return result;
}

FAKE_TWIN(ncclCommDestroy);
int pncclCommDestroy(void *comm) {
  return fake_comm_end(comm, "ncclCommDestroy");
}
FAKE_WEAK(ncclCommDestroy);

FAKE_TWIN(ncclCommAbort);
int pncclCommAbort(void *comm) {
  return fake_comm_end(comm, "ncclCommAbort");
}
FAKE_WEAK(ncclCommAbort);

FAKE_TWIN(ncclCommRevoke);
int pncclCommRevoke(void *comm, int flags) {
  const int result = fake_record((struct fake_call){.name = "ncclCommRevoke", .comm = comm}, 0);

  return flags == 0 ? result : FAKE_INVALID;
}
FAKE_WEAK(ncclCommRevoke);

FAKE_TWIN(ncclCommFinalize);
int pncclCommFinalize(void *comm) {
  return fake_record((struct fake_call){.name = "ncclCommFinalize", .comm = comm}, 0);
}
FAKE_WEAK(ncclCommFinalize);
