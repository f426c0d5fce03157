// Gradients: master += its replicas' slots, in fp32 in the order master, replicas ascending by rank, rounded
// once; then the slots are zeros again, unless they are to be left as they are.
//
// Where all ranks see the masters, the ranks of an expert's chain take its tiles in turn: each reads a tile's
// rows where they are, adds, and stores the sum in the master. With a single replica that rank of the two
// takes more which is part of fewer chains (shareTurns); where memory is shared, the master's rank, which has
// no slot to clear, takes twice as many. Where they do not see them, the master's rank takes all. (A place of
// a chain is the same here as in the order of addition.) A warp takes a tile of (expert, tensor); it tells
// the slots' ranks which tiles have been read, and those clear them meanwhile. No order of addition depends
// on who takes a tile, or when, so the sums are the same bits every time.
//
// Where any order will do, every rank adds its slots to the masters by itself, and clears what it has read at
// once: nobody reads another rank's memory or waits for it.
#include "elements.cuh"
#include "experts.cuh"
#include "load.cuh"

namespace ultraep {

constexpr int kGradsThreads = 512;
constexpr int kMostRows = 8;            // of one tile whose loads are in flight together
constexpr int kManyRows = 4;            // where a tile has more of them
constexpr size_t kGradsStatic = 2048;   // shared memory that the kernel declares, at most
constexpr int kColumn = kWarp * 16;     // bytes of a row that a warp reads at once
constexpr unsigned kClearPauseNs = 200; // between looks at a slot that is still being read

struct GradsContext {
  const kernelGroup_t &g;
  const kernelRoute_t &route;
  const kernelExperts_t &x;
  const Chain *chains; // masters of this rank lie together
  int nChains, firstMaster, nMasters;
  uint32_t call;
  bool isShared; // the work of adding

  __device__ GradsContext(const kernelGroup_t &group, const kernelRoute_t &plan,
                          const kernelExperts_t &experts, const Chain *table, int n, uint32_t number)
      : g(group), route(plan), x(experts), chains(table), nChains(n), firstMaster(0), nMasters(0),
        call(number), isShared(experts.nGrads > 0 && experts.grads[0].peers) {
    while (firstMaster < n && table[firstMaster].at != 0) firstMaster++;
    while (firstMaster + nMasters < n && table[firstMaster + nMasters].at == 0) nMasters++;
  }
  // In a round the slots' ranks add turns[1] tiles each, then the master's.
  __device__ int masterTurns(const Chain &chain) const { return chain.turns[0] * x.masterTurns; }
  __device__ int round(const Chain &chain) const { return chain.n * chain.turns[1] + masterTurns(chain); }
  // The place that adds a tile.
  __device__ int adder(const Chain &chain, int number) const {
    int turn = number % round(chain), slot = chain.turns[1];
    return isShared && turn < chain.n * slot ? turn / slot + 1 : 0;
  }
  // The tiles that this rank adds.
  __device__ Turns addsOf(const Chain &chain) const {
    if (!isShared) return {1, 0, chain.at == 0};
    int slot = chain.turns[1];
    if (chain.at > 0) return {round(chain), (chain.at - 1) * slot, slot};
    return {round(chain), chain.n * slot, masterTurns(chain)};
  }
};

// Where the lanes' replicas are: lane i holds that of place `first` + i of the chain, none beyond the end.
__device__ inline Place findPlaces(const GradsContext &c, int expert, int first) {
  int nSlots = c.g.planner.nSlots, lane = threadIdx.x % kWarp, n;
  int slot = warpReplica<1>(c.route.slotExpert, c.g.planner.nRanks * nSlots, expert, first + lane - 1, &n);
  return slot < 0 ? Place{-1, -1} : Place{int16_t(slot / nSlots), int16_t(slot % nSlots)};
}

// One tile of one expert's gradient: the master's part and, in every replica's slot, the same part.
struct GradsTile {
  const GradsContext &c;
  const Chain &chain;
  const kernelTensor_t &tensor;
  Tile tile;
  int number;

