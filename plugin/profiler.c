/* NCCL's profiler role: the second source of the traffic record (traffic.h), and the way to another profiler
 * library. Every table is the same few functions; only the events differ (profiler_event.h).
 *
 * Where calls are taken over, a send or receive that NCCL tells of has mostly been counted already: the
 * record shows the larger count. An event counts by its communicator's handle, which the interface does not
 * give: comm_id.h finds it. Where it cannot, and calls are taken over, the event is not counted, for nobody
 * could say whether its call was; where nothing is taken over, the events have a record of their own.
 *
 * Up to v3 nobody is told how many ranks there are: the record then has as many as were seen so far. */
#include "comm_id.h"
#include "p2p.h"
#include "profiler_forward.h"
#include "takeover.h"
#include "traffic.h"

#include <pthread.h>
#include <stdlib.h>

#define PROFILER_NAME "UltraEP"

enum {
  PROFILER_MASK = NCCL_ABI_EVENT_P2P | NCCL_ABI_EVENT_COLL, /* without the second, 2.24 keeps the first */
  PROFILER_CHUNK = 64
};

/* A context. Never given back to the system while the library is loaded: events may come with contexts that
 * are another process's, and only what lies in a chunk is looked into. */
typedef struct profiler_comm {
  comm_told_t told;
  profiler_forward_t forward;
  bool counts;
  int *mask; /* NCCL's: one for all its communicators */
  struct profiler_comm *nextFree;
} profiler_comm_t;

typedef struct profiler_chunk {
  profiler_comm_t comms[PROFILER_CHUNK];
  int nUsed;
  struct profiler_chunk *_Atomic next;
} profiler_chunk_t;

static pthread_mutex_t profilerLock = PTHREAD_MUTEX_INITIALIZER;
static profiler_chunk_t profilerFirst;
static profiler_comm_t *profilerFree;
static char profilerGroup;         /* the handle of groups' events */
static atomic_bool profilerCounts; /* any communicator */

/* ---- contexts ---- */
static profiler_comm_t *profiler_comm_take_locked(void) {
  profiler_chunk_t *chunk = &profilerFirst;
  profiler_comm_t *comm = profilerFree;

  if (comm) {
    profilerFree = comm->nextFree;
    return comm;
  }
  while (chunk->nUsed == PROFILER_CHUNK && atomic_load(&chunk->next)) chunk = atomic_load(&chunk->next);
  if (chunk->nUsed == PROFILER_CHUNK) {
    profiler_chunk_t *more = calloc(1, sizeof(*more));

    if (!more) return NULL;
    atomic_store(&chunk->next, more);
    chunk = more;
  }
  return &chunk->comms[chunk->nUsed++];
}

static profiler_comm_t *profiler_comm_take(void) {
  profiler_comm_t *comm;

  pthread_mutex_lock(&profilerLock);
  comm = profiler_comm_take_locked();
  pthread_mutex_unlock(&profilerLock);
  return comm;
}

static void profiler_comm_put(profiler_comm_t *comm) {
  pthread_mutex_lock(&profilerLock);
  comm->nextFree = profilerFree;
  profilerFree = comm;
  pthread_mutex_unlock(&profilerLock);
}

/* Null for what is no context of this process. */
static profiler_comm_t *profiler_comm_of(const void *context) {
  for (profiler_chunk_t *chunk = &profilerFirst; chunk && context; chunk = atomic_load(&chunk->next)) {
    const uintptr_t offset = (uintptr_t)context - (uintptr_t)chunk->comms;

    if (offset < sizeof(chunk->comms) && offset % sizeof(profiler_comm_t) == 0)
      return &chunk->comms[offset / sizeof(profiler_comm_t)];
  }
  return NULL;
}

__attribute__((destructor)) static void profiler_chunks_free(void) {
  profiler_chunk_t *chunk = atomic_exchange(&profilerFirst.next, NULL);

  while (chunk) {
    profiler_chunk_t *next = atomic_load(&chunk->next);

    free(chunk);
    chunk = next;
  }
}

