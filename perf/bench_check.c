/* What is in the ranks' memory: filled in before the calls, checked after them. */
#include "bench_job.h"
#include "bench_run.h"

#include <stdlib.h>
#include <string.h>

int benchPush(benchRank_t *rank, const benchMemory_t *memory, size_t bytes) {
  if (memory->own == memory->host || bytes == 0) return 0;
  return rank->run->ops->copy(rank, memory->own, memory->host, bytes);
}

int benchPull(benchRank_t *rank, const benchMemory_t *memory, size_t bytes) {
  if (memory->own == memory->host || bytes == 0) return 0;
  return rank->run->ops->copy(rank, memory->host, memory->own, bytes);
}

/* ---- inputs ---- */

int benchTokensFill(benchRank_t *rank, uint32_t iteration) {
  benchRun_t *run = rank->run;
  for (int32_t s = rank->firstSource; s < rank->lastSource; s++) {
    verifySource_t *source = &run->verify.sources[s];
    for (int32_t token = 0; token < source->nTokens; token++) {
      rowId_t id = {.rank = s, .token = token, .iteration = iteration};
      rowFill(&run->shape, (uint8_t *)source->tokens + (size_t)token * run->shape.bytes, id);
      rowScalesFill((uint8_t *)source->scales + (size_t)token * run->scaleBytes, run->scaleBytes, id);
    }
    verifyForget(&run->verify, s);
  }
  size_t tokens = (size_t)run->workload->nTokens[rank->rank];
  if (benchPush(rank, &rank->tokens, tokens * run->shape.bytes) != 0) return -1;
  return benchPush(rank, &rank->scales, tokens * run->scaleBytes);
}

static uint64_t bench_weight_word(int32_t expert, uint32_t iteration, size_t index) {
  return ((uint64_t)expert << 40 | (uint64_t)iteration << 20) + index * UINT64_C(0x9e3779b97f4a7c15);
}

int benchMastersFill(benchRank_t *rank, uint32_t iteration) {
  benchRun_t *run = rank->run;
  int32_t perRank = run->workload->nExperts / run->workload->nRanks;
  size_t words = (size_t)run->options->expertBytes / sizeof(uint64_t);
  uint64_t *at = (uint64_t *)rank->masters.host;
  if (at == NULL) return 0;
  for (int32_t i = 0; i < perRank; i++, at += words) {
    for (size_t w = 0; w < words; w++) at[w] = bench_weight_word(rank->rank * perRank + i, iteration, w);
  }
  return benchPush(rank, &rank->masters, (size_t)perRank * words * sizeof(uint64_t));
}

/* ---- segments ---- */

/* The library's arrays, copied into the rank's segmentMemory. */
static int bench_segments_copy(benchRank_t *rank, const ultraepSegments_t *from) {
  const benchOps_t *ops = rank->run->ops;
  size_t n = (size_t)from->nSegments;
  int64_t *total = (int64_t *)rank->segmentMemory, *firstRow = total + 2, *rows = firstRow + n;
  void **weights = (void **)(rows + n), **grads = weights + n;
  int32_t *expert = (int32_t *)(grads + n);
  if (ops->copy(rank, total, from->totalRows, sizeof(*total)) != 0 ||
      ops->copy(rank, firstRow, from->firstRow, n * sizeof(*firstRow)) != 0 ||
      ops->copy(rank, rows, from->rows, n * sizeof(*rows)) != 0 ||
      ops->copy(rank, expert, from->expert, n * sizeof(*expert)) != 0)
    return -1;
  bool weighted = from->weights[0] != NULL, reduced = from->grads[0] != NULL;
  if (weighted && ops->copy(rank, weights, from->weights[0], n * sizeof(*weights)) != 0) return -1;
  if (reduced && ops->copy(rank, grads, from->grads[0], n * sizeof(*grads)) != 0) return -1;
  rank->segments = (ultraepSegments_t){.nSegments = from->nSegments,
                                       .expert = expert,
                                       .firstRow = firstRow,
                                       .rows = rows,
                                       .totalRows = total,
                                       .weights = {weighted ? weights : NULL},
                                       .grads = {reduced ? grads : NULL}};
  return 0;
}

int benchSegmentsRead(benchRank_t *rank) {
  const benchRun_t *run = rank->run;
  ultraepSegments_t segments;
  BENCH_CALL(rank, ultraepRouteSegments(rank->route, &segments));
  if (!run->ops->mirrored) {
    rank->segments = segments;
    return 0;
  }
  int32_t expected = run->workload->nExperts / run->workload->nRanks + run->options->nSlots;
  if (segments.nSegments != expected)
    return benchRankFail(rank, "%d segments instead of %d", segments.nSegments, expected);
  return bench_segments_copy(rank, &segments);
}

int32_t benchReplicaNext(const benchRank_t *rank, int32_t segment) {
  int32_t perRank = rank->run->workload->nExperts / rank->run->workload->nRanks;
  for (segment = segment < perRank ? perRank : segment + 1; segment < rank->segments.nSegments; segment++)
    if (rank->segments.expert[segment] >= 0) return segment;
  return -1;
}

const void *benchSlotRead(benchRank_t *rank, void *const *slots, int32_t segment) {
  const benchRun_t *run = rank->run;
  const void *slot = slots == NULL ? NULL : slots[segment];
  if (slot == NULL || !run->ops->mirrored) return slot;
  size_t bytes = (size_t)run->options->expertBytes;
  return run->ops->copy(rank, rank->slot, slot, bytes) == 0 ? rank->slot : NULL;
}

/* ---- weights ---- */

