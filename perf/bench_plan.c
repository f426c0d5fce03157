/* What the library's plan will be, known beforehand: rows from rank to rank, and the room a rank needs. */
#include "bench_run.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* loads[R][E] of a workload; null without memory. */
static int32_t *bench_loads_make(const workload_t *workload) {
  size_t nExperts = (size_t)workload->nExperts;
  int32_t *loads = calloc((size_t)workload->nRanks * nExperts, sizeof(loads[0]));
  for (int32_t r = 0; loads != NULL && r < workload->nRanks; r++) {
    int64_t entries = (int64_t)workload->nTokens[r] * workload->topK;
    for (int64_t i = 0; i < entries; i++) {
      int32_t expert = workload->topk[r][i];
      if (expert >= 0) loads[(size_t)r * nExperts + (size_t)expert]++;
    }
  }
  return loads;
}

/* Where an expert's next assignment goes: sources and tokens come in order, as the pieces do. */
typedef struct {
  int32_t piece, taken; /* of the expert's pieces; of the piece's assignments */
} planCursor_t;

static int32_t bench_rank_next(const ultraepPlan_t *plan, int32_t expert, planCursor_t *cursor) {
  const ultraepPiece_t *pieces = &plan->pieces[plan->pieceFirst[expert]];
  if (plan->pieceFirst[expert] == plan->pieceFirst[expert + 1])
    return expert / (plan->nExperts / plan->nRanks);
  if (cursor->taken == pieces[cursor->piece].count) {
    cursor->piece++;
    cursor->taken = 0;
  }
  cursor->taken++;
  return plan->instances[pieces[cursor->piece].instance].rank;
}

/* The pairs of one source. last[R]: the number of the token that a rank got last, over all sources. */
static void bench_source_set(const ultraepPlan_t *plan, benchRun_t *run, int32_t source,
                             planCursor_t *cursors, int64_t *last) {
  const workload_t *workload = run->workload;
  int64_t *rows = &run->pairRows[(size_t)source * (size_t)plan->nRanks];
  int64_t *tokens = &run->pairTokens[(size_t)source * (size_t)plan->nRanks];
  for (int64_t i = 0; i < (int64_t)workload->nTokens[source] * workload->topK; i++) {
    int32_t expert = workload->topk[source][i];
    if (expert < 0) continue;
    int32_t rank = bench_rank_next(plan, expert, &cursors[expert]);
    int64_t token = (int64_t)source * WORKLOAD_MAX_TOKENS + i / workload->topK + 1;
    rows[rank]++;
    tokens[rank] += last[rank] != token;
    last[rank] = token;
  }
}

static int bench_pairs_set(const ultraepPlan_t *plan, benchRun_t *run, perfError_t *error) {
  planCursor_t *cursors = calloc((size_t)plan->nExperts, sizeof(cursors[0]));
  int64_t *last = calloc((size_t)plan->nRanks, sizeof(last[0]));
  bool whole = cursors != NULL && last != NULL;
  for (int32_t source = 0; whole && source < plan->nRanks; source++)
    bench_source_set(plan, run, source, cursors, last);
  free(last);
  free(cursors);
  return whole ? 0 : perfErrorSet(error, "no memory for the rows of %d ranks", plan->nRanks);
}

/* Rows of the rank that needs most, each segment rounded up to the alignment. */
static int64_t bench_room_find(const ultraepPlan_t *plan, int32_t alignment, int64_t *room) {
  int64_t most = 1;
  memset(room, 0, (size_t)plan->nRanks * sizeof(room[0]));
  for (int32_t i = 0; i < plan->nInstances; i++) {
    const ultraepInstance_t *instance = &plan->instances[i];
    room[instance->rank] += (instance->quota + alignment - 1) / alignment * alignment;
  }
  for (int32_t r = 0; r < plan->nRanks; r++) {
    if (room[r] > most) most = room[r];
  }
  return most;
}

static void bench_shares_set(const ultraepPlan_t *plan, benchRun_t *run) {
  for (int32_t i = 0; i < plan->nInstances; i++) {
    const ultraepInstance_t *instance = &plan->instances[i];
    if (instance->rank == instance->expert / (plan->nExperts / plan->nRanks)) continue;
    run->replicaShares[instance->expert] += benchGradsShare(instance->rank);
  }
}

