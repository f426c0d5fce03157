// Sends and receives: the kernel, and how it is launched. See kernel_p2p.h.
#include "load.cuh"
#include "p2p_lanes.cuh"

#include <algorithm>

namespace ultraep {

constexpr int kP2pMovers = 3; // warps of a block that move by bulk copies
constexpr size_t kP2pStatic =
    2048 + kP2pMaxLanes * sizeof(P2pLaneState); // shared memory that the kernel declares, at most
constexpr uint64_t kP2pSmallShare = 65536;      // bytes for a block, where no transfer needs a job

// A group within the kernel's argument, of two sizes, as a launch takes the longer the larger that is; or a
// group elsewhere.
template <int kLanes, int kOps> struct P2pInline {
  kernelP2pLane_t lanes[kLanes];
  kernelP2pOp_t ops[kOps];

  static bool fits(int nLanes, int nOps) { return nLanes <= kLanes && nOps <= kOps; }
  void fill(const kernelP2pGroup_t &group) {
    std::copy(group.lanes, group.lanes + group.nLanes, lanes);
    std::copy(group.ops, group.ops + group.nOps, ops);
  }
  __device__ const kernelP2pLane_t *lanesOf(const kernelP2pGroup_t &) const { return lanes; }
  __device__ const kernelP2pOp_t *opsOf(const kernelP2pGroup_t &) const { return ops; }
};
struct P2pElsewhere {
  void fill(const kernelP2pGroup_t &) {}
  __device__ const kernelP2pLane_t *lanesOf(const kernelP2pGroup_t &group) const { return group.lanes; }
  __device__ const kernelP2pOp_t *opsOf(const kernelP2pGroup_t &group) const { return group.ops; }
};
using P2pFew = P2pInline<16, 16>;
using P2pMany = P2pInline<48, 96>;

enum P2pForm {
  kP2pSmall,    // no transfer needs a job
  kP2pPortable, // jobs are moved by warps
  kP2pBulk
};
// Of a block. With bulk copies few warps have anything to do, and the fewer there are, the sooner it begins.
template <P2pForm kForm> constexpr int kP2pWarps = kForm == kP2pBulk ? 8 : 16;
template <P2pForm kForm> constexpr int kP2pThreads = kP2pWarps<kForm> *kWarp;
static_assert(kP2pMaxLanes <= 64 * (kP2pWarps<kP2pBulk> - kP2pMovers), "mindLanes counts so many");

// Whether all transfers go without jobs.
inline bool isSmall(const kernelP2p_t &p, const kernelP2pGroup_t &group) {
  return std::all_of(group.ops, group.ops + group.nOps,
                     [&](const kernelP2pOp_t &op) { return op.bytes <= p.geometry.eagerBytes; });
}

// The last block leaves everything ready for the next kernel. letsNext: the block has not let it begin yet.
__device__ inline void leaveP2p(const P2pContext &c, bool letsNext) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (letsNext && c.p.overlaps) letKernelAfterBegin();
  uint32_t before = 0;
  if (gridDim.x > 1) before = addAcquireReleaseDevice(&c.s.left, 1);
  if (before != gridDim.x - 1) return;
  c.s.left = 0;
  c.s.lanesOver = 0;
  addReleaseDevice64(&c.s.runs, 1);
}

