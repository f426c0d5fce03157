#include "../sanitized.h"
#include "block.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sched.h>
#include <sys/mman.h>

#if SANITIZED_ADDRESS
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {

thread_local const Place *place;
static thread_local Block *block;

namespace {

#if SANITIZED_ADDRESS
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Stacks of the fibers of one CPU thread, which are used again. They lie side by side, for a process has only
// so many mappings; the lowest word of each says whether it was enough.
class Stacks {
public:
  ~Stacks() {
    for (char *slab : slabs) (void)munmap(slab, kSlab * kStackBytes);
  }
  char *take() {
    if (unused.empty()) grow();
    char *stack = unused.back();
    unused.pop_back();
    memcpy(stack, &kCanary, sizeof(kCanary));
    return stack;
  }
  void give(char *stack) {
    if (memcmp(stack, &kCanary, sizeof(kCanary)) != 0) fail("a thread needs more stack than it has here");
    unused.push_back(stack);
  }

private:
  static constexpr size_t kSlab = 64;
  static constexpr uint64_t kCanary = 0x6b61747374736574;

  void grow() {
    void *slab = mmap(nullptr, kSlab * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) fail("no memory for threads' stacks");
    slabs.push_back(static_cast<char *>(slab));
    for (size_t i = kSlab; i-- > 0;) unused.push_back(slabs.back() + i * kStackBytes);
  }

  std::vector<char *> slabs, unused;
};
thread_local Stacks stacks;

struct StackAllocator {
  void **lowest; // out: its lowest byte

  boost::context::stack_context allocate() const {
    boost::context::stack_context made;
    *lowest = stacks.take();
    made.size = kStackBytes;
    made.sp = static_cast<char *>(*lowest) + kStackBytes;
    return made;
  }
  void deallocate(boost::context::stack_context &stack) const noexcept {
    stacks.give(static_cast<char *>(stack.sp) - kStackBytes);
  }
};

} // namespace

[[noreturn]] void fail(const char *what) {
  if (place)
    fprintf(stderr, "emulated kernel: block %u, thread %u: %s\n", place->block.x, place->thread.x, what);
  else
    fprintf(stderr, "emulated kernel: %s\n", what);
  abort();
}

Block::Block(const emulatedKernel_t &kernelOf, const Place &first, void *const *argumentsOf, uint32_t seed)
    : kernel(kernelOf), arguments(argumentsOf), threads(first.nThreads.x),
      warps((first.nThreads.x + kWarp - 1) / kWarp), random(seed), copyPace(random() % 8 == 0 ? 128 : 2) {
  for (size_t i = 0; i < threads.size(); i++) {
    Thread &thread = threads[i];
    Warp &warp = warps[i / kWarp];
    thread.place = first;
    thread.place.thread = {unsigned(i), 0, 0};
    thread.lane = unsigned(i % kWarp);
    warp.threads[thread.lane] = &thread;
    warp.there |= 1u << thread.lane;
    ready.push_back(&thread);
  }
}

// ---- switching ----

// What the address sanitizer must know: before a switch to a stack, for which *fake keeps what belongs to
// this one (null: this one ends), and after one, of the stack that was left.
static void beforeSwitch(void **fake, const void *stack, size_t bytes) {
#if SANITIZED_ADDRESS
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#else
  (void)fake, (void)stack, (void)bytes;
#endif
}
static void afterSwitch(void *fake, const void **stack, size_t *bytes) {
#if SANITIZED_ADDRESS
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
#else
  (void)fake, (void)stack, (void)bytes;
#endif
}

void Block::body(Thread &thread) {
  afterSwitch(nullptr, &callerStack, &callerBytes);
  kernel.run(kernel.address, arguments);
  leave(thread);
  beforeSwitch(nullptr, callerStack, callerBytes);
}

void Block::resume(Thread &thread) {
  void *fake = nullptr;
  running = &thread;
  place = &thread.place;
  if (!thread.fiber)
    thread.fiber = boost::context::fiber(std::allocator_arg, StackAllocator{&thread.stack},
                                         [this, &thread](boost::context::fiber &&scheduler) {
                                           thread.scheduler = std::move(scheduler);
                                           body(thread);
                                           return std::move(thread.scheduler);
                                         });
  beforeSwitch(&fake, thread.stack, kStackBytes);
  thread.fiber = std::move(thread.fiber).resume();
  afterSwitch(fake, nullptr, nullptr);
  place = nullptr;
}

void Block::switchAway() {
  Thread &thread = *running;
  beforeSwitch(&thread.fake, callerStack, callerBytes);
  thread.scheduler = std::move(thread.scheduler).resume();
  afterSwitch(thread.fake, &callerStack, &callerBytes);
}

void Block::wait() {
  next = kWaits;
  switchAway();
}

void Block::poll() {
  next = kPolls;
  switchAway();
}

void Block::sleep() {
  next = kSleeps;
  switchAway();
}

// Other blocks wait for this CPU.
void Block::rest() {
  nIdle = 0;
  (void)sched_yield();
}

// So seldom that those that sleep, who are many, leave most of the time to the others.
void Block::wake() {
  nAwake = 0;
  polling.insert(polling.end(), sleeping.begin(), sleeping.end());
  sleeping.clear();
}

// Who can go on comes before those that poll; in each queue mostly in turn, now and then another one.
Thread *Block::pick() {
  if (++nAwake > 16 * sleeping.size() || (ready.empty() && polling.empty())) wake();
  bool idle = ready.empty() || (++nSteps % 256 == 0 && !polling.empty());
  std::deque<Thread *> &queue = idle ? polling : ready;
  if (queue.empty()) fail("its threads wait for each other for ever");
  if (idle && ++nIdle > polling.size()) rest();
  if (queue.size() > 1 && random() % 4 == 0) std::swap(queue.front(), queue[random() % queue.size()]);
  Thread *thread = queue.front();
  queue.pop_front();
  return thread;
}

void Block::run() {
  block = this;
  while (nOver < threads.size()) {
    Thread *thread = pick();
    next = kGoesOn;
    resume(*thread);
    if (thread->isOver) continue;
    if (next == kPolls) polling.push_back(thread);
    if (next == kSleeps) sleeping.push_back(thread);
    if (next == kGoesOn) ready.push_back(thread);
    if (random() % copyPace == 0) copies.advance(random);
  }
  block = nullptr;
  if (!copies.end()) fail("a block ended while its bulk copies were under way");
}

// ---- meeting ----

void Block::conclude(Warp &warp, Meeting &meeting) {
  for (unsigned i = 0; i < kWarp; i++) {
    if (!(meeting.arrived >> i & 1)) continue;
    Thread *thread = warp.threads[i];
    memcpy(thread->seen, meeting.values, sizeof(thread->seen));
    thread->came = meeting.arrived;
    if (thread != running) ready.push_back(thread);
  }
  meeting.arrived = 0;
}

const uint64_t *Block::meet(Together what, uint32_t mask, uint64_t value, uint32_t *came) {
  Thread &thread = *running;
  Warp &warp = warps[thread.place.thread.x / kWarp];
  Meeting *meeting = nullptr;
  if (!(mask >> thread.lane & 1)) fail("a lane is not in its own mask");
  for (Meeting &other : warp.meetings) {
    if (other.arrived == 0) {
      if (!meeting) meeting = &other;
      continue;
    }
    if (other.mask == mask && other.what == what)
      meeting = &other;
    else if (other.mask & mask)
      fail("lanes of a warp meet in different operations or with different masks");
    else
      continue;
    break;
  }
  meeting->what = what;
  meeting->mask = mask;
  meeting->arrived |= 1u << thread.lane;
  meeting->values[thread.lane] = value;
  if (meeting->arrived == (mask & warp.there))
    conclude(warp, *meeting);
  else
    wait();
  *came = thread.came;
  return thread.seen;
}

void Block::concludeBarrier() {
  barrierResult = barrierValue;
  barrierValue = false;
  for (Thread *thread : atBarrier)
    if (thread != running) ready.push_back(thread);
  atBarrier.clear();
}

bool Block::barrier(bool value) {
  barrierValue |= value;
  atBarrier.push_back(running);
  if (atBarrier.size() == threads.size() - nOver)
    concludeBarrier();
  else
    wait();
  return barrierResult; // nobody comes to the next one before all have gone
}

// A thread ends; others may have waited for it alone.
void Block::leave(Thread &thread) {
  Warp &warp = warps[thread.place.thread.x / kWarp];
  if (!thread.open.empty()) fail("a thread ended with bulk stores that it did not commit");
  thread.isOver = true;
  nOver++;
  warp.there &= ~(1u << thread.lane);
  for (Meeting &meeting : warp.meetings)
    if (meeting.arrived != 0 && meeting.arrived == (meeting.mask & warp.there)) conclude(warp, meeting);
  if (!atBarrier.empty() && atBarrier.size() == threads.size() - nOver) concludeBarrier();
}

// ---- device.h ----

void poll() {
  block->poll();
}
void sleep() {
  block->sleep();
}
const uint64_t *meet(Together what, uint32_t mask, uint64_t value, uint32_t *came) {
  return block->meet(what, mask, value, came);
}
unsigned lane() {
  return block->current().lane;
}
bool barrier(bool value) {
  return block->barrier(value);
}

Thread &currentThread() {
  return block->current();
}
BulkCopies &currentCopies() {
  return block->bulk();
}

} // namespace emulated
