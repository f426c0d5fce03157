// What the warp that looks after a lane does: one step at a time, without waiting. All its threads see the
// same.
#ifndef ULTRAEP_P2P_LANES_CUH_
#define ULTRAEP_P2P_LANES_CUH_

#include "p2p_copy.cuh"

namespace ultraep {

// What a step finds to be moved by jobs.
struct P2pOpening {
  bool opens;
  P2pJobKind kind;
  char *other; // direct: the receiver's buffer
  uint64_t bytes;
};

// kHasJobs: transfers may need any; else each is small enough for a step. Every part of a step is called at
// one place, as all of them are inline: code, too, has to come from memory.
template <bool kHasJobs> struct P2pLane {
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

  // Opens the lane's job. Ends that are no whole sixteens go at once.
  __device__ void open(char *user, const P2pOpening &opening) const {
    P2pJobKind kind = opening.kind;
    char *other = opening.other;
    uint64_t bytes = opening.bytes, firstChunk = state.chunk;
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

  // The lane's last receive is told by the next kernel, which must come before the sender can need it: that
  // saves this one a fence at its end.
  __device__ void over() const {
    __syncwarp();
    if (isFirst()) {
      state.step = kP2pBegin;
      state.op++;
      state.number++;
      state.polls = 0;
      if (lane.isRecv) {
        state.isOwed = 1;
        if (!isOver()) {
          __threadfence_system();
          tellTaken();
        }
      }
    }
    __syncwarp();
  }
  __device__ void go(P2pStep step) const {
    __syncwarp();
    if (isFirst()) state.step = step;
    __syncwarp();
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
  __device__ P2pProgress sendEager(const kernelP2pOp_t &x) const {
    uint64_t chunk = state.chunk;
    auto *from = reinterpret_cast<const char *>(x.address);
    bool isPacketed = x.bytes > 0 && x.bytes <= c.layout.mostPacketed;
    if (x.bytes > 0 && !hasRoom()) return kP2pNone;
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
    return kP2pOver;
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
  // Where the receiver has posted it.
  __device__ P2pProgress sendPosted(const kernelP2pOp_t &x, P2pOpening &opening) const {
    const kernelP2pPost_t *at = c.post(state.own, lane.peer, number());
    if (seeSystem(&at->number) != number() + 1) return kP2pNone;
    const volatile kernelP2pPost_t *seen = at;
    kernelP2pPost_t post = {seen->bytes, seen->address, seen->slot, seen->generation, 0};
    char *to = mapped(post);
    bool isInPlace = to == reinterpret_cast<char *>(x.address);
    if (isFirst()) state.isDirect = to != nullptr;
    if (!to || isInPlace) raiseMark(x.bytes, to);
    if (isInPlace) return kP2pOver;
    opening = {true, to ? kP2pDirect : kP2pStagedSend, to, min(x.bytes, post.bytes)};
    return kP2pSome;
  }
  __device__ P2pProgress sendMoving(const kernelP2pOp_t &x) const {
    bool isDirect = state.isDirect;
    bool some = !isDirect && extend(state.chunk);
    if (!isMoved()) return some ? kP2pSome : kP2pNone;
    close(!isDirect);
    if (isDirect)
      raiseMark(x.bytes, true);
    else if (isFirst())
      state.chunk += (state.bytes + stageBytes() - 1) / stageBytes();
    return kP2pOver;
  }
  __device__ bool hasMark() const {
    if (number() < state.over + KERNEL_P2P_RING) return true;
    uint64_t over = seeSystem(c.taken(state.own, lane.peer));
    if (isFirst()) state.over = over;
    __syncwarp();
    return number() < over + KERNEL_P2P_RING;
  }
  __device__ P2pProgress stepSend(const kernelP2pOp_t &x, P2pOpening &opening) const {
    if (kHasJobs && state.step == kP2pMoving) return sendMoving(x);
    if (state.step == kP2pBegin) {
      if (!hasMark()) return kP2pNone;
      if (!kHasJobs || x.bytes <= eager()) return sendEager(x);
      go(kP2pAwaitPeer);
    }
    return kHasJobs ? sendPosted(x, opening) : kP2pNone;
  }

  // ---- receiving ----

  __device__ void post(const kernelP2pOp_t &x) const {
    kernelP2pPost_t *at = c.post(state.peer, c.p.rank, number());
    volatile kernelP2pPost_t *to = at;
    to->bytes = x.bytes;
    to->address = x.address;
    to->slot = x.slot;
    to->generation = x.generation;
    storeReleaseSystem(&at->number, number() + 1);
  }
  // A small receive is posted late, as it need not be: a sender waits for that only if its own size is large,
  // and so another.
  __device__ void postOnce(const kernelP2pOp_t &x) const {
    constexpr int kPolls = 2000;
    __syncwarp();
    if (isFirst() && state.polls <= kPolls) {
      if (state.polls == (x.bytes > eager() ? 0 : kPolls)) post(x);
      state.polls++;
    }
    __syncwarp();
  }
  // Tells the sender of the transfer before the present one, and of its stage, if it had one. By one thread,
  // after a fence.
  __device__ void tellTaken() const {
    uint64_t chunk = state.chunk;
    if (chunk > 0) storeRelaxedSystem(c.freed(state.peer, c.p.rank, chunk - 1), chunk);
    storeRelaxedSystem(c.taken(state.peer, c.p.rank), number());
    state.isOwed = 0;
  }
  // The sender has begun, or, where it goes directly, ended. Packets and the mark are looked at together.
  __device__ P2pProgress recvMarked(const kernelP2pOp_t &x, P2pOpening &opening) const {
    const kernelP2pMark_t *at = c.mark(state.own, lane.peer, number());
    char *units = c.packets(state.own, lane.peer, state.chunk);
    uint64_t stamp = packetStamp(number()), most = c.layout.mostPacketed;
    P2pPackets packets;
    packets.look(units, x.bytes <= most ? x.bytes : 0);
    uint64_t word = seeSystem(&at->number), head = __shfl_sync(kFullWarp, packets.head.first, 0);
    bool isPacketed = (head ^ stamp) >> 32 == 0;
    if (!isPacketed && word >> KERNEL_P2P_MARK_BITS != number() + 1) return kP2pNone;
    bool isEager = word & 2;
    uint64_t sent = isPacketed ? uint32_t(head)
                    : isEager  ? (word >> 2) & KERNEL_P2P_MOST_EAGER
                               : *reinterpret_cast<const volatile uint64_t *>(&at->bytes);
    uint64_t bytes = min(sent, x.bytes);
    if (isPacketed) {
      if (x.bytes <= most) {
        if (!packets.has(stamp, bytes)) return kP2pNone;
        packets.copy(units, reinterpret_cast<char *>(x.address), bytes);
      } else { // it ought to have been larger
        if (!hasAllPackets(units, stamp, bytes)) return kP2pNone;
        copyOddPackets(units, reinterpret_cast<char *>(x.address), bytes);
      }
    }
    __syncwarp();
    if (isFirst()) {
      if (sent != x.bytes) c.tellSizes(lane.peer, sent, x.bytes);
      if (isPacketed) state.chunk++;
    }
    __syncwarp();
    if (isPacketed || word & 1) return kP2pOver;
    if (!isEager && bytes > stageBytes()) { // only of large receives
      opening = {true, kP2pStagedRecv, nullptr, bytes};
      return kP2pSome;
    }
    if ((isEager ? sent : bytes) == 0) return kP2pOver;
    if (isFirst()) {
      state.bytes = bytes;
      state.isDirect = isEager; // it is there already
    }
    go(kP2pAwaitStage);
    return kP2pSome;
  }
  __device__ P2pProgress recvStage(const kernelP2pOp_t &x) const {
    uint64_t chunk = state.chunk;
    if (!state.isDirect && seeSystem(c.arrived(state.own, lane.peer, chunk)) != chunk + 1) return kP2pNone;
    copyByWarp(reinterpret_cast<char *>(x.address), c.stage(state.own, lane.peer, chunk), state.bytes);
    __syncwarp();
    if (isFirst()) state.chunk = chunk + 1;
    return kP2pOver;
  }
  __device__ P2pProgress recvMoving() const {
    bool some = extend(state.chunk);
    if (!isMoved()) return some ? kP2pSome : kP2pNone;
    close(true);
    __syncwarp();
    if (isFirst()) state.chunk += (state.bytes + stageBytes() - 1) / stageBytes();
    return kP2pOver;
  }
  __device__ P2pProgress stepRecv(const kernelP2pOp_t &x, P2pOpening &opening) const {
    if (kHasJobs && state.step == kP2pMoving) return recvMoving();
    if (state.step == kP2pBegin) {
      postOnce(x);
      P2pProgress progress = recvMarked(x, opening);
      if (state.step == kP2pBegin) return progress;
    }
    return recvStage(x);
  }

  // ---- the lane ----

  __device__ bool isOver() const { return state.op == lane.n; }
  // One step; true if something has changed.
  __device__ bool step() const {
    kernelP2pOp_t x = op();
    P2pOpening opening = {};
    P2pProgress progress = lane.isRecv ? stepRecv(x, opening) : stepSend(x, opening);
    if (kHasJobs && opening.opens) open(reinterpret_cast<char *>(x.address), opening);
    if (progress == kP2pOver) over();
    return progress != kP2pNone;
  }
  // After the last transfer: counted for the next kernel.
  __device__ void finish() const {
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
    if (!kHasJobs) return; // nobody else waits for the lane
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

// Looks after the block's lanes `warp`, warp + nWarps, .. (its lane k is the kernel's blockIdx.x + k *
// gridDim.x), and moves what bulk copies cannot, until all lanes of the kernel are over; without jobs until
// its own are.
template <bool kHasJobs>
__device__ inline void mindLanes(const P2pContext &c, P2pLaneState *states, int warp, int nWarps,
                                 bool hasBulk) {
  constexpr int kPolls = 256; // between looks
  P2pClock clock;
  uint32_t isDone = 0; // of up to 32 lanes
  int nMine = 0, nOver = 0;
  auto laneOf = [&](int i) {
    int k = warp + i * nWarps;
    return P2pLane<kHasJobs>(c, int(blockIdx.x) + k * int(gridDim.x), states[k], hasBulk);
  };
  bool hasFailed = c.hasFailed();
#pragma unroll 1
  for (int k = warp; int(blockIdx.x) + k * int(gridDim.x) < c.nLanes; k += nWarps) laneOf(nMine++).begin();
  if (__any_sync(kFullWarp, hasFailed)) return;
#pragma unroll 1
  for (int polls = 1;; polls++) {
    bool some = false;
    int32_t waited = -1;
#pragma unroll 1
    for (int i = 0; i < nMine; i++) {
      if (isDone >> i & 1) continue;
      P2pLane lane = laneOf(i);
      waited = lane.lane.peer;
      some |= lane.step();
      if (!lane.isOver()) continue;
      lane.finish();
      isDone |= 1u << i;
      nOver++;
    }
    if (!kHasJobs && nOver == nMine) return;
    if (__any_sync(kFullWarp, polls % 16 == 0 && c.hasFailed())) return;
    if constexpr (kHasJobs) {
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