template <P2pForm kForm, typename Where>
__global__ void __launch_bounds__(kP2pThreads<kForm>, 1)
    p2pKernel(const __grid_constant__ kernelP2p_t p, const __grid_constant__ kernelP2pLayout_t layout,
              const __grid_constant__ kernelP2pGroup_t group, const __grid_constant__ Where where) {
  extern __shared__ __align__(128) char p2pMemory[];
  P2pContext c{p, layout, where.lanesOf(group), where.opsOf(group), group.nLanes, *p.state};
  __shared__ P2pLaneState states[kP2pMaxLanes]; // of lane i in block i % gridDim.x
  int warp = threadIdx.x / kWarp;
  if constexpr (kForm == kP2pBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    __shared__ P2pPipe pipe;
    __shared__ P2pBlock block;
    uint32_t nStages =
        min(uint32_t(kP2pMostStages), uint32_t(p.sharedBytes - int(kP2pStatic)) / kP2pStageRoom);
    if (threadIdx.x == 0) {
      for (uint32_t i = 0; i < nStages; i++) barrierInit(&pipe.full[i]);
      block.begin(c.nLanes, p.overlaps);
      barrierInitFence();
      pipe.nTaken = pipe.nBegun = pipe.nLoaded = pipe.nFreed = pipe.isTakenAll = pipe.isLoadedAll = 0;
    }
    __syncthreads();
    awaitKernelBefore();
    if (warp < kP2pMovers)
      moveByBulk(c, pipe, block, p2pMemory, nStages);
    else
      mindLanes<true>(c, states, warp - kP2pMovers, kP2pWarps<kForm> - kP2pMovers, &block);
#endif
  } else {
    awaitKernelBefore();
    mindLanes<kForm != kP2pSmall>(c, states, warp, kP2pWarps<kForm>, nullptr);
  }
  leaveP2p(c, kForm == kP2pSmall);
}

constexpr uint64_t kP2pAbortNs = 4000000000; // within which a kernel that runs has seen an abort

__global__ void awaitKernel(const __grid_constant__ kernelP2p_t p, uint64_t runs) {
  uint64_t ended, aborted = 0;
  while ((ended = loadAcquireDevice64(&p.state->runs)) < runs) {
    if (*reinterpret_cast<const volatile int32_t *>(&p.failure->abort) != 0) {
      if (aborted == 0) aborted = nowNs();
      if (nowNs() - aborted > kP2pAbortNs) break;
    }
    __nanosleep(500);
  }
  *reinterpret_cast<volatile uint64_t *>(&p.failure->nEnded) = ended;
}

__global__ void leaveKernel(const __grid_constant__ kernelP2p_t p,
                            const __grid_constant__ kernelP2pLayout_t layout) {
  for (int r = threadIdx.x; r < p.geometry.nRanks; r += blockDim.x)
    if (r != p.rank) storeReleaseSystem(reinterpret_cast<uint64_t *>(p.windows[r] + layout.gone) + p.rank, 1);
}

template <P2pForm kForm, typename Where>
cudaError_t launch(const kernelP2p_t *p, const kernelP2pLayout_t &layout, const kernelP2pGroup_t &group,
                   int nBlocks, cudaStream_t stream) {
  Where where = {};
  where.fill(group);
  uint32_t nStages =
      std::min<uint32_t>(kP2pMostStages, uint32_t(p->sharedBytes - int(kP2pStatic)) / kP2pStageRoom);
  bool overlaps = p->hasBulk && p->overlaps && group.follows;
  size_t bytes = kForm == kP2pBulk ? nStages * size_t(kP2pStageRoom) : 0;
  return launchKernel(p2pKernel<kForm, Where>, {nBlocks, kP2pThreads<kForm>, bytes, stream, overlaps}, *p,
                      layout, group, where);
}

template <typename Where>
cudaError_t launchForm(const kernelP2p_t *p, const kernelP2pLayout_t &layout, const kernelP2pGroup_t &group,
                       cudaStream_t stream) {
  uint64_t bytes = 0;
  for (int i = 0; i < group.nOps; i++) bytes += group.ops[i].bytes;
  if (isSmall(*p, group)) {
    // One block where it will do: it need not meet others at the end.
    constexpr int kWarps = kP2pWarps<kP2pSmall>;
    int64_t forLanes = (group.nLanes + kWarps - 1) / kWarps, forBytes = int64_t(bytes / kP2pSmallShare);
    int nBlocks = int(std::min<int64_t>(p->nBlocks, std::max(forLanes, forBytes)));
    if (P2pFew::fits(group.nLanes, group.nOps))
      return launch<kP2pSmall, P2pFew>(p, layout, group, nBlocks, stream);
    return launch<kP2pSmall, Where>(p, layout, group, nBlocks, stream);
  }
  constexpr int kWarps = kP2pWarps<kP2pBulk> - kP2pMovers;
  int forLanes = (group.nLanes + kWarps - 1) / kWarps;
  int64_t forBytes = int64_t(bytes / kP2pLeastChunk) + 1;
  int nBlocks = int(std::min<int64_t>(p->nBlocks, std::max<int64_t>(forBytes, forLanes)));
  if (p->hasBulk && P2pFew::fits(group.nLanes, group.nOps))
    return launch<kP2pBulk, P2pFew>(p, layout, group, nBlocks, stream);
  if (p->hasBulk) return launch<kP2pBulk, Where>(p, layout, group, nBlocks, stream);
  return launch<kP2pPortable, Where>(p, layout, group, nBlocks, stream);
}

} // namespace ultraep