/* ---- the mask ---- */
/* The other library may change its mind at any time; nobody tells us, so every call looks. */
static void profiler_mask_set(int *mask) {
  const int wanted = (atomic_load_explicit(&profilerCounts, memory_order_relaxed) ? PROFILER_MASK : 0) |
                     profiler_forward_mask();

  if (mask && __atomic_load_n(mask, __ATOMIC_RELAXED) != wanted)
    __atomic_store_n(mask, wanted, __ATOMIC_RELAXED);
}

/* ---- a communicator's begin and end ---- */
static ultraepResult_t profiler_init(const profiler_init_t *init, void **context, int *mask) {
  profiler_comm_t *comm = profiler_comm_take();

  *context = comm;
  takeover_start_at(mask, init->logger); /* NCCL's own variable; up to v3 there is no logger */
  if (!comm) return ultraepSuccess;
  comm->told.place = (uintptr_t)context;
  comm->told.id = init->commHash;
  comm->told.rank = init->rank;
  comm->told.nRanks = init->nRanks;
  comm->told.role = COMM_TOLD_PROFILER;
  comm->counts = !takeover_is_preloaded();
  comm_told_add(&comm->told);
  profiler_forward_init(&comm->forward, init);
  if (comm->counts) atomic_store(&profilerCounts, true);
  comm->mask = mask;
  profiler_mask_set(mask);
  return ultraepSuccess;
}

static ultraepResult_t profiler_finalize(void *context) {
  profiler_comm_t *comm = profiler_comm_of(context);

  if (!comm) return ultraepSuccess;
  p2p_comm_gone(comm_told_remove(&comm->told));
  p2p_comm_gone(comm);
  profiler_forward_finalize(&comm->forward);
  profiler_comm_put(comm);
  return ultraepSuccess;
}

/* ---- counting ---- */
static trafficComm_t *profiler_record_alone(profiler_comm_t *comm, const profiler_facts_t *facts) {
  const uint64_t id = comm->told.id != 0 ? comm->told.id : facts->commHash;
  const int seen = 1 + (facts->rank > facts->peer ? facts->rank : facts->peer);
  trafficComm_t *record = traffic_comm_find(comm);

  if (comm->told.nRanks > 0)
    return record ? record : traffic_comm_open(comm, id, comm->told.rank, comm->told.nRanks);
  return record ? traffic_comm_grow(record, seen) : traffic_comm_open(comm, id, facts->rank, seen);
}

/* Null where the event is not to be counted. */
static trafficComm_t *profiler_record(profiler_comm_t *comm, const profiler_facts_t *facts) {
  const void *handle = comm_told_comm(&comm->told);
  trafficComm_t *record = handle ? traffic_comm_find(handle) : NULL;

  if (!comm->counts || atomic_load(&comm->told.ended)) return NULL;
  if (record) return record;
  if (handle && comm->told.nRanks > 0)
    return traffic_comm_open(handle, comm->told.id, comm->told.rank, comm->told.nRanks);
  return takeover_slots() == 0 ? profiler_record_alone(comm, facts) : NULL;
}

static void profiler_count(profiler_comm_t *comm, const profiler_facts_t *facts) {
  if (facts->isSend || facts->isRecv)
    traffic_count_event(profiler_record(comm, facts), facts->isSend ? TRAFFIC_SEND : TRAFFIC_RECV,
                        facts->peer, facts->bytes);
}

