#include "bench_job.h"
#include "bench_json.h"
#include "moe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct moeReport {
  const moeOptions_t *options;
  const benchMachine_t *machine;
  int64_t records, bad;
  int64_t replicaBytes;                                 /* of all ranks, the most of any record */
  double ofIdeal, worstOfIdeal, speedUp, before, after; /* sums, and the least, over the records */
  benchJson_t *json;
};

/* ---- header ---- */

static void report_layer_print(const moeOptions_t *options) {
  const benchOptions_t *bench = &options->bench;
  double weights = 6.0 * bench->hidden * options->inter;
  printf("# ultraep_moe version %d.%d.%d\n", ULTRAEP_VERSION_MAJOR, ULTRAEP_VERSION_MINOR,
         ULTRAEP_VERSION_PATCH);
  printf(
      "# %d layer%s: hidden %d, inter %d, %.2f MB of bfloat16 weights an expert, %.2f MB of fp32 gradients\n",
      options->nLayers, options->nLayers == 1 ? "" : "s", bench->hidden, options->inter, weights / 1e6,
      2 * weights / 1e6);
  printf("# %d ranks, %d tokens a rank, slots %d, domain %d, align %d, tolerance %g, replica rows %d, "
         "dispatch %s, combine %s\n",
         bench->nRanks, bench->nTokens, bench->nSlots, bench->nDomainRanks, bench->alignment,
         bench->tolerance, bench->replicaRows, benchDispatchModes[bench->dispatchMode],
         benchCombineModes[bench->combineMode]);
  if (options->gate) {
    printf("# cost gate: on");
    if (options->linkBytesPerSecond > 0) printf(", link %g GB/s", options->linkBytesPerSecond / 1e9);
    if (options->rowSeconds > 0) printf(", row %g us", options->rowSeconds * 1e6);
    if (options->expertSeconds > 0) printf(", expert %g us", options->expertSeconds * 1e6);
    printf("\n");
  }
  if (options->gradsMode != ULTRAEP_GRADS_ORDERED)
    printf("# gradients of replicas are added %s\n", moeGradsModes[options->gradsMode]);
  if (options->slotGrads != MOE_SLOTS_LEAVE)
    printf("# gradients of replicas are cleared when they have been added\n");
  printf("# ideal: experts %s\n", options->ideal == WORKLOAD_IDEAL_RANDOM ? "drawn at random by each token"
                                                                          : "dealt so that all get the same");
  benchTrafficPrint(bench);
}

static void report_machine_print(const moeOptions_t *options, const benchMachine_t *machine) {
  if (machine->nDevices == 0) {
    printf(
        "# ranks are threads of the host, %ld CPUs: times here say little; products by a small loop in C\n",
        sysconf(_SC_NPROCESSORS_ONLN));
    return;
  }
  if (options->overlap) printf("# weights and gradients of replicas move beside products\n");
  printf("# ranks are %s on %d x %s, NCCL %d.%d.%d; copy rate %.1f GB/s read and written\n",
         options->bench.nProcesses > 1 ? "processes" : "threads", machine->nDevices, machine->device,
         machine->ncclVersion / 10000, machine->ncclVersion / 100 % 100, machine->ncclVersion % 100,
         machine->copyRate / 1e9);
  char each[64] = "one by one", pieces[32] = "";
  if (options->pieceRows > 0) snprintf(pieces, sizeof(pieces), ", of at most %d rows", options->pieceRows);
  if (options->nStreams > 1) snprintf(each, sizeof(each), "up to %d at a time", options->nStreams);
  printf(
      "# products: cuBLAS, %s%s; the host reads the rows of each expert once a layer, while dispatch runs\n",
      options->gemm == MOE_GEMM_GROUPED ? "grouped, weight gradients one by one" : each, pieces);
}

