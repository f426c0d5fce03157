// One block of a grid while it runs: on one CPU thread, its threads being fibers of that.
#ifndef ULTRAEP_TESTS_EMULATED_BLOCK_H_
#define ULTRAEP_TESTS_EMULATED_BLOCK_H_

#include "device.h"

#include <boost/context/fiber.hpp>
#include <deque>
#include <memory>
#include <random>
#include <vector>

namespace emulated {

// ---- bulk.cpp ----

// A store's bytes are read, then, at some later time, written.
struct BulkCopy {
  const char *from;
  char *to;
  uint32_t bytes;
  uint64_t *barrier; // of a load; null: a store
  enum { kBegun, kRead, kWritten } state;
  std::vector<char> held; // between reading and writing
};
using BulkGroup = std::vector<std::shared_ptr<BulkCopy>>;

// All copies of a block that are under way.
class BulkCopies {
public:
  void add(std::shared_ptr<BulkCopy> copy) { copies.push_back(std::move(copy)); }
  // One step of one of them.
  void advance(std::minstd_rand &random);
  // Writes what has been read; false if anything has not: the block's memory goes.
  bool end();

private:
  std::vector<std::shared_ptr<BulkCopy>> copies;
};

// ---- block.cpp ----

struct Thread {
  Place place;
  unsigned lane;
  bool isOver = false;
  boost::context::fiber fiber, scheduler; // its own while it does not run; the block's while it does
  uint64_t seen[kWarp];                   // what the lanes brought that it last met
  uint32_t came;
  BulkGroup open;               // stores since the last commit
  std::deque<BulkGroup> groups; // committed, the oldest first
  // For the address sanitizer.
  void *stack = nullptr, *fake = nullptr;
};

// Lanes that wait for each other: those of one mask in one operation.
struct Meeting {
  Together what;
  uint32_t mask, arrived = 0;
  uint64_t values[kWarp];
};

struct Warp {
  Thread *threads[kWarp] = {};
  uint32_t there = 0; // lanes that have not ended
  Meeting meetings[kWarp];
};

class Block {
public:
  Block(const emulatedKernel_t &kernel, const Place &first, void *const *arguments, uint32_t seed);
  void run();

  const uint64_t *meet(Together what, uint32_t mask, uint64_t value, uint32_t *came);
  bool barrier(bool value);
  void poll();
  void sleep();
  Thread &current() { return *running; }
  BulkCopies &bulk() { return copies; }

private:
  void body(Thread &thread);
  void resume(Thread &thread);
  void leave(Thread &thread);
  void wait(); // until somebody makes the running thread ready
  void switchAway();
  void conclude(Warp &warp, Meeting &meeting);
  void concludeBarrier();
  Thread *pick();
  void rest();
  void wake();

  const emulatedKernel_t &kernel;
  void *const *arguments;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::deque<Thread *> ready, polling; // polling: it looked at memory and may look in vain again
  std::vector<Thread *> sleeping;      // as polling, but for longer
  std::vector<Thread *> atBarrier;
  bool barrierValue = false, barrierResult = false;
  size_t nOver = 0, nSteps = 0;
  size_t nIdle = 0;  // polling threads that went on since the last rest
  size_t nAwake = 0; // threads that went on since those that sleep were woken
  // Of the running thread, once it has switched away.
  enum { kGoesOn, kWaits, kPolls, kSleeps } next = kGoesOn;
  Thread *running = nullptr;
  BulkCopies copies;
  std::minstd_rand random;
  unsigned copyPace; // a step of bulk copies for so many of threads; some blocks' are slow
  const void *callerStack = nullptr;
  size_t callerBytes = 0;
};

// The running thread, and its block's copies.
Thread &currentThread();
BulkCopies &currentCopies();

} // namespace emulated

#endif