/* ---- events ---- */
static ultraepResult_t profiler_start(int version, void *context, void **handle, void *event) {
  profiler_comm_t *comm = profiler_comm_of(context);
  profiler_facts_t facts;

  *handle = NULL;
  if (!event) return ultraepSuccess;
  profiler_event_read(version, event, &facts);
  if (comm) profiler_count(comm, &facts);
  /* The child of a group that the other library does not have is none of its, either. */
  if (facts.parent != &profilerGroup)
    profiler_forward_start(comm ? &comm->forward : NULL, version, &facts, event, handle);
  if (facts.type == NCCL_ABI_EVENT_GROUP && !*handle) *handle = &profilerGroup;
  if (comm) profiler_mask_set(comm->mask);
  return ultraepSuccess;
}

static ultraepResult_t profiler_stop(void *handle) {
  if (handle && handle != &profilerGroup) profiler_forward_stop(handle);
  return ultraepSuccess;
}

static ultraepResult_t profiler_state(int version, void *handle, int state, void *arguments) {
  if (handle && handle != &profilerGroup) profiler_forward_state(version, handle, state, arguments);
  return ultraepSuccess;
}

/* ---- the tables ---- */
#define PROFILER_EVENTS(n)                                                                                   \
  static ultraepResult_t profiler_start_v##n(void *context, void **handle, void *event) {                    \
    return profiler_start(n, context, handle, event);                                                        \
  }                                                                                                          \
  static ultraepResult_t profiler_state_v##n(void *handle, int state, void *arguments) {                     \
    return profiler_state(n, handle, state, arguments);                                                      \
  }

#define PROFILER_INIT_OLD(n)                                                                                 \
  static ultraepResult_t profiler_init_v##n(void **context, int *mask) {                                     \
    return profiler_init(&(profiler_init_t){.version = (n), .rank = -1}, context, mask);                     \
  }

#define PROFILER_INIT_NEW(n)                                                                                 \
  static ultraepResult_t profiler_init_v##n(void **context, uint64_t commHash, int *mask,                    \
                                            const char *commName, int nNodes, int nRanks, int rank,          \
                                            nccl_abi_logger_t logger) {                                      \
    return profiler_init(&(profiler_init_t){(n), commName, commHash, nNodes, nRanks, rank, logger}, context, \
                         mask);                                                                              \
  }

#define PROFILER_TABLE(n)                                                                                    \
  {                                                                                                          \
    .name = PROFILER_NAME, .init = profiler_init_v##n, .startEvent = profiler_start_v##n,                    \
    .stopEvent = profiler_stop, .recordEventState = profiler_state_v##n, .finalize = profiler_finalize       \
  }

static ultraepResult_t profiler_init_v4(void **context, int *mask, const char *commName, uint64_t commHash,
                                        int nNodes, int nRanks, int rank, nccl_abi_logger_t logger) {
  return profiler_init(&(profiler_init_t){4, commName, commHash, nNodes, nRanks, rank, logger}, context,
                       mask);
}

PROFILER_INIT_OLD(1)
PROFILER_INIT_OLD(2)
PROFILER_INIT_OLD(3)
PROFILER_INIT_NEW(5)
PROFILER_INIT_NEW(6)
PROFILER_INIT_NEW(7)
PROFILER_EVENTS(1)
PROFILER_EVENTS(2)
PROFILER_EVENTS(3)
PROFILER_EVENTS(4)
PROFILER_EVENTS(5)
PROFILER_EVENTS(6)
PROFILER_EVENTS(7)

const nccl_abi_profiler_v1_t ncclProfiler_v1 = PROFILER_TABLE(1);
const nccl_abi_profiler_v1_t ncclProfiler_v2 = PROFILER_TABLE(2);
const nccl_abi_profiler_v1_t ncclProfiler_v3 = PROFILER_TABLE(3);
const nccl_abi_profiler_v4_t ncclProfiler_v4 = PROFILER_TABLE(4);
const nccl_abi_profiler_v5_t ncclProfiler_v5 = PROFILER_TABLE(5);
const nccl_abi_profiler_v5_t ncclProfiler_v6 = PROFILER_TABLE(6);
const nccl_abi_profiler_v5_t ncclProfiler_v7 = PROFILER_TABLE(7);