  __device__ char *master() const {
    int rank = chain.expert / c.g.planner.perRank, local = chain.expert - rank * c.g.planner.perRank;
    char *masters = rank == c.g.rank ? tensor.master : tensor.peers[rank] + tensor.peersOffset;
    return masters + size_t(local) * tensor.bytes + tile.at;
  }
  // The row of the chain's place `first` + lane.
  __device__ const char *row(int first, Place place) const {
    if (place.rank >= 0) return slotAddress(c.x, tensor, place) + tile.at;
    return first + int(threadIdx.x % kWarp) == 0 ? master() : nullptr;
  }
};

template <typename As> struct Sum {
  float f[As::kElements] = {}; // from +0
  __device__ __forceinline__ void add(const uint4 &v) {
#pragma unroll
    for (int i = 0; i < As::kElements; i++) f[i] = __fadd_rn(f[i], As::get(v, i));
  }
};

// kColumns columns of kRows rows, the j-th of which lane j knows: all loads are in flight together. Whole
// warps, of which some lanes may have no column.
template <typename As, int kRows, int kColumns>
__device__ __forceinline__ void sumColumns(char *out, const char *row, uint32_t at, bool inside) {
  uint4 value[kColumns][kRows];
#pragma unroll
  for (int j = 0; j < kRows; j++) {
    auto from =
        reinterpret_cast<const char *>(__shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(row), j)) + at;
#pragma unroll
    for (int i = 0; i < kColumns; i++) value[i][j] = inside ? loadRow(from + i * kColumn) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    Sum<As> sum;
#pragma unroll
    for (int j = 0; j < kRows; j++) sum.add(value[i][j]);
    if (inside) *reinterpret_cast<uint4 *>(out + at + i * kColumn) = As::put(sum.f);
  }
}

template <typename As, int kRows>
__device__ __forceinline__ void sumFew(char *out, const char *row, uint32_t bytes) {
  constexpr uint32_t kColumns = kRows <= 2 ? 8 : kRows <= 4 ? 4 : 2;
  uint32_t lane = threadIdx.x % kWarp, column = 0;
#pragma unroll 1
  for (; column + kColumns * kColumn <= bytes; column += kColumns * kColumn)
    sumColumns<As, kRows, kColumns>(out, row, column + lane * 16, true);
#pragma unroll 1
  for (; column < bytes; column += kColumn)
    sumColumns<As, kRows, 1>(out, row, column + lane * 16, column + lane * 16 < bytes);
}

// Any number of rows: a few at a time.
template <typename As> __device__ void sumMany(const GradsTile &t, const char *firstRows) {
  int nRows = t.chain.n + 1, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (uint32_t column = 0; column < t.tile.bytes; column += kColumn) {
    uint32_t at = column + lane * 16;
    bool inside = at < t.tile.bytes;
    const char *row = firstRows;
    Sum<As> sum;
#pragma unroll 1
    for (int j = 0; j < nRows; j += kManyRows) {
      if (j > 0 && j % kWarp == 0) row = t.row(j, findPlaces(t.c, t.chain.expert, j));
      uint4 value[kManyRows];
#pragma unroll
      for (int i = 0; i < kManyRows; i++) {
        auto from = reinterpret_cast<const char *>(
            __shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(row), (j + i) % kWarp));
        if (inside && j + i < nRows) value[i] = loadRow(from + at);
      }
#pragma unroll
      for (int i = 0; i < kManyRows; i++)
        if (j + i < nRows) sum.add(value[i]);
    }
    if (inside) *reinterpret_cast<uint4 *>(t.master() + at) = As::put(sum.f);
  }
}

template <typename As, int kRows = 2>
__device__ __forceinline__ void sumTile(const GradsTile &t, const char *row) {
  if constexpr (kRows > kMostRows)
    sumMany<As>(t, row);
  else if (t.chain.n + 1 == kRows)
    sumFew<As, kRows>(t.master(), row, t.tile.bytes);
  else
    sumTile<As, kRows + 1>(t, row);
}

