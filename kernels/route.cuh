// Route: count -> publish -> plan -> places, in one kernel without the host. By route.cu alone, or by
// route_dispatch.cu before the rows.
//
//   count    every block counts its tokens' experts; rows of counts per block, then a barrier of the grid
//   publish  the sum over blocks is this rank's row of the load matrix: stored in every rank's window, then a
//   flag plan     when all rows are in, every block plans for itself in shared memory: same input, same plan,
//   no broadcast places   each (token, k) gets its rank and row, by its position among the rank's assignments
//   of its expert
//
// A warp looks at whole tokens, as many at a time as fit its lanes, so one token's assignments meet by
// shuffles.
#ifndef ULTRAEP_ROUTE_CUH_
#define ULTRAEP_ROUTE_CUH_

#include "planner.cuh"
#include "signal.cuh"

#include <algorithm>

namespace ultraep {

constexpr int kRouteThreads = 512;
constexpr int kRouteWarps = kRouteThreads / kWarp;
constexpr size_t kStaticShared = 3072; // at most, declared in the kernel

// A run of this rank's assignments of one expert that go to one instance, in order of (token, k).
struct Piece {
  int32_t end;   // position after the last
  int32_t rank;  // of the instance
  int32_t delta; // row = position + delta
};

// What a launch decides.
struct RouteShape {
  int nWarps; // that count and place
  bool stage; // the load matrix is copied to shared memory
  PlanCopies copies;
};

struct RouteShared {
  PlanArrays plan;
  int32_t *masterRow;  // [E] first row of the master's segment on its rank
  int32_t *slotRow;    // [R*S]
  int32_t *firstPiece; // [E]
  Piece *pieces;       // [E + 2*R*S]: one each for experts without replicas, then runs for the others
  uint32_t *counts;    // [nWarps][E]
  int32_t *staged;     // [R][E] or null
  int nWarps;

