/* NCCL's calls that move data between two ranks, and those that end a communicator, in our version: each
 * calls the original unchanged and counts what was issued in the traffic record. Both ways to take the calls
 * share it: slots pointed here (takeover.h) and the preload library (preload.c).
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
  P2P_COMM_DESTROY,
  P2P_COMM_ABORT,
  P2P_COMM_FINALIZE,
  P2P_CALLS
};

enum {
  P2P_NCCL_SUCCESS = 0,
  P2P_NCCL_INVALID_USAGE = 5, /* an original that this NCCL does not have was called */
  P2P_NCCL_IN_PROGRESS = 7
};

typedef int (*p2p_send_fn)(const void *buffer, size_t count, int type, int peer, void *comm, void *stream);
typedef int (*p2p_recv_fn)(void *buffer, size_t count, int type, int peer, void *comm, void *stream);
typedef int (*p2p_group_fn)(void);
typedef int (*p2p_all_fn)(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
typedef int (*p2p_comm_fn)(void *comm);
typedef int (*p2p_ask_fn)(const void *comm, int *value);

/* By enum p2p_call: NCCL's names, and our functions under them. */
extern const char *const p2pNames[P2P_CALLS];
extern const void *const p2pHooks[P2P_CALLS];

int p2p_send(const void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int p2p_recv(void *buffer, size_t count, int type, int peer, void *comm, void *stream);
int p2p_group_start(void);
int p2p_group_end(void);
int p2p_alltoall(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
int p2p_all_to_all(const void *send, void *recv, size_t count, int type, void *comm, void *stream);
int p2p_comm_destroy(void *comm);
int p2p_comm_abort(void *comm);
int p2p_comm_finalize(void *comm);

/* The NCCL that the calls above go to. A call that it lacks is null. */
struct p2p_nccl {
  void *calls[P2P_CALLS];
  p2p_ask_fn commCount, commUserRank;
};

/* To be called before the first of our functions can be; also again, with another NCCL. counts: whether to
 * count. */
void p2p_nccl_set(const struct p2p_nccl *nccl, bool counts);
/* What p2p_nccl_set said; null before. */
void *p2p_original(enum p2p_call call);
/* To be called at the start of each group, where not null. */
void p2p_group_watch(void (*watch)(void));

/* Bytes of an element by NCCL's code of its type; 0 for codes that no NCCL up to 2.32 has. */
size_t p2p_type_bytes(int type);
/* Whether the environment leaves the calls to us. */
bool p2p_wanted(void);

#endif
