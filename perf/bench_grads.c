/* Replicas' gradients: sums of small whole numbers, which are exact in fp32 in any order. */
#include "bench_run.h"

#include "moe_values.h"

#include <string.h>

/* What an expert's master has before the reduction, and what the slot of a rank's replica adds to it, in
 * shares of bench_grad_part. */
static uint32_t bench_grad_master(int32_t expert, uint32_t iteration, size_t index) {
  return (uint32_t)((index * 5 + (size_t)expert + iteration) % 8);
}
static uint32_t bench_grad_part(int32_t expert, size_t index) {
  return 1 + (uint32_t)((index + (size_t)expert) % 3);
}
int32_t benchGradsShare(int32_t rank) {
  return 1 + rank % 5;
}

static size_t bench_grad_count(const benchRun_t *run) {
  return (size_t)run->options->expertBytes / (run->options->grads == BENCH_GRADS_BFLOAT16 ? 2 : 4);
}

static void bench_grad_write(const benchRun_t *run, void *values, size_t index, uint32_t value) {
  if (run->options->grads == BENCH_GRADS_BFLOAT16)
    ((uint16_t *)values)[index] = moeBfloat((float)value);
  else
    ((float *)values)[index] = (float)value;
}

static bool bench_grad_is(const benchRun_t *run, const void *values, size_t index, uint32_t value) {
  if (run->options->grads == BENCH_GRADS_BFLOAT16)
    return ((const uint16_t *)values)[index] == moeBfloat((float)value);
  float expected = (float)value;
  return memcmp((const float *)values + index, &expected, sizeof(expected)) == 0;
}

static int bench_slot_fill(benchRank_t *rank, int32_t segment) {
  const benchRun_t *run = rank->run;
  void *slot = rank->segments.grads[0][segment], *values = run->ops->mirrored ? rank->slot : slot;
  int32_t expert = rank->segments.expert[segment];
  uint32_t share = (uint32_t)benchGradsShare(rank->rank);
  for (size_t i = 0; i < bench_grad_count(run); i++)
    bench_grad_write(run, values, i, share * bench_grad_part(expert, i));
  return run->ops->copy(rank, slot, values, (size_t)run->options->expertBytes);
}

int benchGradsFill(benchRank_t *rank, uint32_t iteration) {
  const benchRun_t *run = rank->run;
  int32_t perRank = run->workload->nExperts / run->workload->nRanks;
  size_t count = bench_grad_count(run), bytes = (size_t)run->options->expertBytes;
  if (rank->grads.own == NULL) return 0;
  for (int32_t e = 0; e < perRank; e++)
    for (size_t i = 0; i < count; i++)
      bench_grad_write(run, rank->grads.host + (size_t)e * bytes, i,
                       bench_grad_master(rank->rank * perRank + e, iteration, i));
  for (int32_t s = benchReplicaNext(rank, -1); s >= 0; s = benchReplicaNext(rank, s))
    if (bench_slot_fill(rank, s) != 0) return -1;
  return benchPush(rank, &rank->grads, (size_t)perRank * bytes);
}

static bool bench_slot_is_clear(benchRank_t *rank, int32_t segment) {
  const uint8_t *slot = benchSlotRead(rank, rank->segments.grads[0], segment);
  return slot != NULL && slot[0] == 0 &&
         memcmp(slot, slot + 1, (size_t)rank->run->options->expertBytes - 1) == 0;
}

int64_t benchGradsCheck(benchRank_t *rank, uint32_t iteration) {
  benchRun_t *run = rank->run;
  int32_t perRank = run->workload->nExperts / run->workload->nRanks;
  size_t count = bench_grad_count(run), bytes = (size_t)run->options->expertBytes;
  int64_t wrong = 0;
  if (rank->grads.own == NULL || benchPull(rank, &rank->grads, (size_t)perRank * bytes) != 0) return 0;
  for (int32_t e = rank->rank * perRank; e < (rank->rank + 1) * perRank; e++) {
    const uint8_t *sums = rank->grads.host + (size_t)(e - rank->rank * perRank) * bytes;
    uint32_t shares = (uint32_t)run->replicaShares[e];
    size_t same = 0;
    while (same < count &&
           bench_grad_is(run, sums, same,
                         bench_grad_master(e, iteration, same) + shares * bench_grad_part(e, same)))
      same++;
    if (same == count) continue;
    verifyFault(&run->verify, "rank %d: the gradients of expert %d are not the sum, from element %zu on",
                rank->rank, e, same);
    wrong++;
  }
  for (int32_t s = benchReplicaNext(rank, -1); s >= 0; s = benchReplicaNext(rank, s)) {
    if (bench_slot_is_clear(rank, s)) continue;
    verifyFault(&run->verify, "rank %d: the slot of expert %d still has gradients", rank->rank,
                rank->segments.expert[s]);
    wrong++;
  }
  return wrong;
}
