// Weights: every replica's slot gets its master's tensors.
//
// An expert with n replicas is relayed along its chain, places 0 (the master) to n. Of every second tile the
// odd places are the movers, of the others the even ones: a mover loads the tile once, from the place before
// it (the master from its own memory), and stores it at its own place and at the one after it. So every place
// moves half of the tiles, takes in and sends out each byte once at most, and a tile needs half as many steps
// as there are hops. With a single replica either of the two ranks may move any tile: see shareTurns.
//
// Every worker does its tasks in one order of tiles and experts that all ranks share (TaskWalk), and a task
// waits only for the same tile and expert two places earlier; so the first task that is not done can always
// be done, and nobody waits for ever.
//
// With bulk copies a block is a worker: one warp waits for flags and loads tiles into stages, another stores
// them and tells the next rank; a third waits for the other ranks to come, before which only tiles of this
// rank's own masters are loaded, and none is stored. Without them (sm_80) a warp is a worker and copies
// through registers.
#include "bulk.cuh"
#include "experts.cuh"
#include "load.cuh"

namespace ultraep {

constexpr int kBulkThreads = 128;     // all of them find chains
constexpr int kPortableThreads = 512; // all of them copy
constexpr int kMaxStages = 16;
constexpr size_t kWeightsStatic = 6656; // shared memory that the kernel declares, at most

// What a mover does with one tile.
struct Task {
  const char *from;
  char *to[2];             // null: only one
  const uint32_t *awaited; // the flag that says that the tile has come to `from`; null: it was always there
  uint32_t *raised;        // the flag for the next mover; null: there is none
  uint32_t bytes;
  int32_t source;   // the rank that raises `awaited`
  uint64_t extraNs; // patience
  bool isOwn;       // `from` is this rank's master
};

// ---- shares of the work ----

// A tile of a chain that this rank moves.
struct Share {
  int32_t tile, chain;
};

// The tiles of a chain that this rank moves.
__device__ __forceinline__ Turns movesOf(const Chain &c) {
  if (c.n > 1) return {2, 1 - c.at % 2, 1};
  return {c.turns[0] + c.turns[1], c.at == 0 ? c.turns[1] : 0, c.turns[c.at]};
}

// Few large rounds are quickly gone over, small ones let experts begin sooner that wait for others.
__device__ __forceinline__ int roundTiles(int nReplicated) {
  return 512 / min(8, nReplicated);
}

// Goes over this rank's tasks by rounds of tiles, in a round by chains, which is the order on all ranks, and
// gives every worker every nWorkers-th. By a warp, with `window` ([32] in shared memory) of its own.
struct TaskWalk {
  static constexpr int kFirst = 4, kEnough = 8; // tasks to know ahead, in the first window and later

  const Chain *chains;
  int nChains, nTiles, roundTiles;
  int round = 0, chain = 0; // that come next
  int taken = 0;            // of them, by this worker
  int before = 0;           // tasks of the chains before, modulo the workers
  int enough = kFirst;

  // Returns how many tasks it put in the window, 0 at the end.
  __device__ int take(int worker, int nWorkers, Share *window) {
    int lane = threadIdx.x % kWarp, have = 0;
    __syncwarp(); // the last window has been read
    while (have < enough && nChains > 0 && round * roundTiles < nTiles) {
      Turns tasks = movesOf(chains[chain]);
      int first = tasks.below(round * roundTiles),
          end = tasks.below(min(nTiles, round * roundTiles + roundTiles));
      int skipped = worker - int(uint32_t(first + before) % uint32_t(nWorkers));
      if (skipped < 0) skipped += nWorkers;
      int nth = first + skipped + (taken + lane) * nWorkers, room = kWarp - have;
      int n = __popc(__ballot_sync(kFullWarp, nth < end));
      if (lane < min(n, room)) window[have + lane] = {tasks.tile(nth), chain};
      have += min(n, room);
      taken += min(n, room);
      if (n < kWarp && n <= room) pass(tasks, nWorkers);
    }
    enough = kEnough;
    __syncwarp();
    return have;
  }

private:
  __device__ void pass(const Turns &tasks, int nWorkers) {
    taken = 0;
    before = int(uint32_t(before + tasks.below(nTiles)) % uint32_t(nWorkers));
    if (++chain < nChains) return;
    chain = before = 0;
    round++;
  }
};

struct WeightsContext {
  const kernelGroup_t &g;
  const kernelExperts_t &x;
  const Chain *chains;
  int nChains;
  uint32_t call;

