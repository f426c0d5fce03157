// Route: count -> publish -> plan -> places, in one kernel without the host.
//
//   count    every block counts its tokens' experts; rows of counts per block, then a barrier of the grid
//   publish  the sum over blocks is this rank's row of the load matrix: stored in every rank's window, then a
//   flag plan     when all rows are in, every block plans for itself in shared memory: same input, same plan,
//   no broadcast places   each (token, k) gets its rank and row, by its position among the rank's assignments
//   of its expert
//
// A warp looks at whole tokens, as many at a time as fit its lanes, so one token's assignments meet by
// shuffles.
#include "load.cuh"
#include "planner.cuh"
#include "signal.cuh"

#include <algorithm>

namespace ultraep {

constexpr int kRouteThreads = 512;
constexpr int kRouteWarps = kRouteThreads / kWarp;
constexpr size_t kStaticShared = 2048; // at most, declared in the kernel

// A run of this rank's assignments of one expert that go to one instance, in order of (token, k).
struct Piece {
  int32_t end;   // position after the last
  int32_t rank;  // of the instance
  int32_t delta; // row = position + delta
};

struct RouteShared {
  PlanArrays plan;
  int32_t *masterRow;  // [E] first row of the master's segment on its rank
  int32_t *slotRow;    // [R*S]
  int32_t *firstPiece; // [E]
  Piece *pieces;       // [E + 2*R*S]: one each for experts without replicas, then runs for the others
  uint32_t *counts;    // [nWarps][E]
  int nWarps;

  __host__ __device__ static size_t fixedBytes(int64_t nRanks, int64_t nExperts, int64_t nSlots) {
    return PlanArrays::bytes(nRanks, nExperts, nSlots) + 4 * size_t(2 * nExperts + nRanks * nSlots) +
           sizeof(Piece) * size_t(nExperts + 2 * nRanks * nSlots) + 16;
  }
  __device__ void carve(char *base, int64_t nRanks, int64_t nExperts, int64_t nSlots, int warps) {
    plan.carve(base, nRanks, nExperts, nSlots);
    masterRow =
        reinterpret_cast<int32_t *>(base + (PlanArrays::bytes(nRanks, nExperts, nSlots) + 15) / 16 * 16);
    slotRow = masterRow + nExperts;
    firstPiece = slotRow + nRanks * nSlots;
    pieces = reinterpret_cast<Piece *>(firstPiece + nExperts);
    counts = reinterpret_cast<uint32_t *>(pieces + nExperts + 2 * nRanks * nSlots);
    nWarps = warps;
  }
};

// The part of the tokens that one warp counts, and later places, in steps of as many tokens as its lanes
// hold.
struct WarpTokens {
  int from, to, perStep, topK, lane;
  __device__ WarpTokens(const kernelGroup_t &g, int nTokens, int nWarps) {
    int warp = threadIdx.x / kWarp, workers = int(gridDim.x) * nWarps;
    int worker = int(blockIdx.x) * nWarps + warp;
    topK = g.topK;
    perStep = kWarp / topK;
    lane = threadIdx.x % kWarp;
    int share = (nTokens + workers - 1) / workers;
    share = (share + perStep - 1) / perStep * perStep;
    from = int(min(int64_t(nTokens), int64_t(worker) * share));
    to = warp < nWarps ? min(nTokens, from + share) : from;
  }
  // Index of this lane's entry in [nTokens][topK], -1 for a lane without one.
  __device__ int64_t entry(int token) const {
    return lane < perStep * topK && token + lane / topK < to ? int64_t(token) * topK + lane : -1;
  }
};

__device__ void routeCount(const kernelGroup_t &g, const RouteShared &s, const int32_t *topkIdx,
                           int nTokens) {
  int nExperts = g.planner.nExperts, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < s.nWarps * nExperts; i += blockDim.x) s.counts[i] = 0;
  __syncthreads();
  WarpTokens w(g, nTokens, s.nWarps);
  uint32_t *mine = s.counts + warp * nExperts;
  for (int token = w.from; token < w.to; token += w.perStep) {
    int64_t at = w.entry(token);
    int e = at < 0 ? -1 : topkIdx[at];
    if (e < -1 || e >= nExperts) {
      g.state->badEntry = 1; // every writer writes the same
      e = -1;
    }
    unsigned same = __match_any_sync(kFullWarp, e);
    if (e >= 0 && lane == __ffs(same) - 1) mine[e] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < nExperts; e += blockDim.x) {
    uint32_t sum = 0;
    for (int i = 0; i < s.nWarps; i++) {
      uint32_t count = s.counts[i * nExperts + e];
      s.counts[i * nExperts + e] = sum; // position of the warp's first assignment of e within the block
      sum += count;
    }
    g.chunkCounts[int64_t(blockIdx.x) * nExperts + e] = int32_t(sum);
  }
}