static int bench_plan_run(benchRun_t *run, const ultraepPlannerConfig_t *config, const int32_t *loads,
                          perfError_t *error) {
  size_t nRanks = (size_t)config->nRanks, bytes = 0;
  ultraepPlan_t plan;
  int status = -1;
  if (ultraepPlannerWorkspaceSize(config, &bytes) != ultraepSuccess)
    return perfErrorSet(error, "planner: %.300s", ultraepPlannerConfigError(config));
  void *workspace = benchAllocate(1, bytes);
  int64_t *room = calloc(nRanks, sizeof(room[0]));
  run->pairRows = calloc(nRanks * nRanks, sizeof(run->pairRows[0]));
  run->pairTokens = calloc(nRanks * nRanks, sizeof(run->pairTokens[0]));
  run->replicaShares = calloc((size_t)config->nExperts, sizeof(run->replicaShares[0]));
  if (workspace == NULL || room == NULL || run->pairRows == NULL || run->pairTokens == NULL ||
      run->replicaShares == NULL) {
    perfErrorSet(error, "no memory for a plan of %zu bytes", bytes);
    goto free_memory;
  }
  if (ultraepPlannerRun(config, loads, workspace, bytes, &plan) != ultraepSuccess) {
    perfErrorSet(error, "planner: the loads are out of its range");
    goto free_memory;
  }
  if (bench_pairs_set(&plan, run, error) != 0) goto free_memory;
  bench_shares_set(&plan, run);
  /* Behind the last row, rows that must stay as they were: room to see it. */
  int64_t needed = bench_room_find(&plan, run->options->alignment, room) + 4;
  if (config->nSlots > 0 && needed < run->maxRows) run->maxRows = needed;
  status = 0;

free_memory:
  free(room);
  free(workspace);
  return status;
}

int benchPlanMake(benchRun_t *run, perfError_t *error) {
  const benchOptions_t *options = run->options;
  ultraepPlannerConfig_t config = {.nRanks = run->workload->nRanks,
                                   .nExperts = run->workload->nExperts,
                                   .nSlots = run->balance ? options->nSlots : 0,
                                   .nDomainRanks = options->nDomainRanks,
                                   .tolerancePpm = (uint32_t)llround(options->tolerance * 1e6),
                                   .replicaRows = options->replicaRows};
  /* With the cost gate the plan depends on rates that the library knows: room for all then, and no pairs. */
  if (run->balance && options->gateBytes > 0) {
    if (options->baseline == BENCH_BASELINE_NONE && options->matrixPath == NULL) return 0;
    return perfErrorSet(error, "--gate-bytes: what goes from rank to rank is not known beforehand, which "
                               "--baseline and --matrix need");
  }
  int32_t *loads = bench_loads_make(run->workload);
  if (loads == NULL)
    return perfErrorSet(error, "no memory for %d x %d loads", config.nRanks, config.nExperts);
  int status = bench_plan_run(run, &config, loads, error);
  free(loads);
  return status;
}

void benchPlanFree(benchRun_t *run) {
  free(run->pairRows);
  free(run->pairTokens);
  free(run->replicaShares);
}

int benchPlanGate(const benchRun_t *run, gateFigures_t *gate, perfError_t *error) {
  const ultraepPlannerConfig_t *planner = &run->ranks[0].planner;
  size_t bytes = 0;
  ultraepPlan_t plan;
  int status = -1;
  if (!run->balance || planner->copyPs == 0) return 0;
  if (ultraepPlannerWorkspaceSize(planner, &bytes) != ultraepSuccess)
    return perfErrorSet(error, "planner: %.300s", ultraepPlannerConfigError(planner));
  void *workspace = benchAllocate(1, bytes);
  int32_t *loads = bench_loads_make(run->workload);
  if (workspace == NULL || loads == NULL) {
    perfErrorSet(error, "no memory for a plan of %zu bytes", bytes);
  } else {
    status = gateFind(planner, loads, workspace, bytes, &plan, gate, error);
  }
  free(loads);
  free(workspace);
  return status;
}

/* The most that a rank sends to others or gets from them; *all: what goes between different ranks. */
static int64_t bench_pairs_busiest(const int64_t *pairs, int32_t nRanks, int64_t *all) {
  int64_t busiest = 0;
  *all = 0;
  for (int32_t r = 0; r < nRanks; r++) {
    int64_t sent = 0, got = 0;
    for (int32_t peer = 0; peer < nRanks; peer++) {
      if (peer == r) continue;
      sent += pairs[r * nRanks + peer];
      got += pairs[peer * nRanks + r];
    }
    *all += sent;
    if (sent > busiest) busiest = sent;
    if (got > busiest) busiest = got;
  }
  return busiest;
}

int64_t benchPlanBusiest(const benchRun_t *run, int64_t linkBytes, size_t rowBytes) {
  const int64_t *pairs[] = {run->pairRows, run->pairTokens};
  for (int i = 0; i < 2; i++) {
    int64_t all = 0, busiest = -1;
    if (pairs[i] != NULL) busiest = bench_pairs_busiest(pairs[i], run->workload->nRanks, &all);
    if (busiest >= 0 && all * (int64_t)rowBytes == linkBytes) return busiest * (int64_t)rowBytes;
  }
  return -1;
}

int benchPlanWrite(const benchRun_t *run, const char *path, perfError_t *error) {
  int32_t nRanks = run->workload->nRanks;
  FILE *file = fopen(path, "w");
  if (file == NULL) return perfErrorSet(error, "%s: %s", path, strerror(errno));
  for (int32_t r = 0; r < nRanks; r++) {
    for (int32_t to = 0; to < nRanks; to++) {
      fprintf(file, "%s%lld", to > 0 ? " " : "",
              (long long)run->pairRows[r * nRanks + to] * (long long)run->shape.bytes);
    }
    fputc('\n', file);
  }
  bool bad = ferror(file) != 0;
  if (fclose(file) != 0 || bad)
    return perfErrorSet(error, "%s: cannot be written: %s", path, strerror(errno));
  return 0;
}