  __host__ __device__ static size_t fixedBytes(int64_t nRanks, int64_t nExperts, int64_t nSlots) {
    return PlanArrays::bytes(nRanks, nExperts, nSlots) + 4 * size_t(2 * nExperts + nRanks * nSlots) +
           sizeof(Piece) * size_t(nExperts + 2 * nRanks * nSlots) + 16;
  }
  __device__ void carve(int64_t nRanks, int64_t nExperts, int64_t nSlots, RouteShape shape) {
    plan.carve(nRanks, nExperts, nSlots);
    masterRow = reinterpret_cast<int32_t *>(planMemory + PlanArrays::bytes(nRanks, nExperts, nSlots));
    slotRow = masterRow + nExperts;
    firstPiece = slotRow + nRanks * nSlots;
    pieces = reinterpret_cast<Piece *>(firstPiece + nExperts);
    counts = reinterpret_cast<uint32_t *>(pieces + nExperts + 2 * nRanks * nSlots);
    nWarps = shape.nWarps;
    auto end = reinterpret_cast<uintptr_t>(counts + nWarps * nExperts);
    staged = shape.stage ? reinterpret_cast<int32_t *>((end + 15) / 16 * 16) : nullptr;
  }
};

// The tokens of one block: an equal part of the rank's, in order.
struct BlockTokens {
  int from, to;
  __device__ explicit BlockTokens(int nTokens) {
    int share = (nTokens + int(gridDim.x) - 1) / int(gridDim.x);
    from = int(min(int64_t(nTokens), int64_t(blockIdx.x) * share));
    to = min(nTokens, from + share);
  }
};

// The part of the block's tokens that one warp counts, and later places, in steps of as many tokens as its
// lanes hold.
struct WarpTokens {
  int from, to, perStep, topK, lane;
  __device__ WarpTokens(const kernelGroup_t &g, int nTokens, int nWarps) {
    BlockTokens block(nTokens);
    int warp = threadIdx.x / kWarp;
    topK = g.topK;
    perStep = kWarp / topK;
    lane = threadIdx.x % kWarp;
    int share = (block.to - block.from + nWarps - 1) / nWarps;
    share = (share + perStep - 1) / perStep * perStep;
    from = min(block.to, block.from + warp * share);
    to = warp < nWarps ? min(block.to, from + share) : from;
  }
  // Index of this lane's entry in [nTokens][topK], -1 for a lane without one.
  __device__ int64_t entry(int token) const {
    return lane < perStep * topK && token + lane / topK < to ? int64_t(token) * topK + lane : -1;
  }
};

__device__ inline void routeCount(const kernelGroup_t &g, const RouteShared &s, const int32_t *topkIdx,
                                  int nTokens) {
  int nExperts = g.planner.nExperts, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < s.nWarps * nExperts; i += blockDim.x) s.counts[i] = 0;
  WarpTokens w(g, nTokens, s.nWarps);
  uint32_t *mine = s.counts + warp * nExperts;
  auto read = [&](int token) {
    int64_t at = w.entry(token);
    int e = at < 0 ? -1 : topkIdx[at];
    if (e >= -1 && e < nExperts) return e;
    g.state->badEntry = 1; // every writer writes the same
    return -1;
  };
  int next = w.from < w.to ? read(w.from) : -1;
  __syncthreads(); // counts are zero
#pragma unroll 1
  for (int token = w.from; token < w.to; token += w.perStep) {
    int e = next;
    if (token + w.perStep < w.to) next = read(token + w.perStep);
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
__device__ inline void routePublish(const kernelGroup_t &g, const RouteShared &s, uint32_t call,
                                    uint32_t check) {
  int nExperts = g.planner.nExperts, nRanks = g.planner.nRanks, nBlocks = gridDim.x;
  int64_t row = (int64_t(call & 1) * nRanks + g.rank) * nExperts;
  for (int e = threadIdx.x; e < nExperts; e += blockDim.x) {
    int32_t sum = 0, before = 0;
#pragma unroll 8
    for (int b = 0; b < nBlocks; b++) {
      if (b == int(blockIdx.x)) before = sum;
      sum += __ldcg(g.chunkCounts + int64_t(b) * nExperts + e);
    }
    for (int i = 0; i < s.nWarps; i++) s.counts[i * nExperts + e] += before;
    for (int r = blockIdx.x; r < nRanks; r += nBlocks)
      reinterpret_cast<int32_t *>(g.windows[r] + g.loadsOffset)[row + e] = sum;
  }
  __syncthreads();
  if (*reinterpret_cast<volatile uint32_t *>(&g.state->badEntry) != 0) check |= KERNEL_CHECK_BAD_ENTRY;
  for (int i = threadIdx.x; int(blockIdx.x) + i * nBlocks < nRanks; i += blockDim.x) {
    storeReleaseSystem(flagOf(g, blockIdx.x + i * nBlocks, openKind(g, call), g.rank),
                       uint64_t(check) << 32 | call);
  }
}

// Sum over the lanes before this one; *total is over all.
__device__ __forceinline__ int64_t warpScan(int64_t value, int64_t *total) {
  int lane = threadIdx.x % kWarp;
  int64_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    int64_t other = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += other;
  }
  *total = __shfl_sync(kFullWarp, sum, kWarp - 1);
  return sum - value;
}

// First rows of all segments, a warp for each rank, and the first rank whose rows do not fit (else -1, in
// every thread).
__device__ inline int routeSegments(const kernelGroup_t &g, const RouteShared &s, int64_t *needed) {
  __shared__ int overfull;
  const kernelPlanner_t &p = g.planner;
  int perRank = p.perRank, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) overfull = 0x7fffffff;
  __syncthreads();
  for (int r = warp; r < p.nRanks; r += blockDim.x / kWarp) {
    int64_t row = 0, total;
    int n = perRank + s.plan.slotCount[r];
    for (int first = 0; first < n; first += kWarp) {
      int i = first + lane, slot = r * p.nSlots + i - perRank, e = r * perRank + i;
      int64_t rows = i >= n ? 0 : i < perRank ? s.plan.rem[e] : s.plan.slotQuota[slot];
      if (g.alignment > 1) rows = (rows + g.alignment - 1) / g.alignment * g.alignment;
      int64_t at = row + warpScan(rows, &total);
      if (i < perRank)
        s.masterRow[e] = int32_t(at);
      else if (i < n)
        s.slotRow[slot] = int32_t(at);
      row += total;
    }
    if (lane == 0) {
      s.plan.largest[r] = row;
      if (row > g.maxRecvRows) atomicMin(&overfull, r);
    }
  }
  __syncthreads();
  if (overfull == 0x7fffffff) return -1;
  *needed = s.plan.largest[overfull];
  return overfull;
}

// One replicated expert's runs for this rank, as balancer/decompose.c lays them out: first the rank's own
// instance, then the overlap of the rank's stretch of the line with each instance's. By one warp, 32
// instances at a time.
struct RouteExpert {
  const kernelGroup_t &g;
  const RouteShared &s;
  const int32_t *loads;
  int e, lane;

  struct Instance {
    int rank; // -1: no instance in this lane
    int64_t quota, kept;
    int32_t row;
  };

