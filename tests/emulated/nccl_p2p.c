/* Meetings of ranks, operations and their tasks in streams, groups. */
#include "nccl_emulated.h"

#include "emulated.h"

#include <stdlib.h>
#include <string.h>

#define NO_TICKET UINT64_MAX /* of a task that was captured */

/* ---- meetings ---- */

typedef enum { MEET_ALL, MEET_PAIR, MEET_HOST } meetKind_t;

/* Which meeting: the number counts operations of a kind, for a pair those of the pair. */
typedef struct {
  meetKind_t kind;
  int from, to; /* of a pair */
  uint64_t number;
} meetKey_t;

/* Where ranks wait for each other. The one that completes it does what is to be done, for all. */
struct ncclMeeting {
  ncclMeeting_t *next;
  meetKey_t key;
  int nPlaces, nCome, nUsers;
  bool isRunning, isDone;
  int result;
  ncclPlace_t places[]; /* by rank; of a pair: the sender, the receiver */
};

/* Counts the operation. */
static meetKey_t meeting_number(ncclComm_t comm, const ncclOp_t *op) {
  switch (op->kind) {
  case NCCL_SEND:
    return (meetKey_t){MEET_PAIR, comm->rank, op->root, comm->nSent[op->root]++};
  case NCCL_RECV:
    return (meetKey_t){MEET_PAIR, op->root, comm->rank, comm->nReceived[op->root]++};
  case NCCL_INIT:
  case NCCL_SPLIT:
  case NCCL_REGISTER:
    return (meetKey_t){MEET_HOST, 0, 0, comm->nHostCalls++};
  default:
    return (meetKey_t){MEET_ALL, 0, 0, comm->nCollectives++};
  }
}

static ncclMeeting_t *meeting_find(ncclWorld_t *world, meetKey_t key) {
  for (ncclMeeting_t *m = world->meetings; m; m = m->next)
    if (m->key.kind == key.kind && m->key.from == key.from && m->key.to == key.to &&
        m->key.number == key.number)
      return m;
  int nPlaces = key.kind == MEET_PAIR ? 2 : world->nRanks;
  ncclMeeting_t *made = nccl_need(1, sizeof(*made) + (size_t)nPlaces * sizeof(ncclPlace_t));
  made->key = key;
  made->nPlaces = nPlaces;
  made->next = world->meetings;
  world->meetings = made;
  return made;
}

static ncclPlace_t *meeting_place(ncclMeeting_t *meeting, ncclComm_t comm, const ncclOp_t *op) {
  return &meeting->places[meeting->key.kind == MEET_PAIR ? op->kind == NCCL_RECV : comm->rank];
}

static ncclMeeting_t *meeting_join(ncclComm_t comm, const ncclOp_t *op) {
  ncclMeeting_t *meeting = meeting_find(comm->world, meeting_number(comm, op));
  *meeting_place(meeting, comm, op) = (ncclPlace_t){comm, op};
  meeting->nCome++;
  meeting->nUsers++;
  return meeting;
}

/* ---- what is copied; without the lock ---- */

/* Bytes of an element by NCCL's code of its type, 0: there is none. */
static size_t type_bytes(int type) {
  static const unsigned char bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return type >= 0 && (size_t)type < sizeof(bytes) ? bytes[type] : 0;
}

/* In place, or overlapping where a rank receives from itself. */
static void op_copy(void *to, size_t toOffset, const void *from, size_t fromOffset, size_t bytes) {
  char *target = bytes > 0 ? (char *)to + toOffset : NULL;
  const char *source = bytes > 0 ? (const char *)from + fromOffset : NULL;
  if (target != source) memmove(target, source, bytes);
}

enum { REDUCE_INT32 = 2, REDUCE_FLOAT = 7 }; /* ncclInt32, ncclFloat32: no others are reduced */

/* The sum is made in a place of its own, and in the order of ranks: any rank's buffer may be in place. */
static void op_reduce(const ncclPlace_t *places, int n, size_t bytes) {
  const ncclOp_t *first = places[0].op;
  void *sum = nccl_need(bytes, 1);
  for (int r = 0; r < n; r++)
    for (size_t i = 0; i < first->count; i++)
      if (first->type == REDUCE_FLOAT)
        ((float *)sum)[i] += ((const float *)places[r].op->send)[i];
      else
        ((uint32_t *)sum)[i] += ((const uint32_t *)places[r].op->send)[i];
  for (int r = 0; r < n; r++) memcpy(places[r].op->recv, sum, bytes);
  free(sum);
}

