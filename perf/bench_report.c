#include "bench.h"

#include "rows.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Sums over the lines of one balance setting. */
typedef struct {
  int64_t lines;
  double before, after, worstAfter, replicas;
  double us[BENCH_PHASES];
  double busBandwidth; /* dispatch and combine of each line */
  double movedBytes, copiedBytes;
} benchSums_t;

struct benchReport {
  const benchOptions_t *options;
  bool terminal; /* stderr is one */
  bool progress; /* a progress line stands on it */
  double started;
  int64_t wrong;
  perfError_t fault;
  benchSums_t sums[2]; /* balance 0 and 1 */
  json_t *json;        /* null: none */
  json_t *results;     /* array in json */
};

/* ---- header ---- */

static void bench_time_format(char *text, size_t size) {
  struct tm parts;
  time_t now = time(NULL);
  localtime_r(&now, &parts);
  strftime(text, size, "%Y-%m-%d %H:%M:%S", &parts);
}

static void bench_traffic_print(const benchOptions_t *options) {
  if (options->tracePath != NULL) {
    printf("# traffic: load trace %s, top-%d", options->tracePath, options->topK);
  } else if (options->routingPath != NULL) {
    printf("# traffic: routing trace %s", options->routingPath);
  } else {
    printf("# traffic: zipf, imbalance %g, top-%d of %d experts, seed %lld", options->skew, options->topK,
           options->nExperts, (long long)options->seed);
  }
  if (options->nTokens >= 0) printf(", %d tokens a rank", options->nTokens);
  printf("\n");
}

static void bench_header_print(const benchOptions_t *options) {
  char host[128] = "";
  gethostname(host, sizeof(host) - 1);
  printf("# ultraep_perf version %d.%d.%d\n", ULTRAEP_VERSION_MAJOR, ULTRAEP_VERSION_MINOR,
         ULTRAEP_VERSION_PATCH);
  printf("# Collective test starting: ultraep_perf\n");
  printf("# nThread %d minBytes %lld maxBytes %lld step: %d(factor) warmup iters: %d iters: %d agg iters: %d "
         "validation: %d\n",
         options->nRanks, (long long)options->minBytes, (long long)options->maxBytes, options->stepFactor,
         options->warmupIters, options->iters, options->aggIters, options->check);
  printf("# hidden %d, slots %d, domain %d, align %d, tolerance %g, dispatch %s, combine %s\n",
         options->hidden, options->nSlots, options->nDomainRanks, options->alignment, options->tolerance,
         benchDispatchModes[options->dispatchMode], benchCombineModes[options->combineMode]);
  bench_traffic_print(options);
  printf("#\n# Using devices\n#  Ranks 0-%d Pid %6ld on %10s threads of the host, %ld CPUs\n#\n",
         options->nRanks - 1, (long)getpid(), host, sysconf(_SC_NPROCESSORS_ONLN));
  printf("# %10s %11s %8s %7s %8s %8s %8s %8s %8s  %8s %6s %6s  %8s %6s %6s %6s  %s\n", "size", "count",
         "type", "balance", "before", "after", "replicas", "route", "weights", "dispatch", "algbw", "busbw",
         "combine", "algbw", "busbw", "#wrong", "record");
  printf("# %10s %11s %8s %7s %8s %8s %8s %8s %8s  %8s %6s %6s  %8s %6s %6s %6s\n", "(B)", "(elements)", "",
         "", "max/mean", "max/mean", "", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "(us)", "(GB/s)",
         "(GB/s)", "");
}

/* ---- JSON ---- */

static json_t *bench_json_config(const benchOptions_t *options) {
  return json_pack(
      "{s:i,s:I,s:I,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:f,s:s,s:s}", "nthreads", (int)options->nRanks,
      "minimum_bytes", (json_int_t)options->minBytes, "maximum_bytes", (json_int_t)options->maxBytes,
      "step_factor", (int)options->stepFactor, "warmup_iters", (int)options->warmupIters, "iterations",
      (int)options->iters, "aggregated_iterations", (int)options->aggIters, "validation", (int)options->check,
      "hidden", (int)options->hidden, "slots", (int)options->nSlots, "domain", (int)options->nDomainRanks,
      "alignment", (int)options->alignment, "tolerance", options->tolerance, "dispatch_mode",
      benchDispatchModes[options->dispatchMode], "combine_mode", benchCombineModes[options->combineMode]);
}

static int bench_json_open(benchReport_t *report, int argc, char **argv, perfError_t *error) {
  char now[64];
  if (report->options->jsonPath == NULL) return 0;
  json_t *arguments = json_array();
  for (int i = 0; i < argc; i++) json_array_append_new(arguments, json_string(argv[i]));
  report->results = json_array();
  bench_time_format(now, sizeof(now));
  report->json = json_pack("{s:i,s:s,s:o,s:o,s:O}", "version", 1, "start_time", now, "args", arguments,
                           "config", bench_json_config(report->options), "results", report->results);
  if (report->json == NULL) return perfErrorSet(error, "no memory for the JSON document");
  return 0;
}