static void report_columns_print(void) {
  printf("#\n# %-10s %7s %7s %5s %8s %8s %8s %8s %8s %8s %8s %8s %8s %9s %10s %6s %8s %7s %7s %8s %8s %8s "
         "%8s %8s  %s\n",
         "run", "before", "after", "repl.", "route", "weights", "dispatch", "mlp", "combine", "disp.b",
         "mlp.b", "comb.b", "grads", "total", "tokens/s", "ideal", "speed-up", "GB", "J/1000", "out", "dx",
         "dW", "sample", "sums", "record");
  printf("# %-10s %7s %7s %5s %8s %8s %8s %8s %8s %8s %8s %8s %8s %9s %10s %6s %8s %7s %7s\n", "", "", "", "",
         "(ms)", "(ms)", "(ms)", "(ms)", "(ms)", "(ms)", "(ms)", "(ms)", "(ms)", "(ms)", "", "(%)", "", "",
         "tokens");
}

/* ---- lines ---- */

static int64_t report_tokens(const workload_t *workload) {
  int64_t tokens = 0;
  for (int32_t r = 0; r < workload->nRanks; r++) tokens += workload->nTokens[r];
  return tokens;
}

static double report_ratio(double above, double below) {
  return below > 0 ? above / below : 0;
}

static void report_distance_print(bool there, double distance) {
  if (there) {
    printf(" %8.1e", distance);
  } else {
    printf(" %8s", "-");
  }
}

static void report_check_print(const moeOptions_t *options, const moeCheck_t *check) {
  bool on = options->bench.check != 0;
  report_distance_print(on && check->compared, check->out);
  report_distance_print(on && check->compared, check->dx);
  report_distance_print(on && check->compared, check->grads);
  report_distance_print(on && check->sampled,
                        check->sampleOut > check->sampleDx ? check->sampleOut : check->sampleDx);
  report_distance_print(on, check->identity);
  if (check->bad) printf(" WRONG");
}

static double report_joules(const moeResult_t *result, int64_t tokens) {
  return report_ratio(result->millijoules, (double)tokens);
}

static void report_line_print(const moeReport_t *report, const workload_t *workload,
                              const moeResult_t *results, moeKind_t kind) {
  const moeResult_t *result = &results[kind];
  const double *seconds = result->seconds;
  int64_t tokens = report_tokens(workload);
  printf("  %-10s %7.4f %7.4f %5d", moeKindNames[kind], result->before, result->after, result->replicas);
  for (int phase = 0; phase < MOE_TOTAL; phase++) printf(" %8.3f", 1e3 * seconds[phase]);
  printf(" %9.3f %10.0f %6.1f %8.3f %7.2f", 1e3 * seconds[MOE_TOTAL],
         report_ratio((double)tokens, seconds[MOE_TOTAL]),
         100 * report_ratio(results[MOE_IDEAL].seconds[MOE_TOTAL], seconds[MOE_TOTAL]),
         report_ratio(results[MOE_UNBALANCED].seconds[MOE_TOTAL], seconds[MOE_TOTAL]),
         (double)result->memoryBytes / 1e9);
  if (result->millijoules >= 0) {
    printf(" %7.2f", report_joules(result, tokens));
  } else {
    printf(" %7s", "N/A");
  }
  report_check_print(report->options, &result->check);
  printf("  %s\n", workload->label);
  gatePrint(&result->gate);
}

/* ---- JSON ---- */

static json_t *report_check_make(const moeOptions_t *options, const moeCheck_t *check) {
  if (!options->bench.check) return json_null();
  json_t *made = json_pack("{s:b,s:f}", "okay", !check->bad, "sums", check->identity);
  if (made == NULL) return NULL;
  int status = 0;
  if (check->compared) {
    status |= json_object_set_new(made, "out", json_real(check->out));
    status |= json_object_set_new(made, "dx", json_real(check->dx));
    status |= json_object_set_new(made, "grads", json_real(check->grads));
  }
  if (check->sampled) {
    status |= json_object_set_new(made, "sample_out", json_real(check->sampleOut));
    status |= json_object_set_new(made, "sample_dx", json_real(check->sampleDx));
  }
  if (status == 0) return made;
  json_decref(made);
  return NULL;
}

/* Adds the phases' seconds; null, and the object is gone, without memory. */
static json_t *report_phases_add(json_t *object, const double *seconds) {
  for (int phase = 0; object != NULL && phase < MOE_PHASES; phase++) {
    if (json_object_set_new(object, moePhaseNames[phase], json_real(seconds[phase])) == 0) continue;
    json_decref(object);
    return NULL;
  }
  return object;
}

