#include "schedule_share.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
  SHARE_WAIT_MS = 50,
  SHARE_LOOK_TURNS = 4
}; /* the thread's turns, and of them those that look for freed memory */

/* From an owner to a peer: an allocation that it shares, or (name.kind none) shares no more. */
typedef struct {
  int32_t owner;
  uint32_t slot, generation;
  int32_t reserved;
  peerMemoryName_t name;
} shareMessage_t;
_Static_assert(sizeof(shareMessage_t) <= PEER_SOCKET_BYTES, "one message");

/* An allocation of this rank. */
typedef struct {
  peerMemoryName_t name; /* kind none: the slot is free */
  uint32_t generation;
  bool isRefused; /* cannot be shared: known, so that it is not described again */
  unsigned char told[KERNEL_P2P_MAX_RANKS];
  int nUntold;
} shareOwn_t;

struct scheduleShare {
  int rank, nRanks, device;
  bool all;
  peerSocket_t socket;
  scheduleShareRank_t ranks[KERNEL_P2P_MAX_RANKS];
  kernelP2pMap_t *maps;
  pthread_mutex_t lock; /* of own */
  shareOwn_t own[KERNEL_P2P_SLOTS];
  int nOwn;              /* slots that were ever used */
  peerMapping_t *mapped; /* [nRanks][KERNEL_P2P_SLOTS], the thread's */
  pthread_t thread;
  bool isRunning;
  atomic_bool isEnding;
};

ultraepResult_t schedule_share_open(scheduleShare_t **share, int rank, int nRanks, int device, bool all,
                                    scheduleShareRank_t *mine) {
  scheduleShare_t *made = calloc(1, sizeof(*made));

  if (!made) return ultraepSystemError;
  made->mapped = calloc((size_t)nRanks * KERNEL_P2P_SLOTS, sizeof(*made->mapped));
  made->rank = rank;
  made->nRanks = nRanks;
  made->device = device;
  made->all = all;
  made->socket = PEER_SOCKET_NONE;
  if (!made->mapped || peer_socket_open(&made->socket) != ultraepSuccess) {
    free(made->mapped);
    free(made);
    return ultraepSystemError;
  }
  pthread_mutex_init(&made->lock, NULL);
  *mine = (scheduleShareRank_t){
      .address = made->socket.address, .host = peer_host_id(), .pid = (int32_t)getpid(), .isThere = 1};
  *share = made;
  return ultraepSuccess;
}

/* ---- what this rank shares ---- */

/* Whether that peer may map the allocation. */
static bool share_may(const scheduleShare_t *share, const peerMemoryName_t *name, int peer) {
  const scheduleShareRank_t *rank = &share->ranks[peer];

  if (peer == share->rank || !rank->isThere) return false;
  if (rank->host == name->host && rank->pid == name->pid) return true;
  if (name->kind == PEER_MEMORY_IPC) return share->all && rank->host == name->host;
  return name->kind == PEER_MEMORY_FABRIC || (name->kind == PEER_MEMORY_FD && rank->host == name->host);
}

/* Tells peers that do not know yet; a descriptor is made anew each time, for it cannot be kept for all. */
static void share_tell(scheduleShare_t *share, int slot) {
  shareOwn_t *own = &share->own[slot];
  shareMessage_t message = {
      .owner = share->rank, .slot = (uint32_t)slot, .generation = own->generation, .name = own->name};
  int fd = -1;

  if (own->nUntold == 0) return;
  if (own->name.kind == PEER_MEMORY_FD &&
      peer_memory_describe((const void *)(uintptr_t)own->name.base, &message.name, &fd) != ultraepSuccess)
    return;
  for (int peer = 0; peer < share->nRanks; peer++) {
    ultraepResult_t sent;

    if (own->told[peer]) continue;
    sent = peer_socket_send(&share->socket, &share->ranks[peer].address, &message, sizeof(message), fd);
    if (sent == ultraepInProgress) continue; /* its queue is full: next time */
    own->told[peer] = 1;                     /* also where the peer is gone */
    own->nUntold--;
  }
  if (fd >= 0) close(fd);
}

static void share_begin(scheduleShare_t *share, int slot) {
  shareOwn_t *own = &share->own[slot];

  own->nUntold = 0;
  for (int peer = 0; peer < share->nRanks; peer++) {
    own->told[peer] = !share_may(share, &own->name, peer);
    own->nUntold += !own->told[peer];
  }
  share_tell(share, slot);
}

static int share_slot_of(scheduleShare_t *share, uint64_t address, uint64_t bytes, uint64_t bufferId) {
  for (int slot = 0; slot < share->nOwn; slot++) {
    const peerMemoryName_t *name = &share->own[slot].name;

    if (name->bufferId == bufferId && address >= name->base && address + bytes <= name->base + name->bytes &&
        (name->kind != PEER_MEMORY_NONE || share->own[slot].isRefused))
      return slot;
  }
  return -1;
}