  __device__ int64_t load(int src) const { return loads[int64_t(src) * g.planner.nExperts + e]; }

  // Instance 0 is the master, then the replicas ascending by rank; this lane's of the 32 from `from` on.
  __device__ Instance instance(int from, int *n) const {
    int wanted = from + lane, nSlots = g.planner.nRanks * g.planner.nSlots;
    int slot = warpReplica<4>(s.plan.slotExpert, nSlots, e, wanted - 1, n);
    ++*n; // the master
    Instance x = {-1, 0, 0, 0};
    if (wanted == 0)
      x = {e / (g.planner.perRank), s.plan.rem[e], 0, s.masterRow[e]};
    else if (slot >= 0)
      x = {slot / g.planner.nSlots, s.plan.slotQuota[slot], 0, s.slotRow[slot]};
    if (x.rank >= 0) x.kept = min(x.quota, load(x.rank));
    return x;
  }

  // Writes the runs, at most one per instance.
  __device__ void pieces(Piece *out) const {
    int n = 1, written = 0;
    int64_t mine = load(g.rank), lineStart = 0, own = 0, total;
    for (int src = lane; src < g.rank; src += kWarp) lineStart += load(src);
    for (int from = 0; from < n; from += kWarp) {
      Instance x = instance(from, &n);
      if (x.rank >= 0 && x.rank < g.rank) lineStart -= x.kept;
      if (x.rank == g.rank) own = x.kept;
    }
    lineStart = warpSum(lineStart);
    own = warpSum(own);
    int64_t lineEnd = lineStart + mine - own, at = 0, position = own;
    if (own > 0) written = 1; // its place is the first
    for (int from = 0; from < n; from += kWarp) {
      Instance x = instance(from, &n);
      int64_t length = x.quota - x.kept, start = at + warpScan(length, &total), end = start + length;
      at += total;
      int64_t overlap = max(int64_t(0), min(end, lineEnd) - max(start, lineStart));
      // Rows that lower source ranks have in this instance.
      int64_t before = max(int64_t(0), min(end, lineStart) - start) + (x.rank < g.rank ? x.kept : 0);
      int64_t first = position + warpScan(overlap, &total);
      position += total;
      unsigned some = __ballot_sync(kFullWarp, overlap > 0);
      if (x.rank == g.rank && own > 0) out[0] = {int32_t(own), x.rank, x.row + int32_t(before)};
      if (overlap > 0)
        out[written + __popc(some & ((1u << lane) - 1))] = {int32_t(first + overlap), x.rank,
                                                            int32_t(x.row + before - first)};
      written += __popc(some);
    }
  }
};

// Gives each replicated expert room for a run per instance, in order of expert: a scan by the first warp.
__device__ inline void routeReserve(const RouteShared &s, int nExperts, int nSlots) {
  if (threadIdx.x < kWarp) {
    int lane = threadIdx.x;
    int64_t used = nExperts, total;
    for (int first = 0; first < nExperts; first += kWarp) {
      int e = first + lane;
      bool replicated = e < nExperts && s.firstPiece[e] != e;
      int n = 0;
      if (__any_sync(kFullWarp, replicated))
        for (int i = 0; i < nSlots; i++) n += replicated && s.plan.slotExpert[i] == e;
      int64_t at = used + warpScan(replicated ? n + 1 : 0, &total);
      if (replicated) s.firstPiece[e] = int32_t(at);
      used += total;
    }
  }
  __syncthreads();
}

__device__ inline void routePieces(const kernelGroup_t &g, const RouteShared &s, const int32_t *loads,
                                   bool replicas) {
  const kernelPlanner_t &p = g.planner;
  int perRank = p.perRank, nSlots = p.nRanks * p.nSlots, lane = threadIdx.x % kWarp;
  // Where an expert's runs begin: its own index, or after all of those, twice the slots before its first one.
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x) s.firstPiece[e] = e;
  __syncthreads();
  if (replicas) {
    for (int i = threadIdx.x; i < nSlots; i += blockDim.x)
      if (s.plan.slotExpert[i] >= 0) s.firstPiece[s.plan.slotExpert[i]] = 0x7fffffff;
    __syncthreads();
    routeReserve(s, p.nExperts, nSlots);
    for (int e = threadIdx.x / kWarp; e < p.nExperts; e += blockDim.x / kWarp)
      if (s.firstPiece[e] != e) RouteExpert{g, s, loads, e, lane}.pieces(s.pieces + s.firstPiece[e]);
  }
  for (int e = threadIdx.x; e < p.nExperts; e += blockDim.x) {
    if (s.firstPiece[e] != e) continue;
    int32_t before = 0;
#pragma unroll 8
    for (int src = 0; src < g.rank; src++) before += loads[int64_t(src) * p.nExperts + e];
    s.pieces[e] = {0x7fffffff, e / perRank, s.masterRow[e] + before};
  }
  __syncthreads();
}