static json_t *bench_json_operation(double us, double bytes, int32_t nRanks) {
  double algorithm = us > 0 ? bytes / us / 1e3 : 0;
  return json_pack("{s:f,s:f,s:f}", "time", us, "alg_bw", algorithm, "bus_bw",
                   algorithm * (nRanks - 1) / nRanks);
}

static int bench_json_line(benchReport_t *report, const workload_t *workload, bool balance, int64_t size,
                           int64_t count, const benchResult_t *result, perfError_t *error) {
  if (report->json == NULL) return 0;
  int32_t nRanks = workload->nRanks;
  json_t *line = json_pack(
      "{s:I,s:I,s:s,s:s,s:i,s:i,s:I,s:i,s:i,s:f,s:f,s:i,s:f,s:f,s:o,s:o,s:f,s:I,s:I,s:{s:I,s:I,s:I}}", "size",
      (json_int_t)size, "count", (json_int_t)count, "type", rowTypeName(report->options->dataType), "record",
      workload->label, "balance", (int)balance, "tokens", (int)workload->nominalTokens, "rows",
      (json_int_t)result->rows, "experts", (int)workload->nExperts, "topk", (int)workload->topK, "before",
      result->before, "after", result->after, "replicas", (int)result->replicas, "route_us",
      result->us[BENCH_ROUTE], "weights_us", result->us[BENCH_WEIGHTS], "dispatch",
      bench_json_operation(result->us[BENCH_DISPATCH],
                           (double)result->maxRows * (double)result->dispatchRowBytes, nRanks),
      "combine",
      bench_json_operation(result->us[BENCH_COMBINE],
                           (double)result->maxRows * (double)result->combineRowBytes, nRanks),
      "memcpy_us", result->us[BENCH_COPY], "memcpy_bytes", (json_int_t)result->copyBytes, "nwrong",
      (json_int_t)result->wrong, "link_bytes", "dispatch", (json_int_t)result->linkBytes[BENCH_DISPATCH],
      "combine", (json_int_t)result->linkBytes[BENCH_COMBINE], "weights",
      (json_int_t)result->linkBytes[BENCH_WEIGHTS]);
  if (line == NULL || json_array_append_new(report->results, line) != 0) {
    return perfErrorSet(error, "no memory for the JSON document");
  }
  return 0;
}

static int bench_json_finish(benchReport_t *report, double busBandwidth, perfError_t *error) {
  char now[64];
  if (report->json == NULL) return 0;
  bench_time_format(now, sizeof(now));
  json_t *tail =
      json_pack("{s:{s:I,s:b},s:{s:f},s:s}", "out_of_bounds", "count", (json_int_t)report->wrong, "okay",
                report->wrong == 0, "average_bus_bandwidth", "bandwidth", busBandwidth, "end_time", now);
  if (tail == NULL || json_object_update(report->json, tail) != 0) {
    json_decref(tail);
    return perfErrorSet(error, "no memory for the JSON document");
  }
  json_decref(tail);
  if (json_dump_file(report->json, report->options->jsonPath, JSON_INDENT(1) | JSON_REAL_PRECISION(10)) !=
      0) {
    return perfErrorSet(error, "%s: cannot be written: %s", report->options->jsonPath, strerror(errno));
  }
  return 0;
}

/* ---- lines ---- */

void benchReportProgress(benchReport_t *report, const workload_t *workload, bool balance) {
  double elapsed = perfSeconds() - report->started;
  int64_t lines = report->sums[0].lines + report->sums[1].lines;
  if (!report->terminal || elapsed < 1) return;
  fprintf(stderr, "\r\033[K%lld done in %.0f s, now %s, %d tokens a rank, balance %d", (long long)lines,
          elapsed, workload->label, workload->nominalTokens, balance);
  report->progress = true;
}

static void bench_progress_clear(benchReport_t *report) {
  if (report->progress) fprintf(stderr, "\r\033[K");
  report->progress = false;
}

/* A number in seven columns, with as many decimals as fit. */
static void bench_number_print(double value, int width) {
  int decimals = value < 1000 ? 2 : value < 10000 ? 1 : 0;
  printf(" %*.*f", width, decimals, value);
}

/* time algbw busbw; returns busbw. bytes: of the busiest rank. */
static double bench_operation_print(double us, double bytes, int32_t nRanks) {
  double algorithm = us > 0 ? bytes / us / 1e3 : 0;
  double bus = algorithm * (nRanks - 1) / nRanks;
  printf(" ");
  bench_number_print(us, 8);
  bench_number_print(algorithm, 6);
  bench_number_print(bus, 6);
  return bus;
}

static void bench_sums_add(benchSums_t *sums, const benchResult_t *result, double busBandwidth) {
  sums->lines++;
  sums->before += result->before;
  sums->after += result->after;
  sums->replicas += result->replicas;
  if (result->after > sums->worstAfter) sums->worstAfter = result->after;
  for (int phase = 0; phase < BENCH_PHASES; phase++) sums->us[phase] += result->us[phase];
  sums->busBandwidth += busBandwidth;
  sums->movedBytes += (double)result->rows * (double)(result->dispatchRowBytes + result->combineRowBytes);
  sums->copiedBytes += (double)result->copyBytes;
}

