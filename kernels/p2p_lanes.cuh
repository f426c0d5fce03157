// What the warp that looks after a lane does: one step at a time, without waiting. All its threads see the
// same.
#ifndef ULTRAEP_P2P_LANES_CUH_
#define ULTRAEP_P2P_LANES_CUH_

#include "p2p_copy.cuh"

namespace ultraep {

struct P2pLane {
  const P2pContext &c;
  int index;
  const kernelP2pLane_t lane;
  P2pLaneState &state;
  bool hasBulk;

  __device__ P2pLane(const P2pContext &context, int number, P2pLaneState &own, bool bulk)
      : c(context), index(number), lane(context.lanes[number]), state(own), hasBulk(bulk) {}

  // Before the first step: what earlier kernels have counted. Looked up at once, as memory is far.
  __device__ void begin() const {
    if (isFirst()) {
      P2pLaneState found = {};
      found.number = (lane.isRecv ? c.s.received : c.s.sent)[lane.peer];
      found.chunk = (lane.isRecv ? c.s.receivedChunks : c.s.sentChunks)[lane.peer];
      found.room = c.s.room[lane.peer];
      found.over = c.s.over[lane.peer];
      found.own = c.p.windows[c.p.rank];
      found.peer = c.p.windows[lane.peer];
      found.isOwed = lane.isRecv ? c.s.isOwed[lane.peer] : 0;
      found.generation = c.s.jobs[index].generation;
      state = found;
      if (found.isOwed) tellTaken(); // what it tells of came before this kernel
    }
    __syncwarp();
  }

  __device__ bool isFirst() const { return threadIdx.x % kWarp == 0; }
  __device__ kernelP2pOp_t op() const { return c.ops[lane.first + state.op]; }
  __device__ uint64_t number() const { return state.number; }
  __device__ uint64_t eager() const { return c.p.geometry.eagerBytes; }
  __device__ uint64_t stageBytes() const { return c.p.geometry.stageBytes; }

  // ---- jobs ----

  // Opens the lane's job. `other`: the receiver's buffer, where direct. Ends that are no whole sixteens go at
  // once.
  __device__ void open(P2pJobKind kind, char *user, char *other, uint64_t bytes, uint64_t firstChunk) const {
    P2pJob &job = c.s.jobs[index];
    bool byWarps = !hasBulk;
    if (kind == kP2pDirect) {
      bool alike = (reinterpret_cast<uintptr_t>(user) ^ reinterpret_cast<uintptr_t>(other)) % 16 == 0;
      byWarps = byWarps || !alike;
      if (!byWarps) {
        uint64_t head = min(bytes, uint64_t(-reinterpret_cast<uintptr_t>(user) % 16));
        copyBytes(other, user, head);
        user += head, other += head, bytes -= head;
        uint64_t tail = bytes % 16;
        copyBytes(other + bytes - tail, user + bytes - tail, tail);
        bytes -= tail;
      }
    } else {
      byWarps = byWarps || reinterpret_cast<uintptr_t>(user) % 16 != 0;
    }
    __syncwarp();
    if (isFirst()) {
      bool forWarps = byWarps || (kind != kP2pDirect && bytes % 16 != 0);
      uint64_t generation = state.generation + 1, word = generation << kP2pOffsetBits;
      bool isDirect = kind == kP2pDirect;
      state.generation = job.generation = generation;
      job.limit = 0;
      fenceDevice();
      job.bytes = bytes;
      job.done = 0;
      job.user = user;
      job.other = other;
      job.firstChunk = firstChunk;
      job.kind = kind;
      job.peer = lane.peer;
      job.byWarps = byWarps;
      fenceDevice();
      storeRelaxedDevice64(&job.bulk, isDirect && !byWarps ? word : word | kP2pBeyond);
      storeRelaxedDevice64(&job.warps, isDirect && byWarps ? word : word | kP2pBeyond);
      storeRelaxedDevice64(&job.staged, isDirect ? word | kP2pBeyond : word);
      state.bytes = bytes;
      state.chunks = 0;
      state.step = kP2pMoving;
      if (forWarps) atomicAdd(&c.s.nWarpJobs, 1u);
      if (kind == kP2pDirect) storeReleaseDevice64(&job.limit, bytes);
    }
    __syncwarp();
  }

