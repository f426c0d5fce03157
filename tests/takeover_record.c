#include "takeover_record.h"

#include "p2p.h"
#include "takeover.h"
#include "traffic.h"

#include <pthread.h>
#include <string.h>

struct trafficComm {
  const void *comm;
  int rank, nRanks;
};

static pthread_mutex_t recordLock = PTHREAD_MUTEX_INITIALIZER;
static struct record_sums recordSums;
static struct trafficComm recordComms[64];

trafficComm_t *traffic_comm_find(const void *comm) {
  trafficComm_t *found = NULL;

  pthread_mutex_lock(&recordLock);
  for (size_t i = 0; i < 64 && comm; i++) {
    if (recordComms[i].comm == comm) found = &recordComms[i];
  }
  pthread_mutex_unlock(&recordLock);
  return found;
}

trafficComm_t *traffic_comm_open(const void *comm, uint64_t hash, int rank, int nRanks) {
  trafficComm_t *record = traffic_comm_find(comm);

  if (record) return record;
  pthread_mutex_lock(&recordLock);
  for (size_t i = 0; i < 64 && !record; i++) {
    if (recordComms[i].comm) continue;
    record = &recordComms[i];
    *record = (struct trafficComm){comm, rank, nRanks};
    recordSums.opened++;
    recordSums.hash = hash;
    recordSums.rank = rank;
    recordSums.nRanks = nRanks;
  }
  pthread_mutex_unlock(&recordLock);
  return record;
}

void traffic_comm_close(trafficComm_t *comm) {
  if (!comm) return;
  pthread_mutex_lock(&recordLock);
  comm->comm = NULL;
  recordSums.closed++;
  pthread_mutex_unlock(&recordLock);
}

void traffic_count(trafficComm_t *comm, trafficDirection_t direction, int peer, uint64_t bytes) {
  if (!comm || peer < 0 || peer >= RECORD_PEERS) return;
  pthread_mutex_lock(&recordLock);
  recordSums.calls[direction][peer]++;
  recordSums.bytes[direction][peer] += bytes;
  pthread_mutex_unlock(&recordLock);
}

void traffic_count_all(trafficComm_t *comm, trafficDirection_t direction, uint64_t bytes) {
  for (int peer = 0; comm && peer < comm->nRanks; peer++) traffic_count(comm, direction, peer, bytes);
}

void traffic_count_all_to_all(trafficComm_t *comm, uint64_t bytes) {
  traffic_count_all(comm, TRAFFIC_SEND, bytes);
  traffic_count_all(comm, TRAFFIC_RECV, bytes);
}

int traffic_comm_rank(const trafficComm_t *comm) {
  return comm ? comm->rank : -1;
}

void traffic_logger_set(nccl_abi_logger_t logger) {
  (void)logger;
}

static struct record_sums record_sums_get(void) {
  struct record_sums sums;

  pthread_mutex_lock(&recordLock);
  sums = recordSums;
  pthread_mutex_unlock(&recordLock);
  return sums;
}

static void record_clear(void) {
  pthread_mutex_lock(&recordLock);
  memset(&recordSums, 0, sizeof(recordSums));
  pthread_mutex_unlock(&recordLock);
}

#if defined(RECORD_PRELOAD)
#define RECORD_TAKEOVER .start = NULL
#else
#define RECORD_TAKEOVER .start = (void *)takeover_start, .undo = takeover_undo, .slots = takeover_slots
#endif

__attribute__((visibility("default"))) const struct record_table recordTable = {
    RECORD_TAKEOVER,
    .type_bytes = p2p_type_bytes,
    .sums = record_sums_get,
    .clear = record_clear,
};
