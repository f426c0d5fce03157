/* The baseline: the rows that a dispatch moves from rank to rank, with grouped ncclSend and ncclRecv. Rows
 * lie packed by destination and counts are known beforehand, so NCCL is spared the routing, the packing and
 * the sums. */
#include "bench_cuda.h"

#include <string.h>

#define BASELINE_NCCL(rank, call)                                                                            \
  do {                                                                                                       \
    int ncclResult = (call);                                                                                 \
    if (ncclResult != 0)                                                                                     \
      return benchRankFail(rank, "%s: %s", #call, benchCuda.nccl.GetErrorString(ncclResult));                \
  } while (0)

/* Rows that the rank sends in dispatch, and gets. */
static int64_t baseline_sent(const benchRank_t *rank, int32_t peer) {
  const benchRun_t *run = rank->run;
  return run->pairRows[rank->rank * run->workload->nRanks + peer];
}

static int64_t baseline_received(const benchRank_t *rank, int32_t peer) {
  const benchRun_t *run = rank->run;
  return run->pairRows[peer * run->workload->nRanks + rank->rank];
}

typedef int64_t (*baselineRows_t)(const benchRank_t *rank, int32_t peer);

/* Every pair of ranks at once, a rank with itself included, as in an all-to-all. */
static int baseline_move(benchRank_t *rank, const uint8_t *from, baselineRows_t fromRows, uint8_t *to,
                         baselineRows_t toRows, size_t rowBytes) {
  const ncclLoader_t *nccl = &benchCuda.nccl;
  ncclComm_t comm = bench_cuda_rank(rank)->comm;
  BASELINE_NCCL(rank, nccl->GroupStart());
  for (int32_t peer = 0; peer < rank->run->workload->nRanks; peer++) {
    size_t out = (size_t)fromRows(rank, peer) * rowBytes, in = (size_t)toRows(rank, peer) * rowBytes;
    if (out > 0) BASELINE_NCCL(rank, nccl->Send(from, out, NCCL_LOADER_INT8, peer, comm, rank->stream));
    if (in > 0) BASELINE_NCCL(rank, nccl->Recv(to, in, NCCL_LOADER_INT8, peer, comm, rank->stream));
    from += out;
    to += in;
  }
  BASELINE_NCCL(rank, nccl->GroupEnd());
  return 0;
}

int benchBaselineDispatch(benchRank_t *rank) {
  const benchCudaRank_t *self = bench_cuda_rank(rank);
  return baseline_move(rank, self->packed, baseline_sent, self->received, baseline_received,
                       rank->run->shape.bytes);
}

int benchBaselineCombine(benchRank_t *rank) {
  const benchCudaRank_t *self = bench_cuda_rank(rank);
  return baseline_move(rank, self->received, baseline_received, self->packed, baseline_sent,
                       rank->run->combineShape.bytes);
}

/* Room for the rows with every peer; written once, as memory that never was may be cheaper to read. */
static int baseline_allocate(benchRank_t *rank, baselineRows_t rowsOf, uint8_t **memory) {
  const benchRun_t *run = rank->run;
  size_t rows = 0, rowBytes = run->shape.bytes;
  if (run->combineShape.bytes > rowBytes) rowBytes = run->combineShape.bytes;
  for (int32_t peer = 0; peer < run->workload->nRanks; peer++) rows += (size_t)rowsOf(rank, peer);
  size_t bytes = rows == 0 ? rowBytes : rows * rowBytes;
  BENCH_CUDA(rank, cudaMalloc((void **)memory, bytes));
  BENCH_CUDA(rank, cudaMemsetAsync(*memory, 1, bytes, rank->stream));
  BENCH_CUDA(rank, cudaStreamSynchronize(rank->stream));
  return 0;
}

int benchBaselineOpen(benchRank_t *rank) {
  benchCudaRank_t *self = bench_cuda_rank(rank);
  if (baseline_allocate(rank, baseline_sent, &self->packed) != 0) return -1;
  return baseline_allocate(rank, baseline_received, &self->received);
}
