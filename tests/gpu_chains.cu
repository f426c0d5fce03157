#include "experts.cuh"
#include "gpu_chains.h"
#include "launch.cuh"

namespace ultraep {

static __device__ gpuPlace_t chainsPlace(Place place) {
  return {place.rank, place.slot};
}

template <Order kOrder>
static __global__ void chainsKernel(kernelPlanner_t planner, int32_t *slotExpert, int stride, int32_t most,
                                    gpuChain_t *chains, int32_t *nChains) {
  extern __shared__ __align__(16) char chainsMemory[];
  kernelGroup_t g = {};
  kernelRoute_t route = {};
  g.planner = planner;
  g.rank = int(blockIdx.x) * stride;
  route.slotExpert = slotExpert;
  auto *found = reinterpret_cast<Chain *>(chainsMemory);
  __shared__ ReplicatedExperts replicated;
  (void)findReplicated(g, route, &replicated);
  int n = findChains<kOrder>(g, route, replicated, found);
  if (threadIdx.x == 0) nChains[blockIdx.x] = n;
  for (int i = threadIdx.x; i < min(n, most); i += blockDim.x) {
    const Chain &c = found[i];
    chains[size_t(blockIdx.x) * most + i] = {c.expert,
                                             c.n,
                                             c.at,
                                             c.slot,
                                             {chainsPlace(c.before[0]), chainsPlace(c.before[1])},
                                             {chainsPlace(c.after[0]), chainsPlace(c.after[1])},
                                             {c.turns[0], c.turns[1]}};
  }
}

} // namespace ultraep

int gpu_chains(const kernelPlanner_t *planner, const int32_t *slotExpert, int stride, int nFound, int isRelay,
               int32_t most, gpuChain_t *chains, int32_t *nChains) {
  using namespace ultraep;
  auto kernel = isRelay ? chainsKernel<Order::kRelay> : chainsKernel<Order::kRank>;
  Launch launch = {nFound, 128, size_t(mostChains(*planner)) * sizeof(Chain), nullptr};
  return launchKernel(kernel, launch, *planner, const_cast<int32_t *>(slotExpert), stride, most, chains,
                      nChains);
}