  // Lets chunks of a staged job be taken whose stages are free, or have arrived. True if there are more now.
  __device__ bool extend(uint64_t firstChunk) const {
    P2pJob &job = c.s.jobs[index];
    uint64_t all = (state.bytes + stageBytes() - 1) / stageBytes(), mine = state.chunks + threadIdx.x % kWarp;
    bool may = mine < all && (lane.isRecv ? hasArrived(firstChunk + mine) : isFree(firstChunk + mine));
    int more = __ffs(~__ballot_sync(kFullWarp, may)) - 1;
    if (more < 0) more = kWarp;
    if (more == 0) return false;
    __syncwarp();
    if (isFirst()) {
      state.chunks += uint64_t(more);
      storeReleaseDevice64(&job.limit, min(state.bytes, state.chunks * stageBytes()));
    }
    __syncwarp();
    return true;
  }
  __device__ bool isFree(uint64_t chunk) const {
    return chunk < c.stages() || loadAcquireSystem(c.freed(state.own, lane.peer, chunk)) > chunk - c.stages();
  }
  __device__ bool hasArrived(uint64_t chunk) const {
    return loadAcquireSystem(c.arrived(state.own, lane.peer, chunk)) == chunk + 1;
  }
  __device__ bool isMoved() const { return seeDevice(&c.s.jobs[index].done) == state.bytes; }
  __device__ void close(bool isStaged) const {
    const P2pJob &job = c.s.jobs[index];
    bool forWarps = job.byWarps || (isStaged && job.bytes % 16 != 0);
    if (isFirst() && forWarps) atomicSub(&c.s.nWarpJobs, 1u);
  }

  // ---- the end of a transfer ----

  __device__ bool over() const {
    __syncwarp();
    if (isFirst()) {
      state.step = kP2pBegin;
      state.op++;
      state.number++;
      state.polls = 0;
    }
    __syncwarp();
    return true;
  }
  // All lanes' writes before come first.
  __device__ void raiseMark(uint64_t bytes, bool isDirect) const {
    __syncwarp();
    if (!isFirst()) return;
    kernelP2pMark_t *mark = c.mark(state.peer, c.p.rank, number());
    *reinterpret_cast<volatile uint64_t *>(&mark->bytes) = bytes;
    storeReleaseSystem(&mark->number, (number() + 1) << KERNEL_P2P_MARK_BITS | uint64_t(isDirect));
  }

  // ---- sending ----