static void op_move(const ncclPlace_t *places, int n, size_t bytes) {
  const ncclOp_t *first = places[0].op, *root = places[first->root].op;
  for (int d = 0; d < n; d++) {
    void *to = places[d].op->recv;
    size_t at = (size_t)d * bytes;
    switch (first->kind) {
    case NCCL_ALL_GATHER:
      for (int s = 0; s < n; s++) op_copy(to, (size_t)s * bytes, places[s].op->send, 0, bytes);
      break;
    case NCCL_ALL_TO_ALL:
      for (int s = 0; s < n; s++) op_copy(to, (size_t)s * bytes, places[s].op->send, at, bytes);
      break;
    case NCCL_BROADCAST:
      op_copy(to, 0, root->send, 0, bytes);
      break;
    case NCCL_SCATTER:
      op_copy(to, 0, root->send, at, bytes);
      break;
    default: /* NCCL_GATHER */
      op_copy(root->recv, at, places[d].op->send, 0, bytes);
    }
  }
}

/* Ranks that are in different calls: NCCL would hang or write wrong data, here it is an error on all. */
static int op_collective(const ncclPlace_t *places, int n) {
  const ncclOp_t *first = places[0].op;
  size_t bytes = first->count * type_bytes(first->type);
  for (int r = 1; r < n; r++) {
    const ncclOp_t *op = places[r].op;
    if (op->kind != first->kind || op->count != first->count || op->type != first->type ||
        op->root != first->root)
      return NCCL_INVALID_USAGE;
  }
  if (first->kind == NCCL_ALL_REDUCE)
    op_reduce(places, n, bytes);
  else
    op_move(places, n, bytes);
  return NCCL_SUCCESS;
}

/* A receive may have room for more than is sent. */
static int op_transfer(const ncclOp_t *send, const ncclOp_t *recv) {
  size_t sent = send->count * type_bytes(send->type), room = recv->count * type_bytes(recv->type);
  op_copy(recv->recv, 0, send->send, 0, sent < room ? sent : room);
  return sent <= room ? NCCL_SUCCESS : NCCL_INVALID_USAGE;
}

/* ---- a rank at its meetings; with the lock ---- */

static void meeting_end(ncclMeeting_t *meeting, int result) {
  meeting->result = result;
  meeting->isDone = true;
  for (int i = 0; i < meeting->nPlaces; i++) {
    ncclComm_t comm = meeting->places[i].comm;
    if (!comm) continue; /* it was aborted */
    if (result != NCCL_SUCCESS && meeting->key.kind != MEET_HOST) comm->result = result;
    (void)pthread_cond_broadcast(&comm->changed);
  }
}

static void meeting_perform(ncclMeeting_t *meeting) {
  const ncclPlace_t *places = meeting->places;
  int result;
  meeting->isRunning = true;
  if (meeting->key.kind == MEET_HOST) {
    result = nccl_host_perform(places, meeting->nPlaces);
  } else {
    nccl_unlock();
    result = meeting->key.kind == MEET_PAIR ? op_transfer(places[0].op, places[1].op)
                                            : op_collective(places, meeting->nPlaces);
    nccl_lock();
  }
  meeting_end(meeting, result);
}

static void meeting_free(ncclWorld_t *world, ncclMeeting_t *meeting) {
  ncclMeeting_t **link = &world->meetings;
  while (*link != meeting) link = &(*link)->next;
  *link = meeting->next;
  free(meeting);
}

static bool op_is_aborted(ncclComm_t comm, const ncclOp_t *op) {
  return comm->isAborted || (op->job && op->job->child && op->job->child->isAborted);
}

/* What an abort of one rank is to the others in a collective with it: they go on waiting, or, as NCCL's
 * kernels do at times, they end as if all had come, with nothing received. */
static bool abort_ends_others(void) {
  const char *text = getenv("EMULATED_NCCL_ABORT_ENDS");
  return text && strcmp(text, "1") == 0;
}

