/* Ranks of the kernel of sends and receives in one process, on the machine's devices in turn: windows are
 * plain device memory. */
#ifndef ULTRAEP_TESTS_GPU_P2P_CASE_H_
#define ULTRAEP_TESTS_GPU_P2P_CASE_H_

#include "kernel_p2p.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>

#define P2P_MAX_RANKS 8
#define P2P_MAX_OPS 4096 /* of a rank in a group */

typedef struct {
  cudaStream_t stream;
  kernelP2p_t p2p;
  kernelP2pFailure_t *failure; /* the host's view of p2p.failure */
  kernelP2pMap_t *maps;
  void *pinned; /* lanes and ops of groups that do not fit the kernel's argument */
  kernelP2pLane_t lanes[2 * P2P_MAX_RANKS];
  kernelP2pOp_t ops[P2P_MAX_OPS];
  kernelP2pGroup_t group;
} p2pRank_t;

typedef struct {
  int nRanks;
  void *windows[P2P_MAX_RANKS];
  p2pRank_t ranks[P2P_MAX_RANKS];
} p2pWorld_t;

/* Null, or what went wrong. Every rank maps slot 0, generation 7, of every rank. */
const char *p2p_world_make(p2pWorld_t *world, int nRanks, int nBlocks, uint64_t stageBytes, int nStages,
                           uint64_t eagerBytes, bool portable);
void p2p_world_free(p2pWorld_t *world);
/* Makes a rank's device the current one. Once a world was made, all devices' kernels may use cudaMalloc's
 * memory of each. */
cudaError_t p2p_use(int rank);
/* Waits for all devices. */
cudaError_t p2p_synchronize(const p2pWorld_t *world);

/* One transfer of a group; those of a pair are in order. */
typedef struct {
  int from, to;
  void *send, *recv;
  uint64_t sendBytes, recvBytes;
  bool isMapped;
} p2pTransfer_t;

/* Makes every rank's group of the transfers (false: too many). */
bool p2p_groups_make(p2pWorld_t *world, const p2pTransfer_t *transfers, int n);
/* Launches the ranks' kernels: bit r of `ranks`. The current device is any afterwards. */
cudaError_t p2p_launch(p2pWorld_t *world, unsigned ranks);
/* Waits until all streams are done, `seconds` at most; false if they are not. */
bool p2p_wait(p2pWorld_t *world, double seconds);
double p2p_seconds(void);

#endif