  // Whether the next chunk has a free stage; looks at all stages at once, so not every time.
  __device__ bool hasRoom() const {
    if (state.chunk < state.room) return true;
    uint64_t mine = state.chunk + threadIdx.x % kWarp;
    bool free = mine < state.chunk + c.stages() && isFree(mine);
    unsigned taken = ~__ballot_sync(kFullWarp, free);
    int n = taken ? __ffs(taken) - 1 : kWarp;
    __syncwarp(); // what lanes have acquired, all have
    if (isFirst() && n > 0) state.room = state.chunk + uint64_t(n);
    __syncwarp();
    return n > 0;
  }
  // As packets, or into a stage, where the mark alone says that it is filled.
  __device__ bool sendEager(const kernelP2pOp_t &x) const {
    uint64_t chunk = state.chunk;
    auto *from = reinterpret_cast<const char *>(x.address);
    bool isPacketed = x.bytes > 0 && x.bytes <= c.layout.mostPacketed;
    if (x.bytes > 0 && !hasRoom()) return false;
    if (isPacketed)
      sendPackets(c.packets(state.peer, c.p.rank, chunk), packetStamp(number()), from, x.bytes);
    else if (x.bytes > 0)
      copyByWarp(c.stage(state.peer, c.p.rank, chunk), from, x.bytes);
    __syncwarp();
    if (isFirst()) {
      kernelP2pMark_t *mark = c.mark(state.peer, c.p.rank, number());
      if (!isPacketed)
        storeReleaseSystem(&mark->number, (number() + 1) << KERNEL_P2P_MARK_BITS | x.bytes << 2 | 2);
      if (x.bytes > 0) state.chunk = chunk + 1;
    }
    return over();
  }
  __device__ char *mapped(const kernelP2pPost_t &post) const {
    if (lane.peer == c.p.rank) return reinterpret_cast<char *>(post.address);
    if (post.slot >= KERNEL_P2P_SLOTS) return nullptr;
    const kernelP2pMap_t *map = c.p.maps + size_t(lane.peer) * KERNEL_P2P_SLOTS + post.slot;
    kernelP2pMap_t *at = &c.s.maps[lane.peer][post.slot], seen; // the host's memory is far
    __syncwarp();
    seen = *at;
    if (seen.generation != post.generation) {
      if (seeSystem(&map->generation) != post.generation) return nullptr;
      seen = {post.generation, int64_t(seeSystem(reinterpret_cast<const uint64_t *>(&map->delta)))};
      if (isFirst()) *at = seen;
      __syncwarp();
    }
    return reinterpret_cast<char *>(post.address + uint64_t(seen.delta));
  }
  // The receiver has posted: where it goes.
  __device__ bool sendPosted(const kernelP2pOp_t &x) const {
    const kernelP2pPost_t *at = c.post(state.own, lane.peer, number());
    if (seeSystem(&at->number) != number() + 1) return false;
    const volatile kernelP2pPost_t *seen = at;
    kernelP2pPost_t post = {seen->bytes, seen->address, seen->slot, seen->generation, 0};
    uint64_t bytes = min(x.bytes, post.bytes);
    char *user = reinterpret_cast<char *>(x.address), *to = mapped(post);
    if (isFirst()) state.isDirect = to != nullptr;
    if (to) {
      open(kP2pDirect, user, to, bytes, 0);
    } else {
      raiseMark(x.bytes, false);
      open(kP2pStagedSend, user, nullptr, bytes, state.chunk);
    }
    return true;
  }
  __device__ bool sendMoving(const kernelP2pOp_t &x) const {
    bool isDirect = state.isDirect;
    bool some = !isDirect && extend(state.chunk);
    if (!isMoved()) return some;
    close(!isDirect);
    if (isDirect)
      raiseMark(x.bytes, true);
    else if (isFirst())
      state.chunk += (state.bytes + stageBytes() - 1) / stageBytes();
    return over();
  }
  __device__ bool stepSend() const {
    kernelP2pOp_t x = op();
    switch (state.step) {
    case kP2pBegin:
      if (number() >= state.over + KERNEL_P2P_RING) {
        uint64_t over = seeSystem(c.taken(state.own, lane.peer));
        if (isFirst()) state.over = over;
        __syncwarp();
        if (number() >= over + KERNEL_P2P_RING) return false;
      }
      if (x.bytes <= eager()) return sendEager(x);
      __syncwarp();
      if (isFirst()) state.step = kP2pAwaitPeer;
      __syncwarp();
      return sendPosted(x);
    case kP2pAwaitPeer:
      return sendPosted(x);
    default:
      return sendMoving(x);
    }
  }

  // ---- receiving ----