/* Nobody leaves while somebody copies from or to its buffers; a rank that was aborted leaves before that. */
static int meeting_leave(ncclMeeting_t *meeting, ncclComm_t comm, const ncclOp_t *op) {
  while (!meeting->isDone && (meeting->isRunning || !op_is_aborted(comm, op)))
    (void)pthread_cond_wait(&comm->changed, &ncclLock);
  int result = meeting->isDone ? meeting->result : NCCL_INTERNAL_ERROR;
  if (!meeting->isDone) {
    *meeting_place(meeting, comm, op) = (ncclPlace_t){NULL, NULL};
    meeting->nCome--;
    if (meeting->key.kind == MEET_ALL && abort_ends_others()) meeting_end(meeting, NCCL_SUCCESS);
  }
  if (--meeting->nUsers == 0) meeting_free(comm->world, meeting);
  return result;
}

int nccl_ops_run(ncclComm_t comm, const ncclOp_t *ops, int n) {
  ncclMeeting_t **meetings = nccl_need((size_t)n, sizeof(ncclMeeting_t *));
  int result = NCCL_SUCCESS;
  /* All are there before any is waited for: the operations of a group need no order. */
  for (int i = 0; i < n; i++) meetings[i] = meeting_join(comm, &ops[i]);
  for (int i = 0; i < n; i++)
    if (meetings[i]->nCome == meetings[i]->nPlaces && !meetings[i]->isRunning && !meetings[i]->isDone)
      meeting_perform(meetings[i]);
  for (int i = 0; i < n; i++) result = nccl_worse(result, meeting_leave(meetings[i], comm, &ops[i]));
  free(meetings);
  return result;
}

/* ---- tasks of streams ---- */

/* The operations of one group on one communicator: copied into the stream or the graph. */
typedef struct {
  uint64_t serial, ticket;
  int nOps;
  ncclOp_t ops[];
} task_t;

static void task_run(void *argument) {
  const task_t *task = argument;
  bool hasTicket = task->ticket != NO_TICKET;
  nccl_lock();
  ncclComm_t comm = nccl_comm_find(task->serial);
  if (comm) {
    comm->nRunning++;
    while (hasTicket && !comm->isAborted && comm->started != task->ticket)
      (void)pthread_cond_wait(&comm->changed, &ncclLock);
    if (hasTicket) comm->started++;
    (void)pthread_cond_broadcast(&comm->changed);
    (void)nccl_ops_run(comm, task->ops, task->nOps);
    if (hasTicket) comm->finished++;
    comm->nRunning--;
    (void)pthread_cond_broadcast(&comm->changed);
    nccl_comm_drop(comm);
  }
  nccl_unlock();
}

static void task_count(ncclComm_t comm, int change) {
  nccl_lock();
  comm->issued += (uint64_t)(int64_t)change;
  (void)pthread_cond_broadcast(&comm->changed);
  nccl_unlock();
}

static int task_enqueue(ncclComm_t comm, task_t *task, cudaStream_t stream) {
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess) return NCCL_CUDA_ERROR;
  bool isCaptured = capture != cudaStreamCaptureStatusNone;
  (void)pthread_mutex_lock(&comm->order);
  task->serial = comm->serial;
  task->ticket = isCaptured ? NO_TICKET : comm->issued;
  if (!isCaptured) task_count(comm, 1);
  cudaError_t error =
      emulated_enqueue(stream, task_run, task, sizeof(*task) + (size_t)task->nOps * sizeof(ncclOp_t));
  if (error != cudaSuccess && !isCaptured) task_count(comm, -1);
  (void)pthread_mutex_unlock(&comm->order);
  return error == cudaSuccess ? NCCL_SUCCESS : NCCL_CUDA_ERROR;
}

/* ---- groups ---- */

typedef struct {
  ncclComm_t comm; /* held; null: launched */
  cudaStream_t stream;
  ncclOp_t op;
} groupOp_t;

typedef struct {
  int depth, result;
  groupOp_t *ops;
  size_t nOps, room;
  ncclJob_t *jobs, *lastJob;
} group_t;

static _Thread_local group_t threadGroup;

void nccl_group_enter(void) {
  threadGroup.depth++;
}

void nccl_group_add_job(ncclJob_t *job) {
  group_t *group = &threadGroup;
  if (group->lastJob)
    group->lastJob->next = job;
  else
    group->jobs = job;
  group->lastJob = job;
}

