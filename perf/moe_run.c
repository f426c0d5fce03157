/* One run: all ranks of this process, and what their figures come to. */
#include "bench_job.h"
#include "moe.h"

#include <stdlib.h>

const char *const moeKindNames[MOE_KINDS] = {"unbalanced", "balanced", "ideal"};

int32_t moeLocalRanks(const moeOptions_t *options) {
  return benchJob.nProcesses > 1 ? 1 : options->bench.nRanks;
}

void moeReferencesFree(moeReference_t *references, int32_t count) {
  for (int32_t i = 0; references != NULL && i < count; i++) {
    free(references[i].out);
    free(references[i].dx);
    for (int t = 0; t < MOE_TENSORS; t++) free(references[i].grads[t]);
  }
  free(references);
}

/* ---- memory ---- */

/* Bytes that the ranks of this process need where they live. */
static double moe_memory_needed(const moeRun_t *run) {
  const moeOptions_t *options = run->options;
  const workload_t *workload = run->base.workload;
  double h = options->bench.hidden, i = options->inter, nLayers = options->nLayers;
  double share = (double)run->base.nLocal / workload->nRanks, nRanks = workload->nRanks;
  double experts = workload->nExperts * nLayers + (run->base.balance ? nRanks * options->bench.nSlots : 0);
  double symmetric = (double)run->base.maxRows * nRanks * (nLayers + 1) * 2 * h;
  double own = (double)workload->assignments * i * (nLayers * 6 + 2);
  double tokens = (double)workload->maxTokens * nRanks * 12 * h;
  return share * (experts * 18 * h * i + symmetric + own + tokens);
}

static int moe_memory_check(const moeRun_t *run, perfError_t *error) {
  const char *what = NULL;
  double need = moe_memory_needed(run), have = run->base.ops->memoryThere(&what);
  if (need <= 0.9 * have) return 0;
  return perfErrorSet(
      error, "%s, %s: needs %.1f GB, %s %.1f GB: ask for fewer --tokens, or smaller --hidden or --inter",
      run->base.workload->label, moeKindNames[run->kind], need / 1e9, what, have / 1e9);
}

static int moe_memory_allocate(moeRun_t *run, perfError_t *error) {
  size_t nLocal = (size_t)run->base.nLocal;
  bool whole = true;
  run->base.ranks = calloc(nLocal, sizeof(run->base.ranks[0]));
  run->ranks = calloc(nLocal, sizeof(run->ranks[0]));
  for (int phase = 0; phase < MOE_PHASES; phase++) {
    run->seconds[phase] = calloc((size_t)run->options->bench.iters, sizeof(double));
    whole = whole && run->seconds[phase] != NULL;
  }
  if (!whole || run->base.ranks == NULL || run->ranks == NULL)
    return perfErrorSet(error, "no memory for %zu ranks", nLocal);
  for (size_t i = 0; i < nLocal; i++) {
    run->ranks[i].base = &run->base.ranks[i];
    for (int phase = 0; phase < MOE_PHASES; phase++) {
      run->ranks[i].kept[phase] = calloc((size_t)run->options->bench.iters, sizeof(double));
      whole = whole && run->ranks[i].kept[phase] != NULL;
    }
  }
  return whole ? 0 : perfErrorSet(error, "no memory for %zu ranks", nLocal);
}

static void moe_memory_free(moeRun_t *run) {
  for (int32_t i = 0; run->ranks != NULL && i < run->base.nLocal; i++)
    for (int phase = 0; phase < MOE_PHASES; phase++) free(run->ranks[i].kept[phase]);
  free(run->base.ranks);
  free(run->ranks);
  benchPlanFree(&run->base);
  for (int phase = 0; phase < MOE_PHASES; phase++) free(run->seconds[phase]);
}

/* What this process alone can see before the ranks meet. */
static int moe_run_prepare(moeRun_t *run, perfError_t *error) {
  benchShapesSet(&run->base);
  /* With the gate the plan depends on rates that the library knows: room for all then. */
  bool planned = run->kind != MOE_BALANCED || !run->options->gate;
  if ((planned && benchPlanMake(&run->base, error) != 0) || moe_memory_check(run, error) != 0) return -1;
  return moe_memory_allocate(run, error);
}