// Tells the slots' ranks that their tile has been read by the whole warp.
__device__ inline void tellRead(const GradsTile &t, Place firstPlaces) {
  int lane = threadIdx.x % kWarp;
  __syncwarp();
  for (int from = 0; from <= t.chain.n; from += kWarp) {
    Place place = from == 0 ? firstPlaces : findPlaces(t.c, t.chain.expert, from);
    if (from + lane <= t.chain.n && place.rank >= 0)
      storeReleaseSystem(tileFlag(t.c.x, place, t.number), t.c.call);
  }
}

// This rank's share: worker of nWorkers warps.
__device__ void addTiles(const GradsContext &c, int worker, int nWorkers) {
  int next = 0, before = 0, after = 0; // tiles of the chains below `next`, without and with the last of them
#pragma unroll 1
  for (int i = worker;; i += nWorkers) {
    for (; i >= after && next < c.nChains; next++) {
      before = after;
      after += c.addsOf(c.chains[next]).below(c.x.nGradTiles);
    }
    if (i >= after) return;
    const Chain &chain = c.chains[next - 1];
    int number = c.addsOf(chain).tile(i - before);
    Tile tile = tileOf(c.x.grads, c.x.nGrads, number);
    GradsTile t = {c, chain, c.x.grads[tile.tensor], tile, number};
    Place places = findPlaces(c, chain.expert, 0);
    const char *row = t.row(0, places);
    if (t.tensor.dataType == 0) // ULTRAEP_BFLOAT16
      sumTile<AsBfloat16>(t, row);
    else
      sumTile<AsFloat32>(t, row);
    if (!c.x.leavesSlots) tellRead(t, places);
  }
}

// Waits until the tile of this rank's slot has been read; false when the group has failed. By a warp.
__device__ inline bool waitRead(const GradsContext &c, const Chain &chain, int number, const uint32_t *flag) {
  int adder = c.adder(chain, number);
  int source = __shfl_sync(kFullWarp, int(findPlaces(c, chain.expert, adder).rank), 0);
  if (adder == 0) source = chain.expert / c.g.planner.perRank;
  bool isRead = true;
  if (threadIdx.x % kWarp == 0) {
    WaitClock clock;
    for (int polls = 1; isRead && loadAcquireSystem(flag) != c.call; polls++) {
      isRead = !clock.isOver(c.g, polls, KERNEL_PHASE_GRADS, source, 0);
      __nanosleep(kClearPauseNs);
    }
  }
  return __shfl_sync(kFullWarp, isRead, 0);
}

// This rank's slots.
__device__ void clearSlots(const GradsContext &c, int worker, int nWorkers) {
  int nSlots = c.nChains - c.nMasters;
#pragma unroll 1
  for (int i = worker; i < c.x.nGradTiles * nSlots; i += nWorkers) {
    int nth = i % nSlots, number = i / nSlots;
    const Chain &chain = c.chains[nth < c.firstMaster ? nth : nth + c.nMasters];
    Place here = {int16_t(c.g.rank), chain.slot};
    if (!waitRead(c, chain, number, tileFlag(c.x, here, number))) return;
    Tile tile = tileOf(c.x.grads, c.x.nGrads, number);
    char *slot = slotAddress(c.x, c.x.grads[tile.tensor], here) + tile.at;
#pragma unroll 4
    for (uint32_t at = threadIdx.x % kWarp * 16; at < tile.bytes; at += kColumn)
      *reinterpret_cast<uint4 *>(slot + at) = uint4{};
  }
}

// ---- in any order ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <typename As> __device__ void pushTile(char *master, char *slot, uint32_t bytes, bool clears) {
  constexpr int kAtOnce = 8;
#pragma unroll 1
  for (uint32_t first = threadIdx.x % kWarp * 16; first < bytes; first += kAtOnce * kColumn) {
    uint4 value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (first + i * kColumn < bytes) value[i] = loadRow(slot + first + i * kColumn);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      if (first + i * kColumn >= bytes) continue;
      addTo<As>(master + first + i * kColumn, value[i]);
      if (clears) *reinterpret_cast<uint4 *>(slot + first + i * kColumn) = uint4{};
    }
  }
}