int nccl_group_fail(int result) {
  if (threadGroup.depth > 0 && threadGroup.result == NCCL_SUCCESS) threadGroup.result = result;
  return result;
}

static void group_add_op(const groupOp_t *op) {
  group_t *group = &threadGroup;
  if (group->nOps == group->room) {
    group->room = group->room ? 2 * group->room : 16;
    group->ops = realloc(group->ops, group->room * sizeof(*group->ops));
    if (!group->ops) abort();
  }
  group->ops[group->nOps++] = *op;
}

/* One event orders a stream of the group with the one that the task is in. */
static cudaError_t group_join_stream(cudaStream_t first, cudaStream_t second) {
  cudaEvent_t event;
  cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error != cudaSuccess) return error;
  error = cudaEventRecord(event, first);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(second, event, 0);
  (void)cudaEventDestroy(event);
  return error;
}

/* The task is in the first operation's stream; it begins after what is in the others, and they go on after
 * it. */
static int group_join(const cudaStream_t *streams, int n, bool isBefore) {
  cudaError_t error = cudaSuccess;
  for (int i = 1; i < n && error == cudaSuccess; i++) {
    bool isNew = true;
    for (int j = 0; j < i && isNew; j++) isNew = streams[j] != streams[i];
    if (!isNew) continue;
    error = isBefore ? group_join_stream(streams[i], streams[0]) : group_join_stream(streams[0], streams[i]);
  }
  return error == cudaSuccess ? NCCL_SUCCESS : NCCL_CUDA_ERROR;
}

/* The first operation of a communicator that does not block says that it is in progress, as while NCCL makes
 * connections; it has done so when it is asked. */
static int group_launched(ncclComm_t comm) {
  nccl_lock();
  bool isFirst = !comm->isConnected;
  comm->isConnected = true;
  nccl_unlock();
  return isFirst && !comm->isBlocking ? NCCL_IN_PROGRESS : NCCL_SUCCESS;
}

/* On the communicator's device, whatever is the caller's. */
static int group_enqueue(ncclComm_t comm, task_t *task, const cudaStream_t *streams) {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(comm->device) != cudaSuccess)
    return NCCL_CUDA_ERROR;
  int result = group_join(streams, task->nOps, true);
  if (result == NCCL_SUCCESS) result = task_enqueue(comm, task, streams[0]);
  if (result == NCCL_SUCCESS) result = group_join(streams, task->nOps, false);
  (void)cudaSetDevice(before);
  return result;
}

/* All operations on the communicator of the first one, which become one task. */
static int group_launch(groupOp_t *ops, size_t n) {
  ncclComm_t comm = ops[0].comm;
  task_t *task = nccl_need(1, sizeof(*task) + n * sizeof(ncclOp_t));
  cudaStream_t *streams = nccl_need(n, sizeof(cudaStream_t));
  for (size_t i = 0; i < n; i++) {
    if (ops[i].comm != comm) continue;
    streams[task->nOps] = ops[i].stream;
    task->ops[task->nOps++] = ops[i].op;
    if (i > 0) nccl_comm_release(comm);
    ops[i].comm = NULL;
  }
  int result = group_enqueue(comm, task, streams);
  if (result == NCCL_SUCCESS) result = group_launched(comm);
  nccl_comm_release(comm);
  free(streams);
  free(task);
  return result;
}

int nccl_group_leave(void) {
  group_t group = threadGroup;
  if (group.depth == 0) return nccl_fail(NCCL_INVALID_USAGE, "a group ends that did not start");
  if (--threadGroup.depth > 0) return NCCL_SUCCESS;
  threadGroup = (group_t){0};
  int result = group.result;
  if (result == NCCL_SUCCESS)
    result = nccl_jobs_run(group.jobs);
  else
    nccl_jobs_cancel(group.jobs);
  for (size_t i = 0; i < group.nOps; i++) {
    if (!group.ops[i].comm) continue;
    if (result == NCCL_SUCCESS || result == NCCL_IN_PROGRESS)
      result = nccl_worse(result, group_launch(&group.ops[i], group.nOps - i));
    else
      nccl_comm_release(group.ops[i].comm);
  }
  free(group.ops);
  return result;
}

/* ---- NCCL's functions ---- */

