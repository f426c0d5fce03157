// Launches: every block of a grid is a task of a CPU thread, all of which run at once, as kernels here count
// on.
#include "block.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <thread>

namespace ultraep {
thread_local __attribute__((aligned(1024))) char planMemory[emulated::kSharedBytes + emulated::kGuardBytes];
}

namespace emulated {
namespace {

constexpr unsigned char kPoison = 0xa5, kGuard = 0x5a;

// ---- kernels ----

struct Kernels {
  std::mutex lock;
  std::map<const void *, emulatedKernel_t> known;
};
Kernels &kernels() {
  static Kernels *all = new Kernels; // for as long as anybody may launch
  return *all;
}

// ---- CPU threads, which are kept for the next grids ----

struct Grid;
struct Task {
  Grid *grid;
  unsigned block;
};

struct Worker {
  std::condition_variable woken;
  bool isNeeded = false;
  Task task;
};

class Workers {
public:
  void start(const Task &task);

private:
  void run(Worker &worker);

  std::mutex lock;
  std::list<Worker> all;
  std::vector<Worker *> idle;
};
Workers &workers() {
  static Workers *all = new Workers; // its threads may be in a kernel when the process ends
  return *all;
}

struct Grid {
  const emulatedKernel_t *kernel;
  Place first;
  size_t sharedBytes;
  void *const *arguments;
  uint32_t seed;
  std::mutex lock;
  std::condition_variable ended;
  unsigned left;
};

void runBlock(Grid &grid, unsigned number) {
  char *shared = ultraep::planMemory;
  memset(shared, kPoison, grid.sharedBytes);
  memset(shared + grid.sharedBytes, kGuard, kGuardBytes);
  Place first = grid.first;
  first.block = {number, 0, 0};
  {
    Block block(*grid.kernel, first, grid.arguments, grid.seed + number);
    block.run();
  }
  for (size_t i = 0; i < kGuardBytes; i++)
    if (static_cast<unsigned char>(shared[grid.sharedBytes + i]) != kGuard)
      fail("a block wrote beyond its dynamic shared memory");
  std::lock_guard<std::mutex> guard(grid.lock);
  if (--grid.left == 0) grid.ended.notify_one(); // the grid is gone once the lock is
}

void Workers::run(Worker &worker) {
  std::unique_lock<std::mutex> guard(lock);
  for (;;) {
    worker.woken.wait(guard, [&] { return worker.isNeeded; });
    Task task = worker.task;
    guard.unlock();
    runBlock(*task.grid, task.block);
    guard.lock();
    worker.isNeeded = false;
    idle.push_back(&worker);
  }
}

void Workers::start(const Task &task) {
  std::lock_guard<std::mutex> guard(lock);
  if (idle.empty()) {
    all.emplace_back();
    Worker &made = all.back();
    std::thread([this, &made] { run(made); }).detach();
    idle.push_back(&made);
  }
  Worker &worker = *idle.back();
  idle.pop_back();
  worker.task = task;
  worker.isNeeded = true;
  worker.woken.notify_one();
}

} // namespace
} // namespace emulated

using namespace emulated;

void emulated_kernel_add(const emulatedKernel_t *kernel) {
  std::lock_guard<std::mutex> guard(kernels().lock);
  kernels().known.emplace(kernel->address, *kernel);
}

const emulatedKernel_t *emulated_kernel_find(const void *address) {
  std::lock_guard<std::mutex> guard(kernels().lock);
  auto found = kernels().known.find(address);
  return found == kernels().known.end() ? nullptr : &found->second;
}

void emulated_grid_run(const emulatedKernel_t *kernel, dim3 grid, dim3 block, size_t sharedBytes,
                       void *const *arguments) {
  static std::atomic<uint32_t> launches{1};
  if (grid.y * grid.z * block.y * block.z != 1) fail("grids here have one dimension");
  if (sharedBytes > kSharedBytes) fail("more dynamic shared memory than a block can have");
  Grid running{kernel, {{}, {}, block, grid}, sharedBytes, arguments, launches.fetch_add(1) * 7919, {}, {},
               grid.x};
  for (unsigned i = 0; i < grid.x; i++) workers().start({&running, i});
  std::unique_lock<std::mutex> guard(running.lock);
  running.ended.wait(guard, [&] { return running.left == 0; });
}
