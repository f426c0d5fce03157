#include "comm_id.h"

#include <pthread.h>
#include <stdlib.h>

/* More than a communicator of NCCL has. */
#define COMM_BYTES_MAX ((uintptr_t)4 << 20)

enum { COMM_ID_BUCKETS = 256 };

typedef struct comm_id_node {
  const void *comm;
  uint64_t id;
  uint64_t nChildren;
  struct comm_id_node *next;
} comm_id_node_t;

/* Creation, end and the first operation of a communicator come here, nothing else. */
static pthread_mutex_t commIdLock = PTHREAD_MUTEX_INITIALIZER;
static comm_id_node_t *commIdBuckets[COMM_ID_BUCKETS];
static comm_told_t *commTold;
static _Atomic(uintptr_t) commToldOffset[COMM_TOLD_ROLES]; /* of the context's field; 0: not known yet */

/* ---- told by NCCL ---- */
void comm_told_add(comm_told_t *told) {
  atomic_store(&told->comm, NULL);
  atomic_store(&told->ended, false);
  told->previous = NULL;
  pthread_mutex_lock(&commIdLock);
  told->next = commTold;
  if (commTold) commTold->previous = told;
  commTold = told;
  pthread_mutex_unlock(&commIdLock);
}

const void *comm_told_remove(comm_told_t *told) {
  pthread_mutex_lock(&commIdLock);
  if (told->previous) told->previous->next = told->next;
  if (commTold == told) commTold = told->next;
  if (told->next) told->next->previous = told->previous;
  told->next = told->previous = NULL;
  pthread_mutex_unlock(&commIdLock);
  return atomic_load(&told->comm);
}

const void *comm_told_comm(comm_told_t *told) {
  const void *comm = atomic_load_explicit(&told->comm, memory_order_acquire);
  const uintptr_t offset = atomic_load_explicit(&commToldOffset[told->role], memory_order_relaxed);

  if (comm || offset == 0 || offset >= told->place) return comm;
  comm = (const void *)(told->place - offset);
  atomic_store_explicit(&told->comm, comm, memory_order_release);
  return comm;
}

static bool comm_told_fits(const comm_told_t *told, const void *comm, int rank, int nRanks) {
  const uintptr_t start = (uintptr_t)comm, offset = atomic_load(&commToldOffset[told->role]);

  if (atomic_load(&told->ended)) return false;
  if (told->rank >= 0 && told->rank != rank) return false;
  if (told->nRanks > 0 && told->nRanks != nRanks) return false;
  if (told->place <= start || told->place - start > COMM_BYTES_MAX) return false;
  return offset == 0 || told->place - start == offset;
}

/* Under the lock: what a role was told of the communicator, which it then belongs to; null if nothing. */
static comm_told_t *comm_told_find(commToldRole_t role, const void *comm, int rank, int nRanks) {
  comm_told_t *nearest = NULL;

  for (comm_told_t *told = commTold; told; told = told->next) {
    if (told->role != role || !comm_told_fits(told, comm, rank, nRanks)) continue;
    if (!nearest || told->place < nearest->place) nearest = told;
  }
  if (!nearest) return NULL;
  atomic_store(&commToldOffset[role], nearest->place - (uintptr_t)comm);
  atomic_store_explicit(&nearest->comm, comm, memory_order_release);
  return nearest;
}

/* ---- ours ---- */
uint64_t comm_id_hash(uint64_t seed, const void *bytes, size_t nBytes) {
  const unsigned char *at = bytes;
  uint64_t hash = seed ^ 0xcbf29ce484222325u;

  /* FNV-1a, and a finish that spreads the last bytes over all bits. */
  for (size_t i = 0; i < nBytes; i++) hash = (hash ^ at[i]) * 0x100000001b3u;
  hash = (hash ^ (hash >> 32)) * 0x9e3779b97f4a7c15u;
  hash ^= hash >> 29;
  return hash ? hash : 1;
}

static comm_id_node_t **comm_id_node(const void *comm) {
  comm_id_node_t **at = &commIdBuckets[comm_id_hash(0, &comm, sizeof(comm)) % COMM_ID_BUCKETS];

  while (*at && (*at)->comm != comm) at = &(*at)->next;
  return at;
}

static void comm_id_drop(const void *comm) {
  comm_id_node_t **at = comm_id_node(comm), *node = *at;

  if (!node) return;
  *at = node->next;
  free(node);
}

void comm_id_set(const void *comm, uint64_t id) {
  comm_id_node_t **at, *node;

  if (!comm) return;
  pthread_mutex_lock(&commIdLock);
  comm_id_drop(comm); /* of one that went unseen */
  node = id != 0 ? calloc(1, sizeof(*node)) : NULL;
  if (node) {
    node->comm = comm;
    node->id = id;
    at = comm_id_node(comm);
    *at = node;
  }
  pthread_mutex_unlock(&commIdLock);
}

uint64_t comm_id_child(const void *parent, uint64_t kind) {
  uint64_t words[3] = {0, 0, kind};
  comm_id_node_t *node;

  pthread_mutex_lock(&commIdLock);
  node = *comm_id_node(parent);
  if (node) {
    words[0] = node->id;
    words[1] = ++node->nChildren;
  }
  pthread_mutex_unlock(&commIdLock);
  return words[0] != 0 ? comm_id_hash(0, words, sizeof(words)) : 0;
}

/* ---- both ---- */
uint64_t comm_id_find(const void *comm, int rank, int nRanks) {
  const comm_told_t *told[COMM_TOLD_ROLES];
  const comm_id_node_t *node;
  uint64_t id = 0;

  pthread_mutex_lock(&commIdLock);
  node = *comm_id_node(comm);
  if (node) id = node->id;
  for (int role = 0; role < COMM_TOLD_ROLES; role++) {
    told[role] = comm_told_find(role, comm, rank, nRanks);
    if (told[role] && told[role]->id != 0) id = told[role]->id;
  }
  pthread_mutex_unlock(&commIdLock);
  return id;
}

static void comm_id_end_locked(const void *comm) {
  for (comm_told_t *told = commTold; told; told = told->next) {
    if (comm_told_comm(told) == comm) atomic_store(&told->ended, true);
  }
}

void comm_id_end(const void *comm) {
  if (!comm) return;
  pthread_mutex_lock(&commIdLock);
  comm_id_end_locked(comm);
  pthread_mutex_unlock(&commIdLock);
}

void comm_id_forget(const void *comm) {
  if (!comm) return;
  pthread_mutex_lock(&commIdLock);
  comm_id_end_locked(comm);
  comm_id_drop(comm);
  pthread_mutex_unlock(&commIdLock);
}

/* The library goes: what is left belongs to communicators that nobody destroyed. */
__attribute__((destructor)) static void comm_id_finish(void) {
  pthread_mutex_lock(&commIdLock);
  for (int i = 0; i < COMM_ID_BUCKETS; i++) {
    while (commIdBuckets[i]) comm_id_drop(commIdBuckets[i]->comm);
  }
  pthread_mutex_unlock(&commIdLock);
}