// This rank's slots.
__device__ void pushSlots(const GradsContext &c, int worker, int nWorkers) {
  int nSlots = c.nChains - c.nMasters;
#pragma unroll 1
  for (int i = worker; i < c.x.nGradTiles * nSlots; i += nWorkers) {
    int nth = i % nSlots, number = i / nSlots;
    const Chain &chain = c.chains[nth < c.firstMaster ? nth : nth + c.nMasters];
    Tile tile = tileOf(c.x.grads, c.x.nGrads, number);
    GradsTile t = {c, chain, c.x.grads[tile.tensor], tile, number};
    char *slot = slotAddress(c.x, t.tensor, {int16_t(c.g.rank), chain.slot}) + tile.at;
    if (t.tensor.dataType == 0) // ULTRAEP_BFLOAT16
      pushTile<AsBfloat16>(t.master(), slot, tile.bytes, !c.x.leavesSlots);
    else
      pushTile<AsFloat32>(t.master(), slot, tile.bytes, !c.x.leavesSlots);
  }
}
#endif

// ---- the kernel ----

template <bool kOrdered>
__global__ void __launch_bounds__(kGradsThreads, 1)
    gradsKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                const __grid_constant__ kernelExperts_t x) {
  extern __shared__ __align__(16) char gradsMemory[];
  bool refused = routeRefuses(g, route); // alike on every rank
  uint32_t call = callOf(g);
  __shared__ ReplicatedExperts replicated;
  bool hasReplicas = findReplicated(g, route, &replicated);
  if (refused || !hasReplicas) return; // alike on every rank too: nobody need meet
  auto *chains = reinterpret_cast<Chain *>(gradsMemory);
  int other;
  raiseOpen(g, x.check, call);
  int nChains = findChains<Order::kRank>(g, route, replicated, chains); // while the others come
  bool alive = waitOpen(g, x.check, call, KERNEL_PHASE_GRADS, &other);
  if (alive) {
    GradsContext c(g, route, x, chains, nChains, call);
    int warps = blockDim.x / kWarp, worker = int(blockIdx.x) + int(threadIdx.x / kWarp) * int(gridDim.x);
    if constexpr (kOrdered) {
      addTiles(c, worker, int(gridDim.x) * warps);
      if (!x.leavesSlots) clearSlots(c, worker, int(gridDim.x) * warps);
    } else {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      pushSlots(c, worker, int(gridDim.x) * warps);
#endif
    }
  }
  if (alive && blockIdx.x == 0 && threadIdx.x == 0) {
    unsigned long long bytes = 0, nRead = 0;
    for (int t = 0; t < x.nGrads; t++) bytes += x.grads[t].bytes;
    for (int i = 0; i < nChains; i++) nRead += chains[i].at == 0 ? chains[i].n : 0;
    g.state->gradBytes += nRead * bytes;
  }
  closeExchange(g, route, x.check, call, KERNEL_PHASE_GRADS, alive, other, patienceAtEnd(g));
}

cudaError_t loadGradsKernels() {
  return loadKernels({kernelAddress(gradsKernel<true>), kernelAddress(gradsKernel<false>)});
}

} // namespace ultraep

int kernelGradsLaunch(const kernelGroup_t *group, const kernelRoute_t *route, const kernelExperts_t *experts,
                      cudaStream_t stream) {
  using namespace ultraep;
  size_t bytes = size_t(mostChains(group->planner)) * sizeof(Chain);
  if (bytes + kGradsStatic > size_t(group->sharedBytes)) return cudaErrorInvalidConfiguration;
  int64_t tiles = int64_t(experts->nGradTiles) * std::max(1, mostChains(group->planner));
  int64_t warps = kGradsThreads / kWarp;
  int nBlocks = int(std::min<int64_t>(group->nBlocks, (tiles + warps - 1) / warps));
  auto kernel = experts->isUnordered && group->hasBulk ? gradsKernel<false> : gradsKernel<true>;
  return launchKernel(kernel, {nBlocks, kGradsThreads, bytes, stream}, *group, *route, *experts);
}