// Stores this rank's row of the load matrix in the windows of every gridDim.x-th rank and raises the flags;
// on the way makes the warps' positions count from the start of the rank's assignments.
__device__ void routePublish(const kernelGroup_t &g, const RouteShared &s, uint32_t call) {
  int nExperts = g.planner.nExperts, nRanks = g.planner.nRanks, nBlocks = gridDim.x;
  int64_t row = (int64_t(call & 1) * nRanks + g.rank) * nExperts;
  for (int e = threadIdx.x; e < nExperts; e += blockDim.x) {
    int32_t sum = 0, before = 0;
    for (int b = 0; b < nBlocks; b++) {
      if (b == int(blockIdx.x)) before = sum;
      sum += __ldcg(g.chunkCounts + int64_t(b) * nExperts + e);
    }
    for (int i = 0; i < s.nWarps; i++) s.counts[i * nExperts + e] += before;
    for (int r = blockIdx.x; r < nRanks; r += nBlocks)
      reinterpret_cast<int32_t *>(g.windows[r] + g.loadsOffset)[row + e] = sum;
  }
  __syncthreads();
  uint32_t bad = *reinterpret_cast<volatile uint32_t *>(&g.state->badEntry);
  for (int i = threadIdx.x; int(blockIdx.x) + i * nBlocks < nRanks; i += blockDim.x) {
    __threadfence_system();
    storeReleaseSystem(flagOf(g, blockIdx.x + i * nBlocks, KERNEL_FLAG_ROUTE, g.rank),
                       uint64_t(bad) << 32 | call);
  }
}

// First rows of all segments, and the first rank whose rows do not fit (else -1, in every thread).
__device__ int routeSegments(const kernelGroup_t &g, const RouteShared &s, int64_t *needed) {
  __shared__ int overfull;
  __shared__ int64_t overfullRows;
  const kernelPlanner_t &p = g.planner;
  int perRank = p.nExperts / p.nRanks;
  if (threadIdx.x == 0) overfull = 0x7fffffff;
  __syncthreads();
  auto align = [&](int64_t rows) { return (rows + g.alignment - 1) / g.alignment * g.alignment; };
  for (int r = threadIdx.x; r < p.nRanks; r += blockDim.x) {
    int64_t row = 0;
    for (int e = r * perRank; e < (r + 1) * perRank; e++) {
      s.masterRow[e] = int32_t(row);
      row += align(s.plan.rem[e]);
    }
    for (int i = r * p.nSlots; i < r * p.nSlots + s.plan.slotCount[r]; i++) {
      s.slotRow[i] = int32_t(row);
      row += align(s.plan.slotQuota[i]);
    }
    s.plan.largest[r] = row;
    if (row > g.maxRecvRows) atomicMin(&overfull, r);
  }
  __syncthreads();
  if (threadIdx.x == 0 && overfull != 0x7fffffff) overfullRows = s.plan.largest[overfull];
  __syncthreads();
  if (overfull == 0x7fffffff) return -1;
  *needed = overfullRows;
  return overfull;
}

