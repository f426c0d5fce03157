/* The chains of replicas as the kernels of weights and gradients find them, for tests. */
#ifndef ULTRAEP_TESTS_GPU_CHAINS_H_
#define ULTRAEP_TESTS_GPU_CHAINS_H_

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t rank, slot; /* -1, -1: nobody; slot -1: the master */
} gpuPlace_t;

/* A chain that a rank is part of, see Chain in kernels/experts.cuh. */
typedef struct {
  int32_t expert, n, at, slot;
  gpuPlace_t before[2], after[2];
  int32_t turns[2];
} gpuChain_t;

/* The chains of nFound ranks: 0, stride, 2 * stride and so on, each found by one block. All pointers are
 * device memory: slotExpert as in kernelRoute_t, chains [nFound][most], nChains [nFound] how many there are,
 * more than `most` included. Gives a cudaError_t. */
int gpu_chains(const kernelPlanner_t *planner, const int32_t *slotExpert, int stride, int nFound, int isRelay,
               int32_t most, gpuChain_t *chains, int32_t *nChains);

#ifdef __cplusplus
}
#endif
#endif