static json_t *report_rank_make(const moeRankFigures_t *figures) {
  double seconds[MOE_PHASES];
  for (int phase = 0; phase < MOE_PHASES; phase++)
    seconds[phase] = 1e-9 * (double)figures->nanoseconds[phase];
  return report_phases_add(
      json_pack("{s:I,s:I}", "rows", (json_int_t)figures->rows, "experts", (json_int_t)figures->experts),
      seconds);
}

/* Which rank is the slowest, and what it has to do. */
static json_t *report_ranks_make(const moeResult_t *result, int32_t nRanks) {
  json_t *made = json_array();
  for (int32_t r = 0; made != NULL && r < nRanks; r++) {
    if (json_array_append_new(made, report_rank_make(&result->ranks[r])) == 0) continue;
    json_decref(made);
    return NULL;
  }
  return made;
}

static json_t *report_line_make(const moeReport_t *report, const workload_t *workload,
                                const moeResult_t *results, moeKind_t kind) {
  const moeResult_t *result = &results[kind];
  double total = result->seconds[MOE_TOTAL];
  int64_t tokens = report_tokens(workload);
  return json_pack("{s:s,s:s,s:I,s:I,s:i,s:i,s:f,s:f,s:i,s:o,s:o,s:f,s:f,s:f,s:I,s:I,s:o,s:o,s:o}", "record",
                   workload->label, "run", moeKindNames[kind], "tokens", (json_int_t)tokens, "rows",
                   (json_int_t)workload->assignments, "experts", (int)workload->nExperts, "topk",
                   (int)workload->topK, "before", result->before, "after", result->after, "replicas",
                   (int)result->replicas, "seconds", report_phases_add(json_object(), result->seconds),
                   "ranks", report_ranks_make(result, workload->nRanks), "tokens_per_second",
                   report_ratio((double)tokens, total), "of_ideal",
                   report_ratio(results[MOE_IDEAL].seconds[MOE_TOTAL], total), "speed_up",
                   report_ratio(results[MOE_UNBALANCED].seconds[MOE_TOTAL], total), "memory_bytes",
                   (json_int_t)result->memoryBytes, "replica_bytes", (json_int_t)result->replicaBytes,
                   "joules_per_1000_tokens",
                   result->millijoules < 0 ? json_null() : json_real(report_joules(result, tokens)), "check",
                   report_check_make(report->options, &result->check), "gate", gateJson(&result->gate));
}

/* ---- all of it ---- */

int moeReportLines(moeReport_t *report, const workload_t *workload, const moeResult_t *results,
                   perfError_t *error) {
  if (report == NULL) return 0;
  const moeResult_t *balanced = &results[MOE_BALANCED];
  double total = balanced->seconds[MOE_TOTAL];
  double ofIdeal = report_ratio(results[MOE_IDEAL].seconds[MOE_TOTAL], total);
  for (int kind = 0; kind < MOE_KINDS; kind++) {
    report_line_print(report, workload, results, (moeKind_t)kind);
    report->bad += results[kind].check.bad;
    if (report->json != NULL &&
        benchJsonAppend(report->json, report_line_make(report, workload, results, (moeKind_t)kind), error) !=
            0)
      return -1;
  }
  fflush(stdout);
  report->ofIdeal += ofIdeal;
  if (report->records == 0 || ofIdeal < report->worstOfIdeal) report->worstOfIdeal = ofIdeal;
  report->speedUp += report_ratio(results[MOE_UNBALANCED].seconds[MOE_TOTAL], total);
  report->before += balanced->before;
  report->after += balanced->after;
  if (balanced->replicaBytes > report->replicaBytes) report->replicaBytes = balanced->replicaBytes;
  report->records++;
  return 0;
}

static json_t *report_tail_make(const moeReport_t *report, double records) {
  return json_pack("{s:{s:b,s:I,s:b},s:{s:I,s:f,s:f,s:f,s:f,s:f}}", "check", "done",
                   (int)report->options->bench.check, "wrong", (json_int_t)report->bad, "okay",
                   report->bad == 0, "mean", "records", (json_int_t)report->records, "of_ideal",
                   report->ofIdeal / records, "worst_of_ideal", report->worstOfIdeal, "speed_up",
                   report->speedUp / records, "before", report->before / records, "after",
                   report->after / records);
}

