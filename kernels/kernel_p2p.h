/* Sends and receives between the ranks of one domain, scheduled by load: one kernel does all of a rank's
 * group.
 *
 * A *transfer* is a send and the receive that it meets. Those of an ordered pair of ranks are numbered 0, 1,
 * .. on both sides, in the order in which they were issued; the numbers are counted in device memory, so that
 * a replayed graph goes on counting. A *lane* is a rank's sends to one peer, or its receives from one peer,
 * in a group: transfers of a lane begin in order, different lanes are independent.
 *
 * The receiver *posts* each transfer: where its buffer is. The sender copies
 *   directly, into the receiver's buffer, where it maps that allocation (maps below): chunk by chunk, and one
 *     mark at the end; or
 *   staged, through the receiver's window: chunk i of the pair goes to stage i % nStages, and the receiver
 *     copies it out and frees the stage. Transfers of at most eagerBytes always go that way, without waiting
 *     for the post.
 * The sender alone decides, and its *mark* tells the receiver. The smallest of all need not even a mark, for
 * which data must have arrived: they go as *packets*, four bytes beside a word that says which transfer it
 * is, in place of the stage that the chunk would have.
 *
 * Every lane has a warp of the kernel that looks after it: posts, marks, looks at flags, and moves small
 * transfers (one stage at most) itself. A larger one it opens as a *job*, which is chunks: each block has
 * movers, which over and over take the next chunk of the job with the most bytes left of all that can go on.
 * So a hot pair gets as many blocks as it can use, and no block idles while any job can go on. Nobody waits
 * holding what another needs; but as with NCCL, all blocks of the ranks' kernels must be able to run at the
 * same time.
 *
 * Kernels of one rank on one communicator must run one after another (the caller orders streams). Where one
 * begins while the one before it ends (`overlaps`), that saves the time of a launch: it waits for that one's
 * end before it looks at anything, but has its blocks on SMs. So a kernel lets the next one, which may be
 * somebody else's and fill the device, come only once no peer's kernel that it waits for has yet to begin.
 *
 * A kernel ends when all its transfers have: sends when the data has left the sender's buffer and is in the
 * receiver's buffer or stages, receives when it is in the receiver's buffer. Or by failure: see
 * kernelP2pFailure_t.
 *
 * Window of a rank, the same layout everywhere (offsets: kernelP2pLayout). From senders, by sender:
 *   marks   [R][KERNEL_P2P_RING]  kernelP2pMark_t, transfer n at n % RING
 *   arrived [R][nStages]          uint64: number of the chunk in the stage, plus 1
 *   packets [R][nStages][packetRoom] instead of a stage: 16 bytes of two packets, the first of which have the
 *                                 number of bytes, then two packets for every 8 bytes
 *   stages  [R][nStages][stageBytes]
 * From receivers, by receiver:
 *   posts   [R][KERNEL_P2P_RING]  kernelP2pPost_t
 *   taken   [R]                   uint64: transfers of the pair that are over, in order: room for marks
 *   freed   [R][nStages]          uint64: number of the chunk last copied out of the stage, plus 1
 * From every rank:
 *   gone    [R]                   uint64: not 0 when the rank has left: what still waits for it fails
 * A transfer is posted, and marked, only when number - RING is over, so no entry is overwritten unread. That
 * the last transfer of a lane is taken, and its stage freed, is told by the receiver's next kernel that has
 * the lane: without it the sender's next transfers could not be received anyway, and this kernel ends sooner.
 */
#ifndef ULTRAEP_KERNELS_P2P_H_
#define ULTRAEP_KERNELS_P2P_H_

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KERNEL_P2P_MAX_RANKS 128 /* of a communicator; beyond, the caller leaves traffic to NCCL */
#define KERNEL_P2P_RING 16       /* transfers of a pair that can be under way */
#define KERNEL_P2P_SLOTS 256     /* allocations that a rank can share with its peers at a time */
#define KERNEL_P2P_NO_SLOT 0xffffffffu
#define KERNEL_P2P_MARK_BITS 28
#define KERNEL_P2P_MOST_EAGER ((1u << (KERNEL_P2P_MARK_BITS - 2)) - 1)
#define KERNEL_P2P_MOST_PACKETED 4096 /* they take twice the room, but no fence */

typedef struct {
  uint64_t bytes; /* of the send, unless the word tells */
  /* (transfer number + 1) << KERNEL_P2P_MARK_BITS, plus 1 when direct, and then plus 4 when it has as many
   * bytes as were posted; or, of at most eagerBytes, plus 2 and bytes << 2: such a transfer is in its stage.
   * Written last; before, a direct transfer has plus 4 alone from its begin. */
  uint64_t number;
} kernelP2pMark_t;