  // All pointers are looked up at once, needed or not, as they are far.
  __device__ Task task(Share share) const {
    const Chain &c = chains[share.chain];
    int number = share.tile;
    Tile tile = tileOf(x.weights, x.nWeights, number);
    const kernelTensor_t &tensor = x.weights[tile.tensor];
    bool isMaster = c.at == 0, awaits = c.at >= 2, passes = c.at < c.n, raises = c.at + 2 <= c.n;
    Place here = {int16_t(g.rank), c.slot}, from = isMaster ? here : c.before[0],
          next = passes ? c.after[0] : here;
    char *masters = tensor.peers[from.rank], *fromSlots = x.slots[from.rank], *own = x.slots[g.rank];
    char *nextSlots = x.slots[next.rank], *raisedSlots = x.slots[raises ? c.after[1].rank : g.rank];
    masters += tensor.peersOffset + size_t(c.expert - from.rank * g.planner.perRank) * tensor.bytes;
    char *inOwn = inSlot(own, tensor, here.slot) + tile.at;
    char *inNext = inSlot(nextSlots, tensor, next.slot) + tile.at;
    return {(from.slot < 0 ? masters : inSlot(fromSlots, tensor, from.slot)) + tile.at,
            {isMaster ? inNext : inOwn, isMaster || !passes ? nullptr : inNext},
            awaits ? inFlags(x, own, here.slot, number) : nullptr,
            raises ? inFlags(x, raisedSlots, c.after[1].slot, number) : nullptr,
            tile.bytes,
            c.before[1].rank,
            patience(g, c.at, c.n),
            isMaster};
  }
};

// A worker's tasks, a window of them at a time: lane i < n holds one. By a warp.
struct Worker {
  const WeightsContext &c;
  int number, nWorkers;
  Share *window; // of this warp
  TaskWalk walk;
  Task task = {};
  int n = 0;

  __device__ Worker(const WeightsContext &context, int mine, int all, Share *windows, int roundTiles)
      : c(context), number(mine), nWorkers(all),
        window(windows), walk{context.chains, context.nChains, context.x.nWeightTiles, roundTiles} {}
  __device__ void next() {
    n = walk.take(number, nWorkers, window);
    task = {};
    if (int(threadIdx.x % kWarp) < n) task = c.task(window[threadIdx.x % kWarp]);
  }
};

// Waits until the task of lane `first` may begin; returns the number of the first lane whose task may not, or
// `first` when the group has failed. By a warp; lanes without a task are ready.
__device__ inline int waitTasks(const WeightsContext &c, const Task &task, bool *isReady, int first) {
  int lane = threadIdx.x % kWarp;
  WaitClock clock;
  for (int polls = 1;; polls++) {
    if (!*isReady) *isReady = loadAcquireSystem(task.awaited) == c.call;
    unsigned waiting = __ballot_sync(kFullWarp, !*isReady) >> first;
    if (!(waiting & 1)) return waiting ? first + __ffs(waiting) - 1 : kWarp;
    bool isOver = lane == first && clock.isOver(c.g, polls, KERNEL_PHASE_WEIGHTS, task.source, task.extraNs);
    if (__any_sync(kFullWarp, isOver)) return first;
  }
}

// Calls copy(n, task, ready) for the worker's windows, the first of which it has: ready(i) waits until lane
// i's task may begin and returns how many of the first lanes' may, i when the group has failed.
template <typename Copy> __device__ void forTasks(Worker &worker, Copy copy) {
  for (; worker.n > 0; worker.next()) {
    bool isReady = !worker.task.awaited;
    auto ready = [&](int first) { return min(worker.n, waitTasks(worker.c, worker.task, &isReady, first)); };
    if (!copy(worker.n, worker.task, ready)) return;
  }
}

// ---- without bulk copies ----

__device__ __forceinline__ void copyTile(const char *from, char *to, char *too, uint32_t bytes, int lane) {
  constexpr int kAtOnce = 8;
  for (uint32_t start = lane * 16; start < bytes; start += kAtOnce * kWarp * 16) {
    uint4 value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (uint32_t at = start + i * kWarp * 16; at < bytes)
        value[i] = __ldcg(reinterpret_cast<const uint4 *>(from + at));
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (uint32_t at = start + i * kWarp * 16; at < bytes) {
        *reinterpret_cast<uint4 *>(to + at) = value[i];
        if (too) *reinterpret_cast<uint4 *>(too + at) = value[i];
      }
  }
}

template <typename T> __device__ __forceinline__ T *shuffled(T *pointer, int lane) {
  return reinterpret_cast<T *>(__shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(pointer), lane));
}