// One replicated expert's runs for this rank, as balancer/decompose.c lays them out: first the rank's own
// instance, then the overlap of the rank's stretch of the line with each instance's. By one thread.
struct RouteExpert {
  const kernelGroup_t &g;
  const RouteShared &s;
  const int32_t *loads;
  int e, perRank;

  __device__ int64_t load(int src) const { return __ldcg(loads + int64_t(src) * g.planner.nExperts + e); }

  // Calls visit(rank, quota, row) for the master, then the replicas ascending by rank.
  template <typename Visit> __device__ void instances(Visit visit) const {
    visit(e / perRank, s.plan.rem[e], s.masterRow[e]);
    for (int i = 0; i < g.planner.nRanks * g.planner.nSlots; i++)
      if (s.plan.slotExpert[i] == e) visit(i / g.planner.nSlots, s.plan.slotQuota[i], s.slotRow[i]);
  }

  // Returns the runs written, at most one per instance.
  __device__ int pieces(Piece *out) const {
    int64_t mine = load(g.rank), own = 0, lineStart = 0;
    for (int src = 0; src < g.rank; src++) lineStart += load(src);
    instances([&](int rank, int64_t quota, int32_t) {
      if (rank < g.rank) lineStart -= min(quota, load(rank));
      if (rank == g.rank) own = min(quota, mine);
    });
    int64_t lineEnd = lineStart + mine - own, at = 0;
    int n = 0;
    instances([&](int rank, int64_t, int32_t row) {
      if (rank == g.rank && own > 0) out[n++] = {int32_t(own), rank, row + rowsBefore(rank, lineStart)};
    });
    int64_t position = own;
    instances([&](int rank, int64_t quota, int32_t row) {
      int64_t kept = min(quota, load(rank)), from = at, to = at + quota - kept;
      at = to;
      int64_t overlap = min(to, lineEnd) - max(from, lineStart);
      if (overlap <= 0) return;
      int64_t first = row + max(int64_t(0), min(to, lineStart) - from) + (rank < g.rank ? kept : 0);
      out[n++] = {int32_t(position + overlap), rank, int32_t(first - position)};
      position += overlap;
    });
    return n;
  }

  // Rows that lower source ranks have in the instance on `wanted`, for a run that is at the start of this
  // rank's.
  __device__ int32_t rowsBefore(int wanted, int64_t lineStart) const {
    int64_t at = 0, before = 0;
    instances([&](int rank, int64_t quota, int32_t) {
      int64_t from = at, to = at + quota - min(quota, load(rank));
      at = to;
      if (rank == wanted) before = max(int64_t(0), min(to, lineStart) - from);
    });
    return int32_t(before);
  }
};

__device__ void routePieces(const kernelGroup_t &g, const RouteShared &s, const int32_t *loads) {
  __shared__ int used;
  const kernelPlanner_t &p = g.planner;
  int perRank = p.nExperts / p.nRanks, nSlots = p.nRanks * p.nSlots;
  if (threadIdx.x == 0) used = p.nExperts;
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x) s.firstPiece[e] = e;
  __syncthreads();
  for (int i = threadIdx.x; i < nSlots; i += blockDim.x)
    if (s.plan.slotExpert[i] >= 0) s.firstPiece[s.plan.slotExpert[i]] = -1; // replicated
  __syncthreads();
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x) {
    if (s.firstPiece[e] < 0) {
      int nInstances = 1;
      for (int i = 0; i < nSlots; i++) nInstances += s.plan.slotExpert[i] == e;
      int first = atomicAdd(&used, nInstances);
      RouteExpert{g, s, loads, e, perRank}.pieces(s.pieces + first);
      s.firstPiece[e] = first;
    } else {
      int32_t before = 0;
      for (int src = 0; src < g.rank; src++) before += __ldcg(loads + int64_t(src) * p.nExperts + e);
      s.pieces[e] = {0x7fffffff, e / perRank, s.masterRow[e] + before};
    }
  }
  __syncthreads();
}