/* ---- results ---- */

static void moe_figures_fill(const moeRun_t *run, const moeRank_t *rank, moeRankFigures_t *figures) {
  figures->rows = rank->base->received;
  figures->experts = rank->nExperts;
  for (int phase = 0; phase < MOE_PHASES; phase++)
    figures->nanoseconds[phase] =
        (int64_t)(1e9 * perfMedian(rank->kept[phase], run->options->bench.iters) + 0.5);
}

/* Sets result->ranks, and the imbalance of their rows. */
static int moe_ranks_set(const moeRun_t *run, moeResult_t *result, perfError_t *error) {
  enum { FIGURES = sizeof(moeRankFigures_t) / sizeof(int64_t) };
  int32_t nRanks = run->base.workload->nRanks;
  moeRankFigures_t *figures = calloc((size_t)nRanks, sizeof(figures[0]));
  int64_t *received = calloc((size_t)nRanks, sizeof(received[0]));
  if (benchJobAny(figures == NULL || received == NULL) || figures == NULL || received == NULL) {
    free(figures);
    free(received);
    return perfErrorSet(error, "no memory for %d ranks", nRanks);
  }
  for (int32_t i = 0; i < run->base.nLocal; i++)
    moe_figures_fill(run, &run->ranks[i], &figures[run->base.ranks[i].rank]);
  benchJobSum((int64_t *)figures, nRanks * FIGURES);
  for (int32_t r = 0; r < nRanks; r++) received[r] = figures[r].rows;
  result->after = perfImbalance(received, nRanks);
  result->ranks = figures;
  free(received);
  return 0;
}

void moeResultFree(moeResult_t *result) {
  free(result->ranks);
  result->ranks = NULL;
}

static void moe_energy_set(const moeRun_t *run, int64_t sum, bool known, moeResult_t *result) {
  result->millijoules = known ? (double)sum / run->options->bench.iters : -1;
}

static int moe_result_make(const moeRun_t *run, moeResult_t *result, perfError_t *error) {
  const workload_t *workload = run->base.workload;
  int64_t sums[4] = {0, 0, 0, 0}; /* replicas, bytes, millijoules, bytes for replicas */
  bool energyUnknown = false;
  double mean = (double)workload->assignments / workload->nRanks;
  *result = (moeResult_t){.before = workload->assignments == 0 ? 1 : (double)workload->maxBefore / mean};
  if (moe_ranks_set(run, result, error) != 0) return -1;
  if (benchJobAny(benchPlanGate(&run->base, &result->gate, error) != 0)) return -1;
  for (int phase = 0; phase < MOE_PHASES; phase++)
    result->seconds[phase] = perfMedian(run->seconds[phase], run->options->bench.iters);
  for (int32_t i = 0; i < run->base.nLocal; i++) {
    sums[0] += run->base.ranks[i].replicas;
    sums[1] += run->ranks[i].memoryBytes;
    sums[2] += run->ranks[i].energy;
    sums[3] += run->ranks[i].replicaBytes;
    energyUnknown = energyUnknown || run->ranks[i].energy < 0;
  }
  benchJobSum(sums, 4);
  result->replicas = (int32_t)sums[0];
  result->memoryBytes = sums[1];
  result->replicaBytes = sums[3];
  moe_energy_set(run, sums[2], !benchJobAny(energyUnknown), result);
  if (run->options->bench.check) result->check = moeCheckMerge(run);
  return 0;
}

int moeRun(const benchOps_t *benchOps, const moeOps_t *ops, const moeOptions_t *options,
           const workload_t *workload, moeKind_t kind, moeReference_t *references, moeResult_t *result,
           perfError_t *error) {
  moeRun_t run = {.base = {.ops = benchOps,
                           .options = &options->bench,
                           .workload = workload,
                           .balance = kind == MOE_BALANCED,
                           .work = moeRankWork,
                           .release = moeRankRelease},
                  .options = options,
                  .ops = ops,
                  .kind = kind,
                  .references = references};
  error->text[0] = '\0';
  int status = benchRanksRun(&run.base, moe_run_prepare(&run, error) == 0, error);
  if (status == 0) status = moe_result_make(&run, result, error);
  moe_memory_free(&run);
  return status;
}