/* What slots take beyond the weights and gradients that they have room for. */
static void report_replica_memory_print(const moeReport_t *report) {
  const benchOptions_t *bench = &report->options->bench;
  double slot = 18.0 * bench->hidden * report->options->inter, slots = slot * bench->nSlots;
  double there = (double)report->replicaBytes / bench->nRanks;
  printf("# memory for replicas, a rank: %.2f MB: %d slots of %.2f MB, and %.3f %% more\n", there / 1e6,
         bench->nSlots, slot / 1e6, 100 * report_ratio(there - slots, slots));
}

int moeReportFinish(moeReport_t *report, perfError_t *error) {
  if (report == NULL) return 0;
  double records = report->records == 0 ? 1 : (double)report->records;
  printf(
      "#\n# %lld records: mean imbalance %.4f -> %.4f; balanced: mean %.1f %% of ideal (worst %.1f %%), mean "
      "speed-up %.3f over unbalanced\n",
      (long long)report->records, report->before / records, report->after / records,
      100 * report->ofIdeal / records, 100 * report->worstOfIdeal, report->speedUp / records);
  report_replica_memory_print(report);
  if (report->options->bench.check) {
    printf("# check: %lld runs wrong %s\n", (long long)report->bad, report->bad == 0 ? "OK" : "FAILED");
  } else {
    printf("# check: none\n");
  }
  if (report->json != NULL && benchJsonWrite(report->json, report_tail_make(report, records), error) != 0)
    return -1;
  if (fflush(stdout) != 0 || ferror(stdout)) return perfErrorSet(error, "stdout: cannot be written");
  return 0;
}

static json_t *report_config_make(const moeOptions_t *options) {
  const benchOptions_t *bench = &options->bench;
  return json_pack(
      "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:f,s:i,s:s,s:s,s:s,s:b,s:i,s:i,s:b,s:i}", "nthreads",
      (int)bench->nRanks, "tokens", (int)bench->nTokens, "hidden", (int)bench->hidden, "inter",
      (int)options->inter, "layers", (int)options->nLayers, "slots", (int)bench->nSlots, "domain",
      (int)bench->nDomainRanks, "alignment", (int)bench->alignment, "warmup_iters", (int)bench->warmupIters,
      "iterations", (int)bench->iters, "validation", (int)bench->check, "tolerance", bench->tolerance,
      "replica_rows", (int)bench->replicaRows, "dispatch_mode", benchDispatchModes[bench->dispatchMode],
      "combine_mode", benchCombineModes[bench->combineMode], "gemm", moeGemmModes[options->gemm], "gate",
      (int)options->gate, "streams", (int)options->nStreams, "piece_rows", (int)options->pieceRows, "overlap",
      (int)options->overlap, "expert_ctas", (int)options->expertCtas);
}

static int report_json_open(moeReport_t *report, int argc, char **argv, perfError_t *error) {
  const moeOptions_t *options = report->options;
  if (benchJsonOpen(&report->json, &options->bench, report->machine, argc, argv, error) != 0) return -1;
  if (report->json == NULL) return 0;
  return benchJsonSet(report->json, "config", report_config_make(options), error);
}

int moeReportOpen(moeReport_t **report, const moeOptions_t *options, const benchMachine_t *machine, int argc,
                  char **argv, perfError_t *error) {
  moeReport_t *opened = calloc(1, sizeof(*opened));
  if (opened == NULL) return perfErrorSet(error, "no memory for the report");
  opened->options = options;
  opened->machine = machine;
  if (report_json_open(opened, argc, argv, error) != 0) {
    moeReportDestroy(opened);
    return -1;
  }
  report_layer_print(options);
  report_machine_print(options, machine);
  report_columns_print();
  *report = opened;
  return 0;
}

void moeReportDestroy(moeReport_t *report) {
  if (report == NULL) return;
  benchJsonDestroy(report->json);
  free(report);
}