__device__ void copyPortable(Worker &worker) {
  int lane = threadIdx.x % kWarp;
  forTasks(worker, [&](int n, const Task &task, auto ready) {
    for (int i = 0; i < n; i++) {
      if (ready(i) == i) return false;
      __syncwarp(); // what a lane has acquired, all have
      copyTile(shuffled(task.from, i), shuffled(task.to[0], i), shuffled(task.to[1], i),
               __shfl_sync(kFullWarp, task.bytes, i), lane);
      __syncwarp();
      if (lane == i && task.raised) storeReleaseSystem(task.raised, worker.c.call);
    }
    return true;
  });
}

// ---- with bulk copies ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
enum class Opening : uint32_t { kWaits, kOpen, kShut };

// Between the loading, the storing and the waiting warp. Tile i of the block uses stage i modulo nStages.
struct Stages {
  uint64_t full[kMaxStages]; // barriers: the tile is here
  struct {
    char *to[2];
    uint32_t *raised;
    uint32_t bytes;
  } tile[kMaxStages];
  uint32_t nFreed;  // tiles whose stages may be loaded again
  uint32_t nTiles;  // of the block, once they are known to be all
  uint32_t isWhole; // nTiles is set
  uint32_t opening; // whether the other ranks are in the call
};

// By one thread; the block's barrier comes before the stages are used.
__device__ void initStages(Stages &s, int nStages) {
  for (int i = 0; i < nStages; i++) barrierInit(&s.full[i]);
  barrierInitFence();
  s.nFreed = s.isWhole = 0;
  s.opening = uint32_t(Opening::kWaits);
}

// Waits until it is known whether tiles may be moved from and to other ranks; the waiting warp gives up in
// time.
__device__ __forceinline__ bool isOpen(const Stages &s) {
  Opening opening;
  do opening = Opening(loadAcquireBlock(&s.opening));
  while (opening == Opening::kWaits);
  bulkFence(); // what peers did before this call was acquired by ordinary loads
  return opening == Opening::kOpen;
}

__device__ void loadTiles(Worker &worker, Stages &s, char *buffers, uint32_t nStages) {
  uint32_t loaded = 0, lane = threadIdx.x % kWarp;
  bool open = false; // is known to be
  forTasks(worker, [&](int n, const Task &task, auto ready) {
    unsigned others = __ballot_sync(kFullWarp, int(lane) < n && !task.isOwn);
    int nOwn = others ? __ffs(others) - 1 : n; // tasks before the first that is not
    for (int i = 0; i < n;) {
      if (!open && (i >= nOwn || loaded == nStages) && !(open = isOpen(s))) return false;
      int end = open ? ready(i) : min(nOwn, i + int(nStages - loaded));
      if (end == i) return false;
      for (; i < end; i++, loaded++) {
        // Signed: a lane that is behind the others finds more tiles freed than it has counted.
        while (int32_t(loaded - loadAcquireBlock(&s.nFreed)) >= int32_t(nStages)) {
        }
        if (int(lane) != i) continue;
        uint32_t stage = loaded % nStages;
        s.tile[stage] = {{task.to[0], task.to[1]}, task.raised, task.bytes};
        if (task.awaited) bulkFence();
        bulkLoad(buffers + stage * KERNEL_TILE_BYTES, task.from, task.bytes, &s.full[stage]);
      }
    }
    return true;
  });
  __syncwarp();
  if (lane != 0) return;
  s.nTiles = loaded;
  storeReleaseBlock(&s.isWhole, 1);
}