int benchReportLine(benchReport_t *report, const workload_t *workload, bool balance,
                    const benchResult_t *result, perfError_t *error) {
  const benchOptions_t *options = report->options;
  int64_t count = (int64_t)workload->nominalTokens * options->hidden;
  int64_t size = (int64_t)workload->nominalTokens * (int64_t)result->dispatchRowBytes;
  bench_progress_clear(report);
  printf("  %10lld %11lld %8s %7d %8.4f %8.4f %8d", (long long)size, (long long)count,
         rowTypeName(options->dataType), balance, result->before, result->after, result->replicas);
  bench_number_print(result->us[BENCH_ROUTE], 8);
  bench_number_print(result->us[BENCH_WEIGHTS], 8);
  double bus =
      bench_operation_print(result->us[BENCH_DISPATCH],
                            (double)result->maxRows * (double)result->dispatchRowBytes, workload->nRanks);
  bus += bench_operation_print(result->us[BENCH_COMBINE],
                               (double)result->maxRows * (double)result->combineRowBytes, workload->nRanks);
  if (options->check) {
    printf(" %6lld  %s\n", (long long)result->wrong, workload->label);
  } else {
    printf(" %6s  %s\n", "N/A", workload->label);
  }
  fflush(stdout);
  bench_sums_add(&report->sums[balance], result, bus);
  report->wrong += result->wrong;
  if (report->fault.text[0] == '\0') report->fault = result->fault;
  return bench_json_line(report, workload, balance, size, count, result, error);
}

/* ---- end ---- */

static void bench_sums_print(const benchSums_t *sums, int balance, int32_t nRanks) {
  if (sums->lines == 0) return;
  double lines = (double)sums->lines;
  printf("# balance %d: %lld lines, mean imbalance %.4f -> %.4f (worst %.4f), %.1f replicas; mean us: route "
         "%.1f, "
         "weights %.1f, dispatch %.1f, combine %.1f\n",
         balance, (long long)sums->lines, sums->before / lines, sums->after / lines, sums->worstAfter,
         sums->replicas / lines, sums->us[BENCH_ROUTE] / lines, sums->us[BENCH_WEIGHTS] / lines,
         sums->us[BENCH_DISPATCH] / lines, sums->us[BENCH_COMBINE] / lines);
  double moveUs = sums->us[BENCH_DISPATCH] + sums->us[BENCH_COMBINE], copyUs = sums->us[BENCH_COPY];
  if (moveUs <= 0 || copyUs <= 0 || sums->copiedBytes <= 0) return;
  double moved = sums->movedBytes / moveUs / 1e3, copied = sums->copiedBytes / copyUs / 1e3;
  printf("# balance %d: dispatch + combine move %.2f GB/s, memcpy by %d threads %.2f GB/s: ratio %.3f\n",
         balance, moved, nRanks, copied, moved / copied);
}

int benchReportFinish(benchReport_t *report, int64_t *wrong, perfError_t *error) {
  const benchSums_t *sums = report->sums;
  double lines = (double)(sums[0].lines + sums[1].lines);
  double bus = lines == 0 ? 0 : (sums[0].busBandwidth + sums[1].busBandwidth) / (2 * lines);
  bench_progress_clear(report);
  printf("#\n");
  for (int balance = 0; balance < 2; balance++)
    bench_sums_print(&sums[balance], balance, report->options->nRanks);
  if (report->fault.text[0] != '\0') printf("# first fault: %s\n", report->fault.text);
  printf("# %-20s : %lld %s\n", "Out of bounds values", (long long)report->wrong,
         report->wrong ? "FAILED" : "OK");
  printf("# %-20s : %g\n#\n", "Avg bus bandwidth", bus);
  printf("# Collective test concluded: ultraep_perf\n#\n");
  *wrong = report->wrong;
  if (bench_json_finish(report, bus, error) != 0) return -1;
  if (fflush(stdout) != 0 || ferror(stdout)) return perfErrorSet(error, "stdout: cannot be written");
  return 0;
}

int benchReportOpen(benchReport_t **report, const benchOptions_t *options, int argc, char **argv,
                    perfError_t *error) {
  benchReport_t *opened = calloc(1, sizeof(*opened));
  if (opened == NULL) return perfErrorSet(error, "no memory for the report");
  opened->options = options;
  opened->terminal = isatty(STDERR_FILENO);
  opened->started = perfSeconds();
  if (bench_json_open(opened, argc, argv, error) != 0) {
    benchReportDestroy(opened);
    return -1;
  }
  bench_header_print(options);
  *report = opened;
  return 0;
}

void benchReportDestroy(benchReport_t *report) {
  if (report == NULL) return;
  bench_progress_clear(report);
  json_decref(report->json);
  json_decref(report->results);
  free(report);
}