// Tells each row's rank the row's part in its token; returns the place with what the token's own rank must
// know of it.
__device__ inline kernelPlace_t routeMeta(const kernelGroup_t &g, const kernelRoute_t &route,
                                          kernelPlace_t place, float weight, int topK) {
  int lane = threadIdx.x % kWarp, key = place.rank < 0 ? -1 - lane : (lane / topK) << 16 | place.rank;
  unsigned group = __match_any_sync(kFullWarp, key), later = group & ~((2u << lane) - 1);
  int next = __shfl_sync(kFullWarp, place.row, later ? __ffs(later) - 1 : lane);
  bool first = (group & ((1u << lane) - 1)) == 0;
  if (place.rank < 0) return place;
  auto *meta = reinterpret_cast<kernelMeta_t *>(g.windows[place.rank] + route.metaOffset);
  meta[place.row] = {later ? next : -1, first, weight, g.rank};
  if (!first) place.rank |= KERNEL_PLACE_LATER;
  if (__popc(group) > 1) place.rank |= KERNEL_PLACE_SHARED;
  return place;
}

__device__ inline void routePlaces(const kernelGroup_t &g, const kernelRoute_t &route, const RouteShared &s,
                                   const int32_t *topkIdx, const float *topkWeights, int nTokens) {
  int nExperts = g.planner.nExperts, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  WarpTokens w(g, nTokens, s.nWarps);
  uint32_t *position = s.counts + warp * nExperts;
  auto place = [&](int64_t at, int e, float weight) { // of this lane
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
    if (g.usesMeta) place = routeMeta(g, route, place, weight, w.topK);
    if (at < 0) return;
    route.places[at] = place;
    route.weights[at] = weight;
  };
  // The next step's entries are on their way while this one's are placed.
  int64_t at = w.from < w.to ? w.entry(w.from) : -1;
  int e = at < 0 ? -1 : topkIdx[at];
  float weight = at >= 0 && topkWeights ? topkWeights[at] : 1.0f;
#pragma unroll 1
  for (int token = w.from; token < w.to; token += w.perStep) {
    int64_t atNow = at;
    int eNow = e;
    float weightNow = weight;
    at = token + w.perStep < w.to ? w.entry(token + w.perStep) : -1;
    e = at < 0 ? -1 : topkIdx[at];
    weight = at >= 0 && topkWeights ? topkWeights[at] : 1.0f;
    place(atNow, eNow, weightNow);
  }
}

// What the host sees of the route: segments, loads, status. By block 0.
__device__ inline void routeReport(const kernelGroup_t &g, const kernelRoute_t &route, const RouteShared &s,
                                   const int32_t *loads, kernelRouteStatus_t status) {
  const kernelPlanner_t &p = g.planner;
  int perRank = p.perRank;
  for (int i = threadIdx.x; i < p.nRanks * p.nExperts; i += blockDim.x) route.loads[i] = loads[i];
  if (status.code == kSuccess) {
    for (int i = threadIdx.x; i < g.nSegments; i += blockDim.x) {
      int slot = g.rank * p.nSlots + i - perRank, e = g.rank * perRank + i;
      bool master = i < perRank,
           used = master || (i - perRank < p.nSlots && i - perRank < s.plan.slotCount[g.rank]);
      route.expert[i] = master ? e : used ? s.plan.slotExpert[slot] : -1;
      route.firstRow[i] = master ? s.masterRow[e] : used ? s.slotRow[slot] : s.plan.largest[g.rank];
      route.rows[i] = master ? s.plan.rem[e] : used ? s.plan.slotQuota[slot] : 0;
    }
    for (int i = threadIdx.x; i < p.nRanks * p.nSlots; i += blockDim.x)
      route.slotExpert[i] = s.plan.slotExpert[i];
    if (threadIdx.x == 0) *route.totalRows = s.plan.largest[g.rank];
  }
}