void kernelP2pLayout(const kernelP2pGeometry_t *geometry, kernelP2pLayout_t *layout) {
  size_t nRanks = size_t(geometry->nRanks), nStages = nRanks * size_t(geometry->nStages), at = 0;
  auto part = [&](size_t bytes) {
    size_t here = at;
    at += (bytes + 1023) / 1024 * 1024;
    return here;
  };
  layout->marks = part(nRanks * KERNEL_P2P_RING * sizeof(kernelP2pMark_t));
  layout->arrived = part(nStages * sizeof(uint64_t));
  layout->posts = part(nRanks * KERNEL_P2P_RING * sizeof(kernelP2pPost_t));
  layout->taken = part(nRanks * sizeof(uint64_t));
  layout->freed = part(nStages * sizeof(uint64_t));
  layout->gone = part(nRanks * sizeof(uint64_t));
  layout->mostPacketed = std::min<uint64_t>(geometry->eagerBytes, KERNEL_P2P_MOST_PACKETED);
  layout->packetRoom = (1 + (layout->mostPacketed + 7) / 8) * 16;
  layout->packets = part(nStages * layout->packetRoom);
  layout->stages = part(nStages * geometry->stageBytes);
  layout->bytes = at;
}

size_t kernelP2pStateBytes(const kernelP2pGeometry_t *) {
  return sizeof(kernelP2pState);
}

int kernelP2pFits(int32_t nLanes, int32_t nOps) {
  return ultraep::P2pMany::fits(nLanes, nOps);
}

int kernelP2pLoad(void) {
  using namespace ultraep;
  return loadKernels(
      {kernelAddress(p2pKernel<kP2pSmall, P2pFew>), kernelAddress(p2pKernel<kP2pSmall, P2pMany>),
       kernelAddress(p2pKernel<kP2pSmall, P2pElsewhere>), kernelAddress(p2pKernel<kP2pPortable, P2pMany>),
       kernelAddress(p2pKernel<kP2pPortable, P2pElsewhere>), kernelAddress(p2pKernel<kP2pBulk, P2pFew>),
       kernelAddress(p2pKernel<kP2pBulk, P2pMany>), kernelAddress(p2pKernel<kP2pBulk, P2pElsewhere>),
       kernelAddress(leaveKernel), kernelAddress(awaitKernel)});
}

int kernelP2pLaunch(const kernelP2p_t *p2p, const kernelP2pGroup_t *group, cudaStream_t stream) {
  using namespace ultraep;
  kernelP2pLayout_t layout;
  kernelP2pLayout(&p2p->geometry, &layout);
  if (group->nLanes == 0) return cudaSuccess;
  if (kernelP2pFits(group->nLanes, group->nOps)) return launchForm<P2pMany>(p2p, layout, *group, stream);
  return launchForm<P2pElsewhere>(p2p, layout, *group, stream);
}

int kernelP2pAwait(const kernelP2p_t *p2p, uint64_t runs, cudaStream_t stream) {
  return ultraep::launchKernel(ultraep::awaitKernel, {1, 1, 0, stream}, *p2p, runs);
}

int kernelP2pLeave(const kernelP2p_t *p2p, cudaStream_t stream) {
  using namespace ultraep;
  kernelP2pLayout_t layout;
  kernelP2pLayout(&p2p->geometry, &layout);
  return launchKernel(leaveKernel, {1, KERNEL_P2P_MAX_RANKS, 0, stream}, *p2p, layout);
}
