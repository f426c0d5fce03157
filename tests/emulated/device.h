// What device.cuh asks of the block that the calling thread of a kernel is in.
#ifndef ULTRAEP_TESTS_EMULATED_DEVICE_H_
#define ULTRAEP_TESTS_EMULATED_DEVICE_H_

#include "emulated.h"

#include <cstdint>

namespace emulated {

constexpr unsigned kWarp = 32;
// Of dynamic shared memory, and behind it what nobody may write.
constexpr size_t kSharedBytes = 232448, kGuardBytes = 1024;

// Where the running thread is.
struct Place {
  uint3 thread, block;
  dim3 nThreads, nBlocks;
};
extern thread_local const Place *place;

// Other threads may go on before this one does: in every look at memory that others write.
void poll();
// The same, for longer.
void sleep();

// What lanes of a warp do together; lanes that meet in different ones are an error.
enum class Together { kSync, kShuffle, kBallot, kMatch, kReduce };
// Waits for the lanes of `mask`, as far as they are there. Returns what they brought, of those that `came`,
// until this thread's next call.
const uint64_t *meet(Together what, uint32_t mask, uint64_t value, uint32_t *came);
unsigned lane();

// Waits for all threads of the block that have not ended. Whether any brought true.
bool barrier(bool value);

// Bulk copies; mbarriers for one arrival and the bytes of one phase.
void bulkBarrierInit(uint64_t *barrier);
void bulkBarrierArrive(uint64_t *barrier);
void bulkLoad(void *shared, const void *global, uint32_t bytes, uint64_t *barrier);
bool bulkBarrierIsOver(const uint64_t *barrier, uint32_t phase);
void bulkStore(void *global, const void *shared, uint32_t bytes);
void bulkCommit();
// Waits until all but the newest `newer` groups of this thread have been read, or written, too.
void bulkWait(unsigned newer, bool written);

// An error of the kernel: says where and ends the process.
[[noreturn]] void fail(const char *what);

} // namespace emulated

// All dynamic shared memory: every kernel's `extern __shared__` array is this one.
namespace ultraep {
extern thread_local __attribute__((aligned(1024))) char planMemory[];
}

#endif