// The load matrix of this call, in shared memory where there is room for it.
__device__ inline const int32_t *routeStage(const kernelGroup_t &g, const RouteShared &s, uint32_t call) {
  int64_t n = int64_t(g.planner.nRanks) * g.planner.nExperts;
  auto *loads = reinterpret_cast<const int32_t *>(g.windows[g.rank] + g.loadsOffset) + (call & 1) * n;
  if (!s.staged) return loads;
  if (n % 4 == 0) {
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x)
      reinterpret_cast<int4 *>(s.staged)[i] = reinterpret_cast<const int4 *>(loads)[i];
  } else {
    for (int i = threadIdx.x; i < n; i += blockDim.x) s.staged[i] = loads[i];
  }
  __syncthreads();
  return s.staged;
}

// How a route came out, alike in all blocks (and, but for the code of a bad entry, on all ranks).
struct RouteOutcome {
  bool alive; // the group has not failed
  kernelRouteStatus_t status;
};

// The whole route, by every block. Afterwards the block's own tokens have their places, other blocks' maybe
// not yet.
__device__ inline RouteOutcome routeRun(const kernelGroup_t &g, const kernelRoute_t &route,
                                        const kernelUpdate_t &update, RouteShape shape, PlanShared &shared,
                                        uint32_t call) {
  const kernelPlanner_t &p = g.planner;
  RouteShared s;
  s.carve(p.nRanks, p.nExperts, p.nSlots, shape);
  RouteOutcome out = {true, {kSuccess, 0, -1, 0, 0}};
  int other = -1, bad = -1;
  int64_t needed = 0;
  routeCount(g, s, update.topkIdx, update.nTokens);
  out.alive = gridBarrier(g, 0, KERNEL_PHASE_ROUTE);
  if (out.alive) {
    routePublish(g, s, call, update.check);
    out.alive = waitFlags(g, openKind(g, call), call, KERNEL_PHASE_ROUTE, update.check, &other, &bad);
  }
  if (!out.alive) return out;
  const int32_t *loads = routeStage(g, s, call);
  if (other >= 0) {
    out.status = {kInvalidUsage, 0, other, 0, 0};
  } else if (bad >= 0) {
    bool mine = *reinterpret_cast<volatile uint32_t *>(&g.state->badEntry) != 0;
    out.status = {mine ? kInvalidArgument : kRemoteError, 0, bad, 0, 0};
  } else {
    planBlock(p, s.plan, shared, loads, shape.copies);
    int overfull = routeSegments(g, s, &needed);
    if (overfull >= 0) out.status = {kCapacityExceeded, 0, overfull, 0, needed};
  }
  if (out.status.code == kSuccess) {
    routePieces(g, s, loads, shared.all.nReplicas > 0);
    routePlaces(g, route, s, update.topkIdx, update.topkWeights, update.nTokens);
  }
  if (blockIdx.x == 0) routeReport(g, route, s, loads, out.status);
  return out;
}

// What the last block does at the very end, by one thread.
__device__ inline void routeConclude(const kernelGroup_t &g, const kernelRoute_t &route,
                                     const kernelUpdate_t &update, kernelRouteStatus_t status,
                                     uint32_t call) {
  if (hasFailed(g)) status = {g.state->failed, 0, -1, 0, 0};
  status.nUpdates = update.number != 0 ? update.number : route.status[g.lane].nUpdates;
  for (int lane = 0; lane < KERNEL_LANES; lane++) concludeRoute(route, lane, status);
  g.state->badEntry = 0;
  resetLane(g, call);
}

// As many counting warps as shared memory holds, then the load matrix and copies for fills where they fit; a
// block for every few tokens, up to the group's limit.
inline RouteShape routeShape(const kernelGroup_t &g, int nTokens, int *nBlocks, size_t *bytes) {
  const kernelPlanner_t &p = g.planner;
  size_t limit = size_t(g.sharedBytes) - kStaticShared, perWarp = sizeof(uint32_t) * p.nExperts,
         fixed = RouteShared::fixedBytes(p.nRanks, p.nExperts, p.nSlots) + 16;
  int nWarps = int(std::min<size_t>(kRouteWarps, (limit - fixed) / perWarp));
  int perStep = kWarp / g.topK, wanted = (nTokens + nWarps * perStep - 1) / (nWarps * perStep);
  *nBlocks = std::max(1, std::min(g.nBlocks, wanted));
  *bytes = fixed + perWarp * nWarps;
  size_t matrix = sizeof(int32_t) * p.nRanks * p.nExperts + 16;
  bool stage = *bytes + matrix <= limit;
  if (stage) *bytes += matrix;
  PlanCopies copies(p, *bytes, limit, kRouteWarps);
  *bytes = copies.end(*bytes);
  return {nWarps, stage, copies};
}

} // namespace ultraep

#endif
