// Bulk copies: begun by a thread, done step by step while the block's threads run.
#include "block.h"

#include <cstring>

namespace emulated {

namespace {

// What the word of an mbarrier holds.
struct Barrier {
  uint32_t bytes; // still to come
  uint16_t arrived, phase;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t), "a barrier is a word");

Barrier readBarrier(const uint64_t *word) {
  Barrier barrier;
  memcpy(&barrier, word, sizeof(barrier));
  return barrier;
}
void writeBarrier(uint64_t *word, const Barrier &barrier) {
  memcpy(word, &barrier, sizeof(barrier));
}

void check(const void *to, const void *from, uint32_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0)
    fail("a bulk copy that is not of whole sixteens");
}

bool isInShared(const void *at, uint32_t bytes) {
  size_t offset = size_t(static_cast<const char *>(at) - ultraep::planMemory);
  return offset < kSharedBytes && bytes <= kSharedBytes - offset;
}

void finishLoad(const BulkCopy &copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  Barrier barrier = readBarrier(copy.barrier);
  barrier.bytes -= copy.bytes;
  if (barrier.bytes == 0 && barrier.arrived > 0) {
    barrier.arrived = 0;
    barrier.phase ^= 1;
  }
  writeBarrier(copy.barrier, barrier);
}

} // namespace

void BulkCopies::advance(std::minstd_rand &random) {
  if (copies.empty()) return;
  size_t i = random() % copies.size();
  BulkCopy &copy = *copies[i];
  if (copy.barrier) {
    finishLoad(copy);
    copy.state = BulkCopy::kWritten;
  } else if (copy.state == BulkCopy::kBegun) {
    copy.held.assign(copy.from, copy.from + copy.bytes);
    copy.state = BulkCopy::kRead;
  } else {
    memcpy(copy.to, copy.held.data(), copy.bytes);
    copy.state = BulkCopy::kWritten;
  }
  if (copy.state != BulkCopy::kWritten) return;
  std::swap(copies[i], copies.back());
  copies.pop_back();
}

bool BulkCopies::end() {
  for (auto &copy : copies) {
    if (copy->state != BulkCopy::kRead) return false;
    memcpy(copy->to, copy->held.data(), copy->bytes);
  }
  copies.clear();
  return true;
}

// ---- device.h ----

void bulkBarrierInit(uint64_t *barrier) {
  writeBarrier(barrier, {0, 0, 0});
}

void bulkBarrierArrive(uint64_t *barrier) {
  Barrier state = readBarrier(barrier);
  if (state.arrived > 0) fail("a second arrival in one phase of an mbarrier");
  state.phase ^= 1;
  writeBarrier(barrier, state);
}

void bulkLoad(void *shared, const void *global, uint32_t bytes, uint64_t *barrier) {
  check(shared, global, bytes);
  if (!isInShared(shared, bytes)) fail("a bulk load that does not go to dynamic shared memory");
  Barrier state = readBarrier(barrier);
  if (state.arrived > 0) fail("a second arrival in one phase of an mbarrier");
  state.arrived = 1;
  state.bytes += bytes;
  writeBarrier(barrier, state);
  currentCopies().add(std::make_shared<BulkCopy>(BulkCopy{
      static_cast<const char *>(global), static_cast<char *>(shared), bytes, barrier, BulkCopy::kBegun, {}}));
}

bool bulkBarrierIsOver(const uint64_t *barrier, uint32_t phase) {
  return readBarrier(barrier).phase != (phase & 1);
}

void bulkStore(void *global, const void *shared, uint32_t bytes) {
  check(global, shared, bytes);
  if (!isInShared(shared, bytes)) fail("a bulk store that does not come from dynamic shared memory");
  auto copy = std::make_shared<BulkCopy>(BulkCopy{
      static_cast<const char *>(shared), static_cast<char *>(global), bytes, nullptr, BulkCopy::kBegun, {}});
  currentThread().open.push_back(copy);
  currentCopies().add(std::move(copy));
}

void bulkCommit() {
  Thread &thread = currentThread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

static bool groupHas(const BulkGroup &group, bool written) {
  for (auto &copy : group)
    if (copy->state == BulkCopy::kBegun || (written && copy->state != BulkCopy::kWritten)) return false;
  return true;
}

void bulkWait(unsigned newer, bool written) {
  Thread &thread = currentThread();
  while (!thread.groups.empty() && groupHas(thread.groups.front(), true)) thread.groups.pop_front();
  for (size_t i = 0; i + newer < thread.groups.size(); i++)
    while (!groupHas(thread.groups[i], written)) poll();
}

} // namespace emulated