  __device__ void post(const kernelP2pOp_t &x) const {
    __syncwarp();
    if (!isFirst()) return;
    kernelP2pPost_t *at = c.post(state.peer, c.p.rank, number());
    volatile kernelP2pPost_t *to = at;
    to->bytes = x.bytes;
    to->address = x.address;
    to->slot = x.slot;
    to->generation = x.generation;
    storeReleaseSystem(&at->number, number() + 1);
  }
  // A small receive need not be posted: a sender waits for that only if its own size is large, and so
  // another.
  __device__ bool recvBegin(const kernelP2pOp_t &x) const {
    if (x.bytes > eager()) post(x);
    __syncwarp();
    if (isFirst()) state.step = kP2pAwaitPeer;
    __syncwarp();
    return recvMarked(x);
  }
  __device__ void postLate(const kernelP2pOp_t &x) const {
    constexpr int kPolls = 2000;
    if (x.bytes > eager()) return;
    __syncwarp();
    int polls = state.polls;
    __syncwarp();
    if (polls == kPolls) post(x);
    if (isFirst() && polls <= kPolls) state.polls = polls + 1;
    __syncwarp();
  }
  // The lane's last transfer is told by the next kernel, which must come before the sender can need it: that
  // saves this one a fence at its end.
  __device__ bool received() const {
    over();
    if (isFirst()) {
      state.isOwed = 1;
      if (!isOver()) {
        __threadfence_system();
        tellTaken();
      }
    }
    __syncwarp();
    return true;
  }
  // Tells the sender of the transfer before the present one, and of its stage, if it had one. By one thread,
  // after a fence.
  __device__ void tellTaken() const {
    uint64_t chunk = state.chunk;
    if (chunk > 0) storeRelaxedSystem(c.freed(state.peer, c.p.rank, chunk - 1), chunk);
    storeRelaxedSystem(c.taken(state.peer, c.p.rank), number());
    state.isOwed = 0;
  }
  // As packets that have begun to come.
  __device__ bool recvPackets(const kernelP2pOp_t &x, char *units, P2pUnit seen, uint64_t sent) const {
    auto *to = reinterpret_cast<char *>(x.address);
    if (!receivePackets(units, packetStamp(number()), seen, to, min(sent, x.bytes))) return false;
    if (isFirst()) {
      if (sent != x.bytes) c.tellSizes(lane.peer, sent, x.bytes);
      state.chunk++;
    }
    return received();
  }
  // The sender has begun, or, where it goes directly, ended. Packets and the mark are looked at together.
  __device__ bool recvMarked(const kernelP2pOp_t &x) const {
    const kernelP2pMark_t *at = c.mark(state.own, lane.peer, number());
    char *units = c.packets(state.own, lane.peer, state.chunk);
    P2pUnit seen = lookAtUnit(units, threadIdx.x % kWarp);
    uint64_t word = seeSystem(&at->number), head = __shfl_sync(kFullWarp, seen.first, 0);
    if ((head ^ packetStamp(number())) >> 32 == 0) return recvPackets(x, units, seen, uint32_t(head));
    if (word >> KERNEL_P2P_MARK_BITS != number() + 1) {
      postLate(x);
      return false;
    }
    bool isEager = word & 2;
    uint64_t sent = isEager ? (word >> 2) & KERNEL_P2P_MOST_EAGER
                            : *reinterpret_cast<const volatile uint64_t *>(&at->bytes);
    if (sent != x.bytes && isFirst()) c.tellSizes(lane.peer, sent, x.bytes);
    if (word & 1) return received();
    uint64_t bytes = isEager ? sent : min(sent, x.bytes); // that come
    if (bytes == 0) return received();
    if (bytes > stageBytes()) {
      open(kP2pStagedRecv, reinterpret_cast<char *>(x.address), nullptr, bytes, state.chunk);
      return true;
    }
    __syncwarp();
    if (isFirst()) {
      state.bytes = min(bytes, x.bytes);
      state.step = kP2pAwaitStage;
      state.isDirect = isEager; // it is there already
    }
    __syncwarp();
    return recvStage(x);
  }
  __device__ bool recvStage(const kernelP2pOp_t &x) const {
    uint64_t chunk = state.chunk;
    if (!state.isDirect && seeSystem(c.arrived(state.own, lane.peer, chunk)) != chunk + 1) return false;
    copyByWarp(reinterpret_cast<char *>(x.address), c.stage(state.own, lane.peer, chunk), state.bytes);
    __syncwarp();
    if (isFirst()) state.chunk = chunk + 1;
    return received();
  }
  __device__ bool recvMoving() const {
    bool some = extend(state.chunk);
    if (!isMoved()) return some;
    close(true);
    __syncwarp();
    if (isFirst()) state.chunk += (state.bytes + stageBytes() - 1) / stageBytes();
    return received();
  }
  __device__ bool stepRecv() const {
    kernelP2pOp_t x = op();
    switch (state.step) {
    case kP2pBegin:
      return recvBegin(x);
    case kP2pAwaitPeer:
      return recvMarked(x);
    case kP2pMoving:
      return recvMoving();
    default:
      return recvStage(x);
    }
  }

