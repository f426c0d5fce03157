/* A GPU that is not there: kernels run on the CPU, so that the tests of kernels and of the NCCL backend run
 * on any machine. Test-only; nothing of it is part of the library.
 *
 *   emulated.h       what the parts below say to each other
 *   device.cuh       force-included before every kernel: CUDA's words and the instructions of kernels/ptx.cuh
 *   device.h         what those ask of the block that the thread is in
 *   grid.cpp         a launch: a CPU thread for each block
 *   block.cpp        a block: a fiber for each of its threads, its warps and barriers
 *   bulk.cpp         the block's bulk copies, which take their time
 *   runtime.c        the part of CUDA's runtime that we and the tests call: memory, streams, events, graphs
 *   driver.c         the part of CUDA's driver behind peer_memory.c: cuMem on memory files, cudaIpc
 *   nccl.c           a libnccl.so.2 for ranks that are threads: collectives by streams, windows
 *
 * All but nccl.c are one shared library, emulated_cuda, so that the tests and the fake NCCL share its state.
 */
#ifndef ULTRAEP_TESTS_EMULATED_H_
#define ULTRAEP_TESTS_EMULATED_H_

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EMULATED_MAX_ARGUMENTS = 8 };

/* A kernel as kernels/load.cuh makes it known: how its arguments are kept and how one thread runs it. */
typedef struct {
  const void *address;
  int nArguments;
  size_t bytes[EMULATED_MAX_ARGUMENTS], alignment[EMULATED_MAX_ARGUMENTS];
  void (*run)(const void *address, void *const *arguments);
} emulatedKernel_t;

/* ---- grid.cpp ---- */

/* Before the first launch; the same kernel again is ignored. Any thread. */
void emulated_kernel_add(const emulatedKernel_t *kernel);
/* Null: nobody made it known. */
const emulatedKernel_t *emulated_kernel_find(const void *address);
/* Runs all blocks of a grid and returns when all have ended. Several grids may run at a time, from any
 * threads; a block waits for others of its own or another grid by polling, as on a GPU. */
void emulated_grid_run(const emulatedKernel_t *kernel, dim3 grid, dim3 block, size_t sharedBytes,
                       void *const *arguments);

/* ---- runtime.c ---- */

/* Enqueues run(argument) on a stream; `bytes` of the argument are copied now. In a stream that is captured
 * it becomes a node of the graph, which runs again at every launch of it. */
cudaError_t emulated_enqueue(cudaStream_t stream, void (*run)(void *argument), const void *argument,
                             size_t bytes);
/* Allocations as the runtime sees them: driver.c tells of the memory it maps and unmaps, and asks. */
typedef enum {
  EMULATED_MALLOC,
  EMULATED_CUMEM,
  EMULATED_HOST,
  EMULATED_MANAGED,
  EMULATED_POOL /* cudaMallocAsync */
} emulatedMemory_t;
typedef struct {
  void *base;
  size_t bytes;
  emulatedMemory_t kind;
  int device;
  unsigned long long bufferId; /* from 1 on, never used again */
} emulatedRange_t;
void emulated_range_add(void *base, size_t bytes, emulatedMemory_t kind, int device);
/* False: no range starts there. */
bool emulated_range_remove(void *base);
/* The range that ptr lies in; false if none. */
bool emulated_range_find(const void *ptr, emulatedRange_t *range);
/* The address of a driver function by its name, null if driver.c has none (cudaGetDriverEntryPoint). */
void *emulated_driver_find(const char *name);

#ifdef __cplusplus
}
#endif

#endif
