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
  uint64_t markWord; // direct
};

// kHasJobs: transfers may need any; else each is small enough for a step. Every part of a step is called at
// one place, as all of them are inline: code, too, has to come from memory.
template <bool kHasJobs> struct P2pLane {
  const P2pContext &c;
  int index;
  const kernelP2pLane_t lane;
  P2pLaneState &state;
  P2pBlock *block; // null: no bulk copies

  __device__ P2pLane(const P2pContext &context, int number, P2pLaneState &own, P2pBlock *itsBlock)
      : c(context), index(number), lane(context.lanes[number]), state(own), block(itsBlock) {}

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
      found.generation = c.s.jobs[index].bytes >> kP2pOffsetBits;
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
    bool byWarps = !block;
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
      bool isDirect = kind == kP2pDirect, forWarps = byWarps || (!isDirect && bytes % 16 != 0);
      uint64_t word = (state.generation + 1) << kP2pOffsetBits;
      job.limit = 0;
      job.bytes = word | bytes;
      job.done = 0;
      job.user = user;
      job.other = other;
      job.firstChunk = firstChunk;
      job.mark = raisesMark(isDirect, bytes) ? &c.mark(state.peer, c.p.rank, number())->number : nullptr;
      job.markWord = opening.markWord;
      job.kind = kind;
      job.peer = lane.peer;
      job.byWarps = byWarps;
      fenceDevice();
      storeRelaxedDevice64(&job.bulk, isDirect && !byWarps ? word : word | kP2pBeyond);
      storeRelaxedDevice64(&job.warps, isDirect && byWarps ? word : word | kP2pBeyond);
      storeRelaxedDevice64(&job.staged, isDirect ? word | kP2pBeyond : word);
      state.generation++;
      state.bytes = bytes;
      state.chunks = 0;
      state.forWarps = forWarps;
      state.step = kP2pMoving;
      if (forWarps) atomicAdd(&c.s.nWarpJobs, 1u);
      state.markWord = isDirect && !job.mark ? opening.markWord : 0;
    }
    __syncwarp();
  }

  // Whether the last mover raises a direct transfer's mark: that is sooner, but each has to wait for the
  // count.
  __device__ static bool raisesMark(bool isDirect, uint64_t bytes) {
    return isDirect && bytes > 0 && bytes <= 4 * kP2pLeastChunk;
  }

  // Lets chunks of a staged job be taken whose stages are free, or have arrived. True if there are more now.
  __device__ bool extend(uint64_t firstChunk) const {
    P2pJob &job = c.s.jobs[index];
    uint64_t all = c.stagesOf(state.bytes), mine = state.chunks + threadIdx.x % kWarp;
    bool may = mine < all && (lane.isRecv ? hasArrived(firstChunk + mine) : isFree(firstChunk + mine));
    int more = __ffs(~__ballot_sync(kFullWarp, may)) - 1;
    if (more < 0) more = kWarp;
    if (more == 0) return false;
    __syncwarp();
    if (isFirst()) {
      state.chunks += uint64_t(more);
      storeReleaseDevice64(&job.limit, min(state.bytes, state.chunks << c.stageShift()));
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
  __device__ void close() const {
    if (isFirst() && state.forWarps) atomicSub(&c.s.nWarpJobs, 1u);
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
      state.units = 0;
      state.hasBegun = 0;
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
  // What a mark says of a transfer that was posted, whose number of bytes goes there if the word does not
  // tell.
  __device__ uint64_t markOf(uint64_t bytes, uint64_t posted, bool isDirect) const {
    uint64_t word = (number() + 1) << KERNEL_P2P_MARK_BITS;
    if (isDirect && bytes == posted) return word | 5;
    kernelP2pMark_t *mark = c.mark(state.peer, c.p.rank, number());
    if (isFirst()) *reinterpret_cast<volatile uint64_t *>(&mark->bytes) = bytes;
    return word | uint64_t(isDirect);
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
  __device__ char *mapped(uint64_t address, uint32_t slot, uint32_t generation) const {
    if (lane.peer == c.p.rank) return reinterpret_cast<char *>(address);
    if (slot >= KERNEL_P2P_SLOTS) return nullptr;
    const kernelP2pMap_t *map = c.p.maps + size_t(lane.peer) * KERNEL_P2P_SLOTS + slot;
    kernelP2pMap_t *at = &c.s.maps[lane.peer][slot], seen; // the host's memory is far
    __syncwarp();
    seen = *at;
    if (seen.generation != generation) {
      if (seeSystem(&map->generation) != generation) return nullptr;
      seen = {generation, int64_t(seeSystem(reinterpret_cast<const uint64_t *>(&map->delta)))};
      if (isFirst()) *at = seen;
      __syncwarp();
    }
    return reinterpret_cast<char *>(address + uint64_t(seen.delta));
  }
  // Where the receiver has posted it; the words are as in kernelP2pPost_t, and in post().
  __device__ P2pProgress sendPosted(const kernelP2pOp_t &x, P2pOpening &opening) const {
    char *units = c.post(state.own, lane.peer, number());
    uint64_t stamp = (number() + 1) << 32;
    P2pUnit seen = {};
    if (threadIdx.x % kWarp < 4) loadPair(unitAt(units, threadIdx.x % kWarp), seen.first, seen.second);
    auto half = [&](uint64_t word, int lane) { return __shfl_sync(kFullWarp, uint32_t(word), lane); };
    auto whole = [&](int lane) { return uint64_t(half(seen.second, lane)) << 32 | half(seen.first, lane); };
    unsigned here = __ballot_sync(kFullWarp, threadIdx.x % kWarp >= 4 || seen.isOf(stamp));
    bool isThis = half(seen.second, 3) == uint32_t((number() + 1) >> 32);
    if (here != kFullWarp || !isThis) return kP2pNone;
    uint64_t posted = whole(0), address = whole(1);
    char *to = mapped(address, half(seen.first, 2), half(seen.second, 2));
    bool isInPlace = to == reinterpret_cast<char *>(x.address);
    uint64_t word = markOf(x.bytes, posted, to);
    __syncwarp();
    if (isFirst()) {
      state.isDirect = to != nullptr;
      uint64_t *mark = &c.mark(state.peer, c.p.rank, number())->number;
      if (!to || isInPlace)
        storeReleaseSystem(mark, word);
      else
        storeRelaxedSystem(mark, (number() + 1) << KERNEL_P2P_MARK_BITS | 4);
    }
    __syncwarp();
    if (isInPlace) return kP2pOver;
    opening = {true, to ? kP2pDirect : kP2pStagedSend, to, min(x.bytes, posted), word};
    return kP2pSome;
  }
  __device__ P2pProgress sendMoving() const {
    bool isDirect = state.isDirect;
    bool some = !isDirect && extend(state.chunk);
    if (!isMoved()) return some ? kP2pSome : kP2pNone;
    close();
    __syncwarp();
    if (isFirst()) {
      if (state.markWord != 0)
        storeReleaseSystem(&c.mark(state.peer, c.p.rank, number())->number, state.markWord);
      if (!isDirect) state.chunk += c.stagesOf(state.bytes);
    }
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
    if (kHasJobs && state.step == kP2pMoving) return sendMoving();
    if (state.step == kP2pBegin) {
      if (!hasMark()) return kP2pNone;
      if (!kHasJobs || x.bytes <= eager()) return sendEager(x);
      go(kP2pAwaitPeer);
    }
    return kHasJobs ? sendPosted(x, opening) : kP2pNone;
  }

  // ---- receiving ----

  __device__ void post(const kernelP2pOp_t &x) const {
    char *units = c.post(state.peer, c.p.rank, number());
    uint64_t stamp = (number() + 1) << 32;
    storeUnit(units, 0, stamp, uint32_t(x.bytes), uint32_t(x.bytes >> 32));
    storeUnit(units, 1, stamp, uint32_t(x.address), uint32_t(x.address >> 32));
    storeUnit(units, 2, stamp, x.slot, x.generation);
    storeUnit(units, 3, stamp, 0, uint32_t((number() + 1) >> 32));
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
    uint32_t first = state.units;
    P2pPackets packets;
    packets.look(units, first, x.bytes <= most ? x.bytes : 0);
    uint64_t word = seeSystem(&at->number), head = __shfl_sync(kFullWarp, packets.head.first, 0);
    bool isPacketed = (head ^ stamp) >> 32 == 0;
    if (!isPacketed && word >> KERNEL_P2P_MARK_BITS != number() + 1) return kP2pNone;
    if (!isPacketed && (word & 7) == 4) { // it goes directly, and is not there
      if (isFirst()) state.hasBegun = 1;
      return kP2pNone;
    }
    bool isEager = word & 2;
    uint64_t sent = isPacketed   ? uint32_t(head)
                    : isEager    ? (word >> 2) & KERNEL_P2P_MOST_EAGER
                    : (word & 4) ? x.bytes
                                 : *reinterpret_cast<const volatile uint64_t *>(&at->bytes);
    uint64_t bytes = min(sent, x.bytes);
    if (isPacketed) {
      auto *to = reinterpret_cast<char *>(x.address);
      if (x.bytes <= most && isOfWords(to, bytes)) {
        if (!packets.has(stamp, first, bytes)) return kP2pNone;
        packets.copy(first, to, bytes);
        first += kP2pLookUnits;
        if (8 * first < bytes) {
          __syncwarp();
          if (isFirst()) state.units = first;
          __syncwarp();
          return kP2pSome;
        }
      } else { // of odd words, or it ought to have been larger
        if (!hasAllPackets(units, stamp, bytes)) return kP2pNone;
        copyOddPackets(units, to, bytes);
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
      opening = {true, kP2pStagedRecv, nullptr, bytes, 0};
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
    close();
    __syncwarp();
    if (isFirst()) state.chunk += c.stagesOf(state.bytes);
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
    if (kHasJobs && block) meet();
    return progress != kP2pNone;
  }
  // Once the rest of the lane needs no kernel to begin that may not have.
  __device__ void meet() const {
    if (!isFirst() || state.isMet) return;
    bool hasBegun = state.hasBegun || state.step == kP2pMoving || state.step == kP2pAwaitStage;
    if (!isOver() && (state.op != lane.n - 1 || !hasBegun)) return;
    state.isMet = 1;
    block->meet();
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
    if (!kHasJobs) return;         // nobody else waits for the lane
    atomicAdd(&c.s.lanesOver, 1u); // in any order: what the lane has written is ordered by the block's end
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
// its own are. block: null where there are no bulk copies.
template <bool kHasJobs>
__device__ inline void mindLanes(const P2pContext &c, P2pLaneState *states, int warp, int nWarps,
                                 P2pBlock *block) {
  constexpr int kPolls = 256; // between looks
  P2pClock clock;
  uint64_t isDone = 0; // of up to 64 lanes
  uint32_t seen = 0;   // times that the block's warps were woken
  int nMine = 0, nOver = 0;
  auto laneOf = [&](int i) {
    int k = warp + i * nWarps;
    return P2pLane<kHasJobs>(c, int(blockIdx.x) + k * int(gridDim.x), states[k], block);
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
      isDone |= uint64_t(1) << i;
      nOver++;
    }
    if (!kHasJobs && nOver == nMine) return;
    if (__any_sync(kFullWarp, polls % 16 == 0 && c.hasFailed())) return;
    if constexpr (kHasJobs) {
      P2pLook kernel =
          block ? P2pLook{loadAcquireBlock(&block->isOver) != 0, loadAcquireBlock(&block->hasWarpJobs) != 0}
                : lookAtKernel(c);
      if (__any_sync(kFullWarp, kernel.isOver)) return;
      if (__any_sync(kFullWarp, kernel.hasWarpJobs)) some |= moveByWarp(c, gridDim.x);
      if (nOver == nMine && !some) {
        if (!block)
          __nanosleep(40);
        else if (block->await(seen))
          seen ^= 1;
      }
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