// A batch of stores: all but the newest kNewer batches have read their stages, and, where flags wait for
// that, written; tells so. Every lane has at most one tile in a batch.
template <int kNewer>
__device__ __forceinline__ void settleStores(Stages &s, uint32_t nFreed, uint32_t *raised, uint32_t call) {
  bulkWaitRead<kNewer>();
  __syncwarp();
  if (threadIdx.x % kWarp == 0) storeReleaseBlock(&s.nFreed, nFreed);
  if (!__any_sync(kFullWarp, raised != nullptr)) return;
  bulkWaitWritten<kNewer>();
  if (raised) storeReleaseSystem(raised, call);
}

__device__ void storeTiles(Stages &s, const char *buffers, uint32_t nStages, uint32_t call) {
  uint32_t stored = 0, settled = 0, lane = threadIdx.x % kWarp;
  uint32_t *raised = nullptr; // of the newest batch
  if (!isOpen(s)) {           // a block's memory must not go while tiles come
    while (loadAcquireBlock(&s.isWhole) == 0) {
    }
    for (uint32_t i = 0; i < s.nTiles; i++) barrierWait(&s.full[i], 0);
    return;
  }
  for (;;) {
    bool isWhole = __all_sync(kFullWarp, loadAcquireBlock(&s.isWhole)); // before the look at the barriers
    uint32_t mine = stored + lane, stage = mine % nStages;
    bool isHere = lane < nStages && barrierTest(&s.full[stage], mine / nStages & 1);
    uint32_t n = __ffs(~__ballot_sync(kFullWarp, isHere)) - 1; // lanes of nStages and more are not here
    if (n == 0 && settled < stored) {
      settleStores<0>(s, stored, raised, call);
      raised = nullptr;
      settled = stored;
    } else if (n > 0) {
      for (int i = 0; i < 2; i++)
        if (lane < n && s.tile[stage].to[i])
          bulkStore(s.tile[stage].to[i], buffers + stage * KERNEL_TILE_BYTES, s.tile[stage].bytes);
      bulkCommit();
      uint32_t *newest = lane < n ? s.tile[stage].raised : nullptr;
      if (settled < stored) settleStores<1>(s, stored, raised, call);
      raised = newest;
      settled = stored;
      stored += n;
    } else if (isWhole && stored == s.nTiles) {
      break;
    }
  }
  bulkWaitWritten();
}

#endif

// ---- the kernel ----

// Where every local instance's tensors are, for ultraepSegments_t. By one block's threads from `first` on.
__device__ void fillPointers(const kernelGroup_t &g, const kernelRoute_t &route, const kernelExperts_t &x,
                             int first) {
  int mine = int(threadIdx.x) - first, stride = int(blockDim.x) - first;
  if (mine < 0) return;
  for (int t = 0; t < x.nWeights + x.nGrads; t++) {
    int grad = t - x.nWeights;
    const kernelTensor_t &tensor = grad < 0 ? x.weights[t] : x.grads[grad];
    void **pointers = route.pointers + (grad < 0 ? t : KERNEL_MAX_TENSORS + grad) * g.nSegments;
    for (int i = mine; i < g.nSegments; i += stride) {
      int slot = i - g.planner.perRank;
      pointers[i] = slot < 0 ? tensor.master + size_t(i) * tensor.bytes
                             : x.ownSlots + tensor.slotOffset + size_t(slot) * tensor.bytes;
    }
  }
}