/* A post as packets: four bytes each, beside a stamp of the transfer's number plus 1. All eight are one post
 * if they have that stamp and the eighth has the rest of the number, so that no flag has to come after them.
 */
typedef struct {
  uint64_t words[8]; /* bytes of the receive, low and high; address of its buffer in the receiver, low and
                        high; slot of the allocation that it lies in (KERNEL_P2P_NO_SLOT: not shared); the
                        slot's generation; 0; the number's high half */
} kernelP2pPost_t;

/* Where a peer's allocation is mapped here: address + delta. In host memory mapped to the device, [R][SLOTS];
 * the host changes entries while kernels run: delta first, then generation; 0 while it changes or is unmapped
 * (only once no live buffer lies in the allocation any more). */
typedef struct {
  uint64_t generation; /* of the slot, from 1; an older one is another allocation */
  int64_t delta;
} kernelP2pMap_t;

/* Why p2p stopped, in host memory mapped to the device. */
typedef struct {
  int32_t code; /* ultraepResult_t; written last. Stays: later kernels end at once */
  int32_t peer; /* that was waited for, or whose size differs */
  uint64_t sent,
      expected;  /* bytes, where code is ultraepInvalidUsage: sizes of a pair's transfer differ. Then the
                  * smaller number of bytes has been copied, and all other transfers went on */
  int32_t abort; /* set by the host: every kernel ends */
  int32_t reserved;
  uint64_t nEnded; /* kernels that the last kernelP2pAwait has seen end */
} kernelP2pFailure_t;

typedef struct kernelP2pState kernelP2pState_t; /* device memory, all zero at first */

/* Geometry: the same on all ranks of a communicator. */
typedef struct {
  int32_t nRanks, nStages; /* stages of an ordered pair: 1, 2, 4, 8, .. */
  uint64_t stageBytes;     /* a power of two, 1024 at least */
  uint64_t eagerBytes;     /* at most stageBytes and KERNEL_P2P_MOST_EAGER */
} kernelP2pGeometry_t;

/* A rank's view; given to kernels by value. */
typedef struct {
  kernelP2pGeometry_t geometry;
  int32_t rank;
  int32_t nBlocks;      /* of a kernel, at most */
  int32_t hasBulk;      /* sm_90 and later */
  int32_t sharedBytes;  /* of a block at most */
  int32_t overlaps;     /* 1: see above; where hasBulk */
  uint64_t timeoutNs;   /* that the lanes of a warp may make no progress at all; 0: as long as it takes */
  char *const *windows; /* [R] device array */
  const kernelP2pMap_t *maps;
  kernelP2pState_t *state;
  kernelP2pFailure_t *failure;
} kernelP2p_t;

typedef struct {
  uint64_t address; /* in this rank */
  uint64_t bytes;
  uint32_t slot, generation; /* receives: the allocation as shared; sends: unused */
} kernelP2pOp_t;

typedef struct {
  int32_t peer;
  int32_t first, n; /* ops[first .. first + n), in order of issue; n >= 1 */
  int32_t isRecv;
} kernelP2pLane_t;

/* What a rank does in one kernel; at most one lane for each (peer, direction). Groups that fit are given to
 * the kernel as its argument; others (kernelP2pFits false) must lie in memory that the device can read until
 * the kernel has run, for every replay. */
typedef struct {
  const kernelP2pLane_t *lanes;
  const kernelP2pOp_t *ops;
  int32_t nLanes, nOps;
  int32_t follows; /* 1: this rank's last kernel is what comes before it in the stream, and it may overlap
                      with that one */
} kernelP2pGroup_t;

typedef struct {
  size_t marks, arrived, posts, taken, freed, gone, packets, stages; /* offsets in a window */
  size_t bytes;
  uint64_t mostPacketed; /* bytes that go as packets, at most */
  size_t packetRoom;
} kernelP2pLayout_t;

void kernelP2pLayout(const kernelP2pGeometry_t *geometry, kernelP2pLayout_t *layout);
size_t kernelP2pStateBytes(const kernelP2pGeometry_t *geometry);
int kernelP2pFits(int32_t nLanes, int32_t nOps); /* 1: lanes and ops may lie in any host memory */
/* Loads the kernels for the current device (see kernelsLoad). */
int kernelP2pLoad(void);
int kernelP2pLaunch(const kernelP2p_t *p2p, const kernelP2pGroup_t *group, cudaStream_t stream);
/* Makes the stream wait until that many kernels of this rank have ended since its state was made: an order
 * between streams that costs nothing where it is not needed. After an abort it waits some seconds at most, as
 * a kernel may be one that never begins: failure->nEnded says whether all have ended. */
int kernelP2pAwait(const kernelP2p_t *p2p, uint64_t runs, cudaStream_t stream);
/* Tells every peer that this rank leaves. */
int kernelP2pLeave(const kernelP2p_t *p2p, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
