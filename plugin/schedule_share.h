/* Receive buffers that peers map, so that senders write them directly: a table of the allocations that a rank
 * shares, told to its peers by sockets; and what peers share, mapped here. Both are kept by one thread of the
 * communicator. Nothing waits for it: until a peer has mapped an allocation it sends through stages.
 *
 * A shared allocation that its owner has freed is found within a moment, and peers unmap it then: no live
 * buffer lies in it any more. Its slot in the table is used again with the next generation. */
#ifndef ULTRAEP_SCHEDULE_SHARE_H_
#define ULTRAEP_SCHEDULE_SHARE_H_

#include "kernel_p2p.h"
#include "peer_memory.h"
#include "peer_socket.h"

typedef struct scheduleShare scheduleShare_t;

/* What a rank must know of another. */
typedef struct {
  peerAddress_t address;
  uint64_t host; /* peer_host_id */
  int32_t pid;
  int32_t isThere; /* it shares and maps */
} scheduleShareRank_t;

/* Opens this rank's end; *mine is for all other ranks. all: cudaMalloc's memory too, which other processes
 * must not have mapped when it is freed. */
ultraepResult_t schedule_share_open(scheduleShare_t **share, int rank, int nRanks, int device, bool all,
                                    scheduleShareRank_t *mine);
/* Every rank's, and where to say what is mapped ([nRanks][KERNEL_P2P_SLOTS], zeros): the thread begins. */
ultraepResult_t schedule_share_start(scheduleShare_t *share, const scheduleShareRank_t *ranks,
                                     kernelP2pMap_t *maps);
/* No kernel of this rank runs any more. Null is allowed. */
void schedule_share_close(scheduleShare_t *share);

/* Where a receive buffer lies, as peers know it; KERNEL_P2P_NO_SLOT where they do not, or not yet. */
void schedule_share_find(scheduleShare_t *share, const void *buffer, uint64_t bytes, uint32_t *slot,
                         uint32_t *generation);

#endif