template <bool kBulk>
__global__ void __launch_bounds__(kBulk ? kBulkThreads : kPortableThreads, 1)
    weightsKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                  const __grid_constant__ kernelExperts_t x, int nStages) {
  extern __shared__ __align__(128) char weightsMemory[];
  __shared__ Share windows[kPortableThreads];
  bool refused = routeRefuses(g, route); // alike on every rank
  uint32_t call = callOf(g);
  __shared__ ReplicatedExperts replicated;
  bool hasReplicas = findReplicated(g, route, &replicated);
  if (refused) return;
  if (!hasReplicas) { // alike on every rank too: nobody need meet
    if (blockIdx.x == 0) fillPointers(g, route, x, 0);
    return;
  }
  auto *chains = reinterpret_cast<Chain *>(weightsMemory + nStages * KERNEL_TILE_BYTES);
  int warp = threadIdx.x / kWarp, nWarps = blockDim.x / kWarp;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ Stages stages;
  if (kBulk && threadIdx.x == kWarp) initStages(stages, nStages);
#endif
  __shared__ int other;
  __shared__ bool alive;
  if (warp == nWarps - 1) warpRaiseOpen(g, x.check, call);
  int nChains = findChains<Order::kRelay>(g, route, replicated, chains); // while the others come
  // By a warp.
  auto waitOthers = [&] {
    int differs;
    bool all = warpWaitOpen(g, x.check, call, KERNEL_PHASE_WEIGHTS, &differs);
    if (threadIdx.x % kWarp == 0) {
      other = differs;
      alive = all;
    }
    return all;
  };
  // By one block's threads from `first` on, once they have.
  auto record = [&](int first) {
    fillPointers(g, route, x, first);
    if (int(threadIdx.x) != first) return;
    unsigned long long bytes = 0, nHere = 0;
    for (int t = 0; t < x.nWeights; t++) bytes += x.weights[t].bytes;
    for (int i = 0; i < nChains; i++) nHere += chains[i].at > 0;
    g.state->weightBytes += nHere * bytes;
  };
  WeightsContext c{g, x, chains, nChains, call};
  int nWorkers = kBulk ? 1 : nWarps; // of a block
  Worker worker(c, blockIdx.x * nWorkers + warp, gridDim.x * nWorkers, windows + warp * kWarp,
                roundTiles(replicated.countAll(g.planner.nExperts)));
  if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (warp == 0) {
      worker.next();
      loadTiles(worker, stages, weightsMemory, nStages);
    } else if (warp == 1) {
      storeTiles(stages, weightsMemory, nStages, call);
    } else if (warp == nWarps - 1) {
      bool open = waitOthers();
      if (threadIdx.x % kWarp == 0)
        storeReleaseBlock(&stages.opening, uint32_t(open ? Opening::kOpen : Opening::kShut));
      if (open && blockIdx.x == 0) record(warp * kWarp);
    }
#endif
  } else {
    if (warp == nWarps - 1) waitOthers();
    worker.next();
    __syncthreads();
    if (alive && blockIdx.x == 0) record(0);
    if (alive) copyPortable(worker);
  }
  __syncthreads();
  closeExchange(g, route, x.check, call, KERNEL_PHASE_WEIGHTS, alive, other, patienceAtEnd(g));
}

cudaError_t loadWeightsKernels() {
  return loadKernels({kernelAddress(weightsKernel<true>), kernelAddress(weightsKernel<false>)});
}

} // namespace ultraep

int kernelWeightsLaunch(const kernelGroup_t *group, const kernelRoute_t *route,
                        const kernelExperts_t *experts, cudaStream_t stream) {
  using namespace ultraep;
  bool bulk = group->hasBulk;
  size_t table = size_t(mostChains(group->planner)) * sizeof(Chain);
  size_t room = size_t(group->sharedBytes) - kWeightsStatic - table;
  int nStages = bulk ? int(std::min<size_t>(kMaxStages, room / KERNEL_TILE_BYTES)) : 0;
  size_t bytes = size_t(nStages) * KERNEL_TILE_BYTES + table;
  int64_t wanted = int64_t(experts->nWeightTiles) * std::max(1, mostChains(group->planner));
  int nBlocks = int(std::min<int64_t>(group->nBlocks, wanted));
  auto kernel = bulk ? weightsKernel<true> : weightsKernel<false>;
  return launchKernel(kernel, {nBlocks, bulk ? kBulkThreads : kPortableThreads, bytes, stream}, *group,
                      *route, *experts, nStages);
}