__device__ void routePlaces(const kernelGroup_t &g, const kernelRoute_t &route, const RouteShared &s,
                            const int32_t *topkIdx, const float *topkWeights, int nTokens) {
  int nExperts = g.planner.nExperts, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  WarpTokens w(g, nTokens, s.nWarps);
  uint32_t *position = s.counts + warp * nExperts;
  for (int token = w.from; token < w.to; token += w.perStep) {
    int64_t at = w.entry(token);
    int e = at < 0 ? -1 : topkIdx[at];
    float weight = at >= 0 && topkWeights ? topkWeights[at] : 1.0f;
    unsigned same = __match_any_sync(kFullWarp, e);
    int earlier = __popc(same & ((1u << lane) - 1));
    kernelPlace_t place = {-1, -1};
    if (e >= 0) {
      int mine = int(position[e]) + earlier, i = s.firstPiece[e];
      while (mine >= s.pieces[i].end) i++;
      place = {s.pieces[i].rank, mine + s.pieces[i].delta};
    }
    __syncwarp();
    if (e >= 0 && earlier == 0) position[e] += __popc(same);
    __syncwarp();
    if (g.usesMeta) {
      int key = place.rank < 0 ? -1 - lane : (lane / w.topK) << 16 | place.rank;
      unsigned group = __match_any_sync(kFullWarp, key);
      unsigned later = group & ~((2u << lane) - 1);
      int next = __shfl_sync(kFullWarp, place.row, later ? __ffs(later) - 1 : lane);
      bool first = (group & ((1u << lane) - 1)) == 0;
      if (place.rank >= 0) {
        auto *meta = reinterpret_cast<kernelMeta_t *>(g.windows[place.rank] + route.metaOffset);
        meta[place.row] = {later ? next : -1, first, weight, 0};
        if (!first) place.rank |= KERNEL_PLACE_LATER;
        if (__popc(group) > 1) place.rank |= KERNEL_PLACE_SHARED;
      }
    }
    if (at >= 0) {
      route.places[at] = place;
      route.weights[at] = weight;
    }
  }
}

// Tells how the update came out. By one thread.
__device__ void routeConclude(const kernelRoute_t &route, kernelRouteStatus_t status) {
  status.nUpdates = route.status->nUpdates + 1;
  status.reserved = 0;
  *route.status = status;
  volatile kernelRouteStatus_t *host = route.hostStatus;
  host->code = status.code;
  host->rank = status.rank;
  host->rows = status.rows;
  __threadfence_system();
  host->nUpdates = status.nUpdates;
}

// What the host sees of the route: segments, loads, status. By block 0.
__device__ void routeReport(const kernelGroup_t &g, const kernelRoute_t &route, const RouteShared &s,
                            const int32_t *loads, kernelRouteStatus_t status) {
  const kernelPlanner_t &p = g.planner;
  int perRank = p.nExperts / p.nRanks;
  for (int i = threadIdx.x; i < p.nRanks * p.nExperts; i += blockDim.x) route.loads[i] = __ldcg(loads + i);
  if (status.code == kSuccess) {
    for (int i = threadIdx.x; i < g.nSegments; i += blockDim.x) {
      int slot = g.rank * p.nSlots + i - perRank, e = g.rank * perRank + i;
      bool master = i < perRank,
           used = master || (i - perRank < p.nSlots && i - perRank < s.plan.slotCount[g.rank]);
      route.expert[i] = master ? e : used ? s.plan.slotExpert[slot] : -1;
      route.firstRow[i] = master ? s.masterRow[e] : used ? s.slotRow[slot] : s.plan.largest[g.rank];
      route.rows[i] = master ? s.plan.rem[e] : used ? s.plan.slotQuota[slot] : 0;
    }
    if (threadIdx.x == 0) *route.totalRows = s.plan.largest[g.rank];
  }
  if (threadIdx.x == 0) routeConclude(route, status);
}