static bool op_sends(const ncclOp_t *op, int rank) {
  bool isRooted = op->kind == NCCL_BROADCAST || op->kind == NCCL_SCATTER;
  return op->kind != NCCL_RECV && (!isRooted || rank == op->root);
}

static bool op_receives(const ncclOp_t *op, int rank) {
  return op->kind != NCCL_SEND && (op->kind != NCCL_GATHER || rank == op->root);
}

static int op_check(ncclComm_t comm, const ncclOp_t *op) {
  bool isSum = op->type == REDUCE_INT32 || op->type == REDUCE_FLOAT;
  if (type_bytes(op->type) == 0) return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such type");
  if (op->kind == NCCL_ALL_REDUCE && (op->root != 0 || !isSum))
    return nccl_fail(NCCL_INVALID_ARGUMENT, "only sums of float and int32 are emulated");
  if (op->root < 0 || op->root >= comm->world->nRanks)
    return nccl_fail(NCCL_INVALID_ARGUMENT, "there is no such root or peer");
  if (op->count > 0 &&
      ((op_sends(op, comm->rank) && !op->send) || (op_receives(op, comm->rank) && !op->recv)))
    return nccl_fail(NCCL_INVALID_ARGUMENT, "a buffer is null");
  return NCCL_SUCCESS;
}

static int op_issue(ncclOp_t op, ncclComm_t comm, cudaStream_t stream) {
  int result = nccl_comm_use(comm);
  if (result != NCCL_SUCCESS) return nccl_group_fail(result);
  result = op_check(comm, &op);
  /* NCCL drops empty collectives; empty sends and receives it exchanges. */
  bool isEmpty = op.count == 0 && op.kind != NCCL_SEND && op.kind != NCCL_RECV;
  if (result != NCCL_SUCCESS || isEmpty) {
    nccl_comm_release(comm);
    return nccl_group_fail(result);
  }
  nccl_group_enter();
  group_add_op(&(groupOp_t){comm, stream, op});
  return nccl_group_leave();
}

NCCL_EXPORT int ncclGroupStart(void) {
  nccl_group_enter();
  return NCCL_SUCCESS;
}
NCCL_TWIN(ncclGroupStart);

NCCL_EXPORT int ncclGroupEnd(void) {
  return nccl_group_leave();
}
NCCL_TWIN(ncclGroupEnd);

NCCL_EXPORT int ncclSend(const void *buffer, size_t count, int type, int peer, ncclComm_t comm,
                         cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_SEND, buffer, NULL, count, type, peer, NULL}, comm, stream);
}
NCCL_TWIN(ncclSend);

NCCL_EXPORT int ncclRecv(void *buffer, size_t count, int type, int peer, ncclComm_t comm,
                         cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_RECV, NULL, buffer, count, type, peer, NULL}, comm, stream);
}
NCCL_TWIN(ncclRecv);

NCCL_EXPORT int ncclAllGather(const void *send, void *recv, size_t count, int type, ncclComm_t comm,
                              cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_ALL_GATHER, send, recv, count, type, 0, NULL}, comm, stream);
}
NCCL_TWIN(ncclAllGather);

NCCL_EXPORT int ncclAllReduce(const void *send, void *recv, size_t count, int type, int operator,
                              ncclComm_t comm, cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_ALL_REDUCE, send, recv, count, type, operator, NULL}, comm, stream);
}
NCCL_TWIN(ncclAllReduce);

NCCL_EXPORT int ncclBroadcast(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
                              cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_BROADCAST, send, recv, count, type, root, NULL}, comm, stream);
}
NCCL_TWIN(ncclBroadcast);

NCCL_EXPORT int ncclAlltoAll(const void *send, void *recv, size_t count, int type, ncclComm_t comm,
                             cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_ALL_TO_ALL, send, recv, count, type, 0, NULL}, comm, stream);
}
NCCL_TWIN(ncclAlltoAll);

NCCL_EXPORT int ncclGather(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_GATHER, send, recv, count, type, root, NULL}, comm, stream);
}
NCCL_TWIN(ncclGather);

NCCL_EXPORT int ncclScatter(const void *send, void *recv, size_t count, int type, int root, ncclComm_t comm,
                            cudaStream_t stream) {
  return op_issue((ncclOp_t){NCCL_SCATTER, send, recv, count, type, root, NULL}, comm, stream);
}
NCCL_TWIN(ncclScatter);
