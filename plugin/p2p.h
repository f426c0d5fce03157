/* NCCL's calls that move data between two ranks, and those that make and end communicators, in our version:
 * each calls the original unchanged, or leaves a send or receive to schedule.h, and counts what was issued in
 * the traffic record, or notes which communicator it is (comm_id.h). Both ways to take the calls share it:
 * slots pointed here (takeover.h) and the preload library (preload.c).
 *
 * NCCL's handles and enums are void * and int here: the same size. */
#ifndef ULTRAEP_P2P_H_
#define ULTRAEP_P2P_H_

#include <stdbool.h>
#include <stddef.h>

enum p2p_call {
  P2P_SEND,
  P2P_RECV,
  P2P_GROUP_START,
  P2P_GROUP_END,
  P2P_ALLTOALL,   /* ncclAlltoAll */
  P2P_ALL_TO_ALL, /* ncclAllToAll: the other spelling */
  P2P_GATHER,
  P2P_SCATTER,
  P2P_PUT_SIGNAL,
  P2P_COMM_DESTROY,
  P2P_COMM_ABORT,
  P2P_COMM_FINALIZE,
  P2P_COMM_INIT_RANK,
  P2P_COMM_INIT_RANK_CONFIG,
  P2P_COMM_INIT_RANK_SCALABLE,
  P2P_COMM_INIT_ALL,
  P2P_COMM_SPLIT,
  P2P_COMM_SHRINK,
  P2P_COMM_GROW,
  P2P_COMM_ASYNC_ERROR,
  P2P_COMM_REVOKE,
  P2P_GROUP_SIMULATE_END,
  P2P_CALLS
};

enum {
  P2P_NCCL_SUCCESS = 0,
  P2P_NCCL_CUDA_ERROR = 1,
  P2P_NCCL_SYSTEM_ERROR = 2,
  P2P_NCCL_INVALID_ARGUMENT = 4,
  P2P_NCCL_INVALID_USAGE = 5, /* an original that this NCCL does not have was called */
  P2P_NCCL_REMOTE_ERROR = 6,
  P2P_NCCL_IN_PROGRESS = 7
};
/* NCCL has taken the call, and may be done with it. */
static inline bool p2p_issued(int result) {
  return result == P2P_NCCL_SUCCESS || result == P2P_NCCL_IN_PROGRESS;
}

typedef int (*p2p_send_fn)(const void *buffer, size_t count, int type, int peer, void *comm, void *stream);
typedef int (*p2p_recv_fn)(void *buffer, size_t count, int type, int peer, void *comm, void *stream);
typedef int (*p2p_group_fn)(void);
typedef int (*p2p_all_fn)(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
typedef int (*p2p_rooted_fn)(const void *send, void *recv, size_t count, int type, int root, void *comm,
                             void *stream);
typedef int (*p2p_put_fn)(const void *buffer, size_t count, int type, int peer, void *window, size_t offset,
                          int signal, int context, unsigned flags, void *comm, void *stream);
typedef int (*p2p_comm_fn)(void *comm);
typedef int (*p2p_ask_fn)(const void *comm, int *value);

/* ncclUniqueId, which is passed by value. */
typedef struct {
  char bytes[128];
} p2p_unique_id_t;

typedef int (*p2p_init_rank_fn)(void **comm, int nRanks, p2p_unique_id_t id, int rank);
typedef int (*p2p_init_rank_config_fn)(void **comm, int nRanks, p2p_unique_id_t id, int rank, void *config);
typedef int (*p2p_init_rank_scalable_fn)(void **comm, int nRanks, int rank, int nIds,
                                         const p2p_unique_id_t *ids, void *config);
typedef int (*p2p_init_all_fn)(void **comms, int nDevices, const int *devices);
typedef int (*p2p_split_fn)(void *parent, int colour, int key, void **comm, void *config);
typedef int (*p2p_shrink_fn)(void *parent, int *excluded, int nExcluded, void **comm, void *config,
                             int flags);
typedef int (*p2p_grow_fn)(void *parent, int nRanks, const p2p_unique_id_t *id, int rank, void **comm,
                           void *config);
typedef int (*p2p_error_fn)(void *comm, int *error);
typedef int (*p2p_revoke_fn)(void *comm, int flags);
typedef int (*p2p_simulate_fn)(void *info);

/* By enum p2p_call: NCCL's names, and our functions under them. */
extern const char *const p2pNames[P2P_CALLS];
extern const void *const p2pHooks[P2P_CALLS];

int p2p_send(const void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int p2p_recv(void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int p2p_group_start(void);
int p2p_group_end(void);
int p2p_alltoall(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
int p2p_all_to_all(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
int p2p_gather(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream);
int p2p_scatter(const void *send, void *recv, size_t count, int type, int root, void *comm, void *stream);
/* One-sided: the sender's count alone, for no call at the receiver says how much it gets. */
int p2p_put_signal(const void *buffer, size_t count, int type, int peer, void *window, size_t offset,
                   int signal, int context, unsigned flags, void *comm, void *stream);
int p2p_comm_destroy(void *comm);
int p2p_comm_abort(void *comm);
int p2p_comm_finalize(void *comm);
int p2p_comm_init_rank(void **comm, int nRanks, p2p_unique_id_t id, int rank);
int p2p_comm_init_rank_config(void **comm, int nRanks, p2p_unique_id_t id, int rank, void *config);
int p2p_comm_init_rank_scalable(void **comm, int nRanks, int rank, int nIds, const p2p_unique_id_t *ids,
                                void *config);
int p2p_comm_init_all(void **comms, int nDevices, const int *devices);
int p2p_comm_split(void *parent, int colour, int key, void **comm, void *config);
int p2p_comm_shrink(void *parent, int *excluded, int nExcluded, void **comm, void *config, int flags);
int p2p_comm_grow(void *parent, int nRanks, const p2p_unique_id_t *id, int rank, void **comm, void *config);
int p2p_comm_async_error(void *comm, int *error);
int p2p_comm_revoke(void *comm, int flags);
/* A group's end that launches nothing. */
int p2p_group_simulate_end(void *info);

/* The NCCL that the calls above go to. A call that it lacks is null. */
struct p2p_nccl {
  void *calls[P2P_CALLS];
  p2p_ask_fn commCount, commUserRank;
  bool seesAll; /* no call has been missed, on any rank: as from a preload library, which is there first */
};

/* To be called before the first of our functions can be; also again, with another NCCL. counts: whether to
 * count. */
void p2p_nccl_set(const struct p2p_nccl *nccl, bool counts);
/* What p2p_nccl_set said; null before. */
void *p2p_original(enum p2p_call call);
/* To be called at the start of each group, where not null. */
void p2p_group_watch(void (*watch)(void));
/* Groups that this thread is in. */
int p2p_group_depth(void);
/* Before the communicator's end: what is kept to know it and its children. */
void p2p_comm_forget(const void *comm);
/* The communicator goes: its record ends. Also for those whose end only NCCL's plugin calls tell. */
void p2p_comm_gone(const void *comm);
/* Whether calls that reach us are counted. */
bool p2p_counts(void);
/* What p2p_nccl_set said. */
bool p2p_sees_all(void);

/* Bytes of an element by NCCL's code of its type; 0 for codes that no NCCL up to 2.32 has. */
size_t p2p_type_bytes(int type);
/* The same by the type's name, as NCCL's profiler events have it. */
size_t p2p_type_bytes_named(const char *name);
/* Whether the environment leaves the calls to us. */
bool p2p_wanted(void);

#endif