__global__ void __launch_bounds__(kRouteThreads, 1)
    routeKernel(const __grid_constant__ kernelGroup_t g, const __grid_constant__ kernelRoute_t route,
                const int32_t *__restrict__ topkIdx, const float *__restrict__ topkWeights, int nTokens,
                int nWarps) {
  extern __shared__ __align__(16) char memory[];
  __shared__ PlanShared shared;
  const kernelPlanner_t &p = g.planner;
  RouteShared s;
  s.carve(memory, p.nRanks, p.nExperts, p.nSlots, nWarps);
  uint32_t call = g.state->routeCalls + 1;
  int bad = -1;
  int64_t needed = 0;

  routeCount(g, s, topkIdx, nTokens);
  bool alive = gridBarrier(g, 0, KERNEL_PHASE_ROUTE);
  if (alive) {
    routePublish(g, s, call);
    alive = waitFlags(g, KERNEL_FLAG_ROUTE, call, KERNEL_PHASE_ROUTE, 0, &bad);
  }
  if (alive) {
    auto *loads = reinterpret_cast<const int32_t *>(g.windows[g.rank] + g.loadsOffset) +
                  int64_t(call & 1) * p.nRanks * p.nExperts;
    kernelRouteStatus_t status = {kSuccess, -1, 0};
    if (bad < 0) {
      planBlock(p, s.plan, shared, loads);
      int overfull = routeSegments(g, s, &needed);
      if (overfull >= 0) status = {kCapacityExceeded, overfull, needed};
    } else {
      status = {*reinterpret_cast<volatile uint32_t *>(&g.state->badEntry) ? kInvalidArgument : kRemoteError,
                bad, 0};
    }
    if (status.code == kSuccess) {
      routePieces(g, s, loads);
      routePlaces(g, route, s, topkIdx, topkWeights, nTokens);
    }
    if (blockIdx.x == 0) routeReport(g, route, s, loads, status);
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    routeConclude(route, {g.state->failed, -1, 0});
  }
  if (lastBlockOut(g) && threadIdx.x == 0) {
    g.state->badEntry = 0;
    resetState(g, &g.state->routeCalls, call);
  }
}

cudaError_t loadRouteKernels() {
  return loadKernels({kernelAddress(routeKernel)});
}

} // namespace ultraep

size_t kernelRouteSharedBytes(const kernelPlanner_t *p) {
  // One counting warp, and room for what kernels declare statically.
  return ultraep::RouteShared::fixedBytes(p->nRanks, p->nExperts, p->nSlots) + 16 +
         sizeof(uint32_t) * p->nExperts + ultraep::kStaticShared;
}

int kernelRouteLaunch(const kernelGroup_t *group, const kernelRoute_t *route, const int32_t *topkIdx,
                      const float *topkWeights, int32_t nTokens, cudaStream_t stream) {
  using namespace ultraep;
  const kernelPlanner_t &p = group->planner;
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // As many counting warps as shared memory holds; a block for every few tokens, up to the group's limit.
  size_t fixed = RouteShared::fixedBytes(p.nRanks, p.nExperts, p.nSlots) + 16,
         perWarp = sizeof(uint32_t) * p.nExperts;
  if (kernelRouteSharedBytes(&p) > size_t(limit)) return cudaErrorInvalidConfiguration;
  int nWarps = int(std::min<size_t>(kRouteWarps, (size_t(limit) - kStaticShared - fixed) / perWarp));
  int perStep = kWarp / group->topK, wanted = (nTokens + nWarps * perStep - 1) / (nWarps * perStep);
  int nBlocks = std::max(1, std::min(group->nBlocks, wanted));
  size_t bytes = fixed + perWarp * nWarps;
  error = cudaFuncSetAttribute(routeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  routeKernel<<<nBlocks, kRouteThreads, bytes, stream>>>(*group, *route, topkIdx, topkWeights, nTokens,
                                                         nWarps);
  return cudaGetLastError();
}