/* A new allocation gets a free slot, if there is one. */
static int share_add(scheduleShare_t *share, const void *buffer, uint64_t base, uint64_t bytes,
                     uint64_t bufferId) {
  int slot = 0, fd = -1;
  shareOwn_t *own;

  while (slot < share->nOwn &&
         (share->own[slot].name.kind != PEER_MEMORY_NONE || share->own[slot].nUntold > 0))
    slot++;
  if (slot == KERNEL_P2P_SLOTS) return -1;
  if (slot == share->nOwn) share->nOwn++;
  own = &share->own[slot];
  own->generation++;
  if (peer_memory_describe(buffer, &own->name, &fd) != ultraepSuccess) own->name.kind = PEER_MEMORY_NONE;
  if (fd >= 0) close(fd);
  own->isRefused = own->name.kind == PEER_MEMORY_NONE;
  if (own->isRefused) {
    own->name = (peerMemoryName_t){.base = base, .bytes = bytes, .bufferId = bufferId};
    return slot;
  }
  share_begin(share, slot);
  return slot;
}

void schedule_share_find(scheduleShare_t *share, const void *buffer, uint64_t bytes, uint32_t *slot,
                         uint32_t *generation) {
  uint64_t base, all, bufferId, address = (uint64_t)(uintptr_t)buffer;
  int found;

  *slot = KERNEL_P2P_NO_SLOT;
  *generation = 0;
  if (peer_memory_look(buffer, &base, &all, &bufferId) != ultraepSuccess) return;
  if (address + bytes > base + all) return; /* of several mappings */
  pthread_mutex_lock(&share->lock);
  found = share_slot_of(share, address, bytes, bufferId);
  if (found < 0) found = share_add(share, buffer, base, all, bufferId);
  if (found >= 0 && !share->own[found].isRefused) {
    *slot = (uint32_t)found;
    *generation = share->own[found].generation;
  }
  pthread_mutex_unlock(&share->lock);
}

/* Memory that is gone; and peers whose queues were full. */
static void share_look(scheduleShare_t *share, bool atMemory) {
  pthread_mutex_lock(&share->lock);
  for (int slot = 0; slot < share->nOwn; slot++) {
    shareOwn_t *own = &share->own[slot];

    if (atMemory && own->name.bufferId != 0 && !peer_memory_is_alive(&own->name)) {
      peerMemoryName_t gone = own->name;

      own->nUntold = 0;
      for (int peer = 0; peer < share->nRanks; peer++) {
        own->told[peer] = own->isRefused || !share_may(share, &gone, peer);
        own->nUntold += !own->told[peer];
      }
      own->name = (peerMemoryName_t){.kind = PEER_MEMORY_NONE};
      own->isRefused = false;
    }
    share_tell(share, slot);
  }
  pthread_mutex_unlock(&share->lock);
}

/* ---- what peers share ---- */

static void share_unmap(scheduleShare_t *share, size_t entry) {
  if (share->mapped[entry].kind == PEER_MEMORY_NONE) return;
  __atomic_store_n(&share->maps[entry].generation, 0, __ATOMIC_RELEASE);
  peer_memory_unmap(&share->mapped[entry]);
  share->mapped[entry] = (peerMapping_t){.kind = PEER_MEMORY_NONE};
}

static void share_map(scheduleShare_t *share, const shareMessage_t *message, int fd) {
  size_t entry;

  if (message->owner < 0 || message->owner >= share->nRanks || message->slot >= KERNEL_P2P_SLOTS) return;
  entry = (size_t)message->owner * KERNEL_P2P_SLOTS + message->slot;
  share_unmap(share, entry);
  if (message->name.kind == PEER_MEMORY_NONE) return;
  if (peer_memory_map(&message->name, fd, share->device, &share->mapped[entry]) != ultraepSuccess) {
    share->mapped[entry] = (peerMapping_t){.kind = PEER_MEMORY_NONE};
    return;
  }
  __atomic_store_n(&share->maps[entry].delta,
                   (int64_t)((uint64_t)(uintptr_t)share->mapped[entry].base - message->name.base),
                   __ATOMIC_RELEASE);
  __atomic_store_n(&share->maps[entry].generation, message->generation, __ATOMIC_RELEASE);
}

static void *share_run(void *argument) {
  scheduleShare_t *share = argument;
  enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed; /* another thread's capture goes on */

  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  (void)cudaSetDevice(share->device);
  for (unsigned turn = 1; !atomic_load(&share->isEnding); turn++) {
    shareMessage_t message;
    size_t bytes;
    int fd = -1;
    ultraepResult_t result =
        peer_socket_receive(&share->socket, &message, sizeof(message), &bytes, &fd, SHARE_WAIT_MS);

    if (result == ultraepSuccess && bytes == sizeof(message)) share_map(share, &message, fd);
    if (result == ultraepSuccess && fd >= 0) close(fd);
    if (result != ultraepSuccess) share_look(share, turn % SHARE_LOOK_TURNS == 0);
  }
  return NULL;
}

ultraepResult_t schedule_share_start(scheduleShare_t *share, const scheduleShareRank_t *ranks,
                                     kernelP2pMap_t *maps) {
  memcpy(share->ranks, ranks, (size_t)share->nRanks * sizeof(*ranks));
  share->maps = maps;
  share->isRunning = pthread_create(&share->thread, NULL, share_run, share) == 0;
  return share->isRunning ? ultraepSuccess : ultraepSystemError;
}

void schedule_share_close(scheduleShare_t *share) {
  if (!share) return;
  atomic_store(&share->isEnding, true);
  if (share->isRunning) {
    pthread_join(share->thread, NULL);
    for (size_t i = 0; i < (size_t)share->nRanks * KERNEL_P2P_SLOTS; i++) share_unmap(share, i);
  }
  peer_socket_close(&share->socket);
  pthread_mutex_destroy(&share->lock);
  free(share->mapped);
  free(share);
}