int64_t benchWeightsCheck(benchRank_t *rank, uint32_t iteration) {
  benchRun_t *run = rank->run;
  size_t words = (size_t)run->options->expertBytes / sizeof(uint64_t);
  int64_t wrong = 0;
  if (rank->masters.own == NULL) return 0;
  for (int32_t i = benchReplicaNext(rank, -1); i >= 0; i = benchReplicaNext(rank, i)) {
    int32_t expert = rank->segments.expert[i];
    const uint64_t *slot = benchSlotRead(rank, rank->segments.weights[0], i);
    size_t same = 0;
    while (slot != NULL && same < words && slot[same] == bench_weight_word(expert, iteration, same)) same++;
    if (same == words) continue;
    verifyFault(&run->verify,
                "rank %d: the replica of expert %d has not its master's weights, from word %zu on",
                rank->rank, expert, same);
    wrong++;
  }
  return wrong;
}

/* ---- rows ---- */

/* Rows in use and the guard behind them; 0 where they do not fit, which the check will say. */
static size_t bench_rows_looked(const benchRank_t *rank) {
  int64_t total = *rank->segments.totalRows, room = rank->run->maxRows;
  return total < 0 || total > room ? 0 : (size_t)(total + verifyGuardRows(total, room));
}

int benchRowsPoison(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  size_t rows = bench_rows_looked(rank);
  if (rows == 0) return 0;
  if (run->ops->fill(rank, rank->rows.own, VERIFY_POISON, rows * run->shape.bytes) != 0) return -1;
  if (run->scaleBytes == 0) return 0;
  return run->ops->fill(rank, rank->rowScales.own, VERIFY_POISON, rows * run->scaleBytes);
}

int64_t benchRowsCheck(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  const ultraepSegments_t *segments = &rank->segments;
  size_t rows = bench_rows_looked(rank);
  if (benchPull(rank, &rank->rows, rows * run->shape.bytes) != 0 ||
      benchPull(rank, &rank->rowScales, rows * run->scaleBytes) != 0)
    return 0;
  verifyReceived_t received = {.nSegments = segments->nSegments,
                               .expert = segments->expert,
                               .firstRow = segments->firstRow,
                               .rows = segments->rows,
                               .totalRows = *segments->totalRows,
                               .roomRows = run->maxRows,
                               .data = rank->rows.host,
                               .scales = run->scaleBytes > 0 ? rank->rowScales.host : NULL};
  return verifyRows(&run->verify, rank->rank, &received);
}

/* Who took a source's assignments, from all processes; each knows only its own rank's. Entries that several
 * took are returned. */
static int64_t bench_takers_merge(benchRank_t *rank, int32_t number) {
  enum { COUNT_SHIFT = 21 }; /* above the sum of 1024 takers of 1..1024 */
  verifySource_t *source = &rank->run->verify.sources[number];
  size_t entries = (size_t)source->nTokens * (size_t)rank->run->workload->topK;
  uint32_t *sums = calloc(entries + 1, sizeof(sums[0]));
  int64_t several = 0;
  if (benchJobAny(sums == NULL) || sums == NULL) {
    free(sums);
    (void)benchRankFail(rank, "no memory for the check");
    return 0;
  }
  for (size_t i = 0; i < entries; i++) {
    uint32_t taker = atomic_load(&source->takers[i]);
    sums[i] = taker == 0 ? 0 : taker + (UINT32_C(1) << COUNT_SHIFT);
  }
  benchJobSum32(sums, entries);
  for (size_t i = 0; i < entries; i++) {
    if (sums[i] >> COUNT_SHIFT > 1) several++;
    atomic_store(&source->takers[i], (unsigned short)(sums[i] & ((UINT32_C(1) << COUNT_SHIFT) - 1)));
  }
  free(sums);
  return several;
}

int64_t benchTakenCheck(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  int64_t wrong = 0;
  for (int32_t s = 0; benchJob.nProcesses > 1 && s < run->workload->nRanks; s++) {
    int64_t several = bench_takers_merge(rank, s);
    if (s != rank->rank || several == 0) continue;
    verifyFault(&run->verify, "%lld assignments of rank %d came to several ranks", (long long)several, s);
    wrong += several;
  }
  return wrong + verifyTaken(&run->verify, rank->rank);
}

int benchExpertsApply(benchRank_t *rank) {
  benchRun_t *run = rank->run;
  for (int32_t i = 0; i < rank->segments.nSegments; i++) {
    for (int64_t r = 0; r < rank->segments.rows[i]; r++) {
      size_t row = (size_t)(rank->segments.firstRow[i] + r);
      rowExpert(&run->shape, rank->rows.host + row * run->shape.bytes, rank->segments.expert[i],
                &run->combineShape, rank->rowsOut.host + row * run->combineShape.bytes);
    }
  }
  return benchPush(rank, &rank->rowsOut, (size_t)*rank->segments.totalRows * run->combineShape.bytes);
}

/* ---- combined tokens ---- */

static size_t bench_combined_bytes(const benchRank_t *rank) {
  return (size_t)rank->run->workload->nTokens[rank->rank] * rank->run->combineShape.bytes;
}

int benchCombinedPoison(benchRank_t *rank) {
  return rank->run->ops->fill(rank, rank->combined.own, VERIFY_POISON, bench_combined_bytes(rank));
}

int64_t benchCombinedCheck(benchRank_t *rank) {
  if (benchPull(rank, &rank->combined, bench_combined_bytes(rank)) != 0) return 0;
  return verifyCombined(&rank->run->verify, rank->rank, rank->combined.host, rank->scratch);
}