  // ---- the lane ----

  __device__ bool isOver() const { return state.op == lane.n; }
  // One step; true if something has changed.
  __device__ bool step() const { return lane.isRecv ? stepRecv() : stepSend(); }
  // After the last transfer: counted for the next kernel. alone: nobody else waits for the lane.
  __device__ void finish(bool alone) const {
    __syncwarp();
    if (!isFirst()) return;
    (lane.isRecv ? c.s.received : c.s.sent)[lane.peer] = state.number;
    (lane.isRecv ? c.s.receivedChunks : c.s.sentChunks)[lane.peer] = state.chunk;
    if (lane.isRecv) {
      c.s.isOwed[lane.peer] = state.isOwed;
    } else {
      c.s.room[lane.peer] = state.room;
      c.s.over[lane.peer] = state.over;
    }
    if (alone) return;
    __threadfence();
    atomicAdd(&c.s.lanesOver, 1u);
  }
};

// ---- a warp's lanes ----

// Looks now and then at what ends a wait. By one thread.
struct P2pClock {
  uint64_t since = 0;

  __device__ void look(const P2pContext &c, int32_t peer, bool lookAtHost) {
    uint64_t now = nowNs();
    if (since == 0) since = now;
    if (loadAcquireSystem(c.gone(c.p.windows[c.p.rank], peer)) != 0) c.fail(kRemoteError, peer);
    if (lookAtHost && *reinterpret_cast<const volatile int32_t *>(&c.p.failure->abort) != 0)
      c.fail(kRemoteError, c.p.rank);
    if (c.p.timeoutNs != 0 && now - since > c.p.timeoutNs) c.fail(kTimeout, peer);
  }
};

// Looks after lanes first, first + stride, ..., and moves what bulk copies cannot, until all lanes of the
// kernel are over; without movers (alone) until its own are.
__device__ inline void mindLanes(const P2pContext &c, P2pLaneState *states, int first, int stride,
                                 bool hasBulk, bool alone) {
  constexpr int kPolls = 256; // between looks
  P2pClock clock;
  uint32_t isDone = 0; // of up to 32 lanes
  int nMine = first < c.nLanes ? (c.nLanes - first + stride - 1) / stride : 0, nOver = 0;
  auto laneOf = [&](int i) {
    int number = first + i * stride;
    return P2pLane(c, number, states[number / int(gridDim.x)], hasBulk);
  };
  bool hasFailed = c.hasFailed();
  for (int i = 0; i < nMine; i++) laneOf(i).begin();
  if (__any_sync(kFullWarp, hasFailed)) return;
  for (int polls = 1;; polls++) {
    bool some = false;
    int32_t waited = -1;
    for (int i = 0; i < nMine; i++) {
      if (isDone >> i & 1) continue;
      P2pLane lane = laneOf(i);
      waited = lane.lane.peer;
      some |= lane.step();
      if (!lane.isOver()) continue;
      lane.finish(alone);
      isDone |= 1u << i;
      nOver++;
    }
    if (alone && nOver == nMine) return;
    if (__any_sync(kFullWarp, polls % 16 == 0 && c.hasFailed())) return;
    if (!alone) {
      bool over = *reinterpret_cast<volatile uint32_t *>(&c.s.lanesOver) == uint32_t(c.nLanes);
      if (__any_sync(kFullWarp, over)) return;
      bool jobs = *reinterpret_cast<volatile uint32_t *>(&c.s.nWarpJobs) != 0;
      if (__any_sync(kFullWarp, jobs)) some |= moveByWarp(c, gridDim.x);
      if (nOver == nMine && !some) __nanosleep(100);
    }
    if (some) {
      clock.since = 0;
    } else if (polls % kPolls == 0 && nOver < nMine && threadIdx.x % kWarp == 0) {
      clock.look(c, waited, polls % (16 * kPolls) == 0);
    }
  }
}

} // namespace ultraep

#endif
