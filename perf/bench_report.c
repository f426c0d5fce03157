#include "bench.h"
#include "bench_json.h"
#include "rows.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Sums over the lines of one balance setting. */
typedef struct {
  int64_t lines;
  double before, after, worstAfter, replicas;
  double us[BENCH_PHASES];
  double busBandwidth; /* dispatch and combine of each line */
  double movedBytes, copiedBytes;
  double dispatchFloor, combineFloor, weightsFloor, gradsFloor; /* us */
  double busiestBytes[BENCH_PHASES];
  bool busiestUnknown;
} benchSums_t;

struct benchReport {
  const benchOptions_t *options;
  const benchMachine_t *machine;
  bool terminal; /* stderr is one */
  bool progress; /* a progress line stands on it */
  double started;
  int64_t wrong;
  perfError_t fault;
  benchSums_t sums[2];                          /* balance 0 and 1 */
  int64_t windowBytes, privateBytes, slotBytes; /* the most of any line */
  benchJson_t *json;
};

/* ---- header ---- */

static void bench_host_print(const benchOptions_t *options) {
  char host[128] = "";
  gethostname(host, sizeof(host) - 1);
  printf("#\n# Using devices\n#  Ranks 0-%d Pid %6ld on %10s threads of the host, %ld CPUs\n#\n",
         options->nRanks - 1, (long)getpid(), host, sysconf(_SC_NPROCESSORS_ONLN));
}

static void bench_gpus_print(const benchOptions_t *options, const benchMachine_t *machine) {
  char host[128] = "", ctas[32] = "the library's choice of";
  int32_t sharing = (options->nRanks + machine->nDevices - 1) / machine->nDevices;
  gethostname(host, sizeof(host) - 1);
  if (options->maxCtas > 0) snprintf(ctas, sizeof(ctas), "%d", options->maxCtas);
  printf("#\n# Using devices\n#  Ranks 0-%d Pid %6ld on %10s %s, devices used: %d [%s], NCCL %d.%d.%d\n",
         options->nRanks - 1, (long)getpid(), host, options->nProcesses > 1 ? "processes" : "threads",
         machine->nDevices, machine->device, machine->ncclVersion / 10000, machine->ncclVersion / 100 % 100,
         machine->ncclVersion % 100);
  printf("# %s SMs a rank, calls %s\n", ctas,
         options->graph ? "captured in CUDA graphs" : "enqueued one by one");
  printf("# copy rate: %.1f GB/s read and written, one GPU within its memory, in this run\n",
         machine->copyRate / 1e9);
  if (sharing > 1) {
    printf("# %d ranks share a GPU: the figures measure kernels and memory, not NVLink%s\n", sharing,
           options->nProcesses > 1 ? "; without CUDA MPS the processes take turns" : "");
  } else {
    printf("# each rank has a GPU of its own: links are slower than the memory that floor counts\n");
  }
  printf("# GPU memory of NCCL's communicators: %.2f GB, all ranks together\n#\n",
         (double)machine->commBytes / 1e9);
}

/* The columns of a table that only GPUs have: names, then units. */
static void bench_gpu_columns_print(const benchOptions_t *options, bool names) {
  if (names) {
    printf(" %8s %8s %5s %8s %5s %7s", "route+d", "floor", "disp.", "floor", "comb.", "GPU");
  } else {
    printf(" %8s %8s %5s %8s %5s %7s", "(us)", "(us)", "(%)", "(us)", "(%)", "(GB)");
  }
  if (options->baseline == BENCH_BASELINE_NONE) return;
  if (names) {
    printf(" %8s %6s %8s %6s", "base d.", "x", "base c.", "x");
  } else {
    printf(" %8s %6s %8s %6s", "(us)", "", "(us)", "");
  }
}

static void bench_columns_print(const benchOptions_t *options, const benchMachine_t *machine) {
  bool gpu = machine->nDevices > 0;
  printf("# %10s %11s %8s %7s %8s %8s %8s %8s %8s  %8s %6s %6s  %8s %6s %6s %6s", "size", "count", "type",
         "balance", "before", "after", "replicas", "route", "weights", "dispatch", "algbw", "busbw",
         "combine", "algbw", "busbw", "#wrong");
  if (gpu) bench_gpu_columns_print(options, true);
  if (options->grads != BENCH_GRADS_NONE) printf(" %8s", "grads");
  printf("  %s\n# %10s %11s %8s %7s %8s %8s %8s %8s %8s  %8s %6s %6s  %8s %6s %6s %6s", "record", "(B)",
         "(elements)", "", "", "max/mean", "max/mean", "", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "(us)",
         "(GB/s)", "(GB/s)", "");
  if (gpu) bench_gpu_columns_print(options, false);
  if (options->grads != BENCH_GRADS_NONE) printf(" %8s", "(us)");
  printf("\n");
}

static void bench_header_print(const benchOptions_t *options, const benchMachine_t *machine) {
  printf("# ultraep_perf version %d.%d.%d\n", ULTRAEP_VERSION_MAJOR, ULTRAEP_VERSION_MINOR,
         ULTRAEP_VERSION_PATCH);
  printf("# Collective test starting: ultraep_perf\n");
  printf("# nThread %d minBytes %lld maxBytes %lld step: %d(factor) warmup iters: %d iters: %d agg iters: %d "
         "validation: %d\n",
         options->nRanks, (long long)options->minBytes, (long long)options->maxBytes, options->stepFactor,
         options->warmupIters, options->iters, options->aggIters, options->check);
  printf(
      "# hidden %d, slots %d, domain %d, align %d, tolerance %g, replica rows %d, dispatch %s, combine %s\n",
      options->hidden, options->nSlots, options->nDomainRanks, options->alignment, options->tolerance,
      options->replicaRows, benchDispatchModes[options->dispatchMode],
      benchCombineModes[options->combineMode]);
  if (options->gateBytes == 0) {
    printf("# cost gate: off (--gate-bytes 0)\n");
  } else {
    printf("# cost gate: %.2f MB an expert, rates by the library\n", 1e-6 * (double)options->gateBytes);
  }
  benchTrafficPrint(options);
  if (machine->nDevices > 0) {
    bench_gpus_print(options, machine);
  } else {
    bench_host_print(options);
  }
  bench_columns_print(options, machine);
}

/* ---- lines ---- */

void benchReportProgress(benchReport_t *report, const workload_t *workload, bool balance) {
  if (report == NULL) return;
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

/* Microseconds for moving so many bytes at the rate of a copy, on all GPUs at once. */
static double bench_floor(const benchMachine_t *machine, int64_t bytes) {
  double rate = machine->copyRate * machine->nDevices;
  return rate > 0 ? (double)bytes / rate * 1e6 : 0;
}

static double bench_ratio(double above, double below) {
  return below > 0 ? above / below : 0;
}

/* The columns that only GPUs have. */
static void bench_gpu_line_print(const benchReport_t *report, const benchResult_t *result) {
  const double *us = result->us;
  double dispatch = bench_floor(report->machine, result->dispatchMoved);
  double combine = bench_floor(report->machine, result->combineMoved);
  bench_number_print(us[BENCH_STEP], 8);
  bench_number_print(dispatch, 8);
  printf(" %5.1f", 100 * bench_ratio(dispatch, us[BENCH_DISPATCH]));
  bench_number_print(combine, 8);
  printf(" %5.1f %7.2f", 100 * bench_ratio(combine, us[BENCH_COMBINE]), (double)result->gpuBytes / 1e9);
  if (report->options->baseline == BENCH_BASELINE_NONE) return;
  bench_number_print(us[BENCH_BASE_DISPATCH], 8);
  printf(" %6.2f", bench_ratio(us[BENCH_BASE_DISPATCH], us[BENCH_DISPATCH]));
  bench_number_print(us[BENCH_BASE_COMBINE], 8);
  printf(" %6.2f", bench_ratio(us[BENCH_BASE_COMBINE], us[BENCH_COMBINE]));
}

static void bench_sums_add(benchSums_t *sums, const benchMachine_t *machine, const benchResult_t *result,
                           double busBandwidth) {
  sums->lines++;
  sums->before += result->before;
  sums->after += result->after;
  sums->replicas += result->replicas;
  if (result->after > sums->worstAfter) sums->worstAfter = result->after;
  for (int phase = 0; phase < BENCH_PHASES; phase++) sums->us[phase] += result->us[phase];
  sums->busBandwidth += busBandwidth;
  sums->movedBytes += (double)result->rows * (double)(result->dispatchRowBytes + result->combineRowBytes);
  sums->copiedBytes += (double)result->copyBytes;
  sums->dispatchFloor += bench_floor(machine, result->dispatchMoved);
  sums->combineFloor += bench_floor(machine, result->combineMoved);
  sums->weightsFloor += bench_floor(machine, result->weightsMoved);
  sums->gradsFloor += bench_floor(machine, result->gradsMoved);
  for (int phase = BENCH_DISPATCH; phase <= BENCH_COMBINE; phase++) {
    sums->busiestBytes[phase] += (double)result->busiestBytes[phase];
    if (result->busiestBytes[phase] < 0) sums->busiestUnknown = true;
  }
}

int benchReportLine(benchReport_t *report, const workload_t *workload, bool balance,
                    const benchResult_t *result, perfError_t *error) {
  if (report == NULL) return 0;
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
    printf(" %6lld", (long long)result->wrong);
  } else {
    printf(" %6s", "N/A");
  }
  if (report->machine->nDevices > 0) bench_gpu_line_print(report, result);
  if (options->grads != BENCH_GRADS_NONE) bench_number_print(result->us[BENCH_GRADS], 8);
  printf("  %s\n", workload->label);
  gatePrint(&result->gate);
  fflush(stdout);
  bench_sums_add(&report->sums[balance], report->machine, result, bus);
  if (result->windowBytes > report->windowBytes) report->windowBytes = result->windowBytes;
  if (result->slotBytes > report->slotBytes) report->slotBytes = result->slotBytes;
  if (result->privateBytes > report->privateBytes) report->privateBytes = result->privateBytes;
  report->wrong += result->wrong;
  if (report->fault.text[0] == '\0') report->fault = result->fault;
  return benchJsonLine(report->json, workload, balance, size, count, result, error);
}

/* ---- end ---- */

/* What dispatch and combine move, beside what a plain copy does. */
static void bench_host_sums_print(const benchSums_t *sums, int balance, int32_t nRanks) {
  double moveUs = sums->us[BENCH_DISPATCH] + sums->us[BENCH_COMBINE], copyUs = sums->us[BENCH_COPY];
  if (moveUs <= 0 || copyUs <= 0 || sums->copiedBytes <= 0) return;
  double moved = sums->movedBytes / moveUs / 1e3, copied = sums->copiedBytes / copyUs / 1e3;
  printf("# balance %d: dispatch + combine move %.2f GB/s, memcpy by %d threads %.2f GB/s: ratio %.3f\n",
         balance, moved, nRanks, copied, moved / copied);
}

/* What replicas' weights and gradients take, beside what a plain copy of their bytes does. */
static void bench_replicas_print(const benchSums_t *sums, int balance) {
  const double *us = sums->us;
  if (sums->weightsFloor <= 0) return;
  printf("# balance %d: of the copy rate: weights %.1f %%", balance,
         100 * bench_ratio(sums->weightsFloor, us[BENCH_WEIGHTS]));
  if (sums->gradsFloor > 0)
    printf(", gradients %.1f %%, in %.1f us", 100 * bench_ratio(sums->gradsFloor, us[BENCH_GRADS]),
           us[BENCH_GRADS] / (double)sums->lines);
  printf("\n");
}

static void bench_gpu_sums_print(const benchReport_t *report, const benchSums_t *sums, int balance) {
  const double *us = sums->us;
  double floor = sums->dispatchFloor + sums->combineFloor, moveUs = us[BENCH_DISPATCH] + us[BENCH_COMBINE];
  double rate = report->machine->copyRate * report->machine->nDevices / 1e9;
  printf("# balance %d: mean us: route + dispatch %.1f; of the copy rate: dispatch %.1f %%, route + dispatch "
         "%.1f %%, combine %.1f %%\n",
         balance, us[BENCH_STEP] / (double)sums->lines,
         100 * bench_ratio(sums->dispatchFloor, us[BENCH_DISPATCH]),
         100 * bench_ratio(sums->dispatchFloor, us[BENCH_STEP]),
         100 * bench_ratio(sums->combineFloor, us[BENCH_COMBINE]));
  bench_replicas_print(sums, balance);
  if (!sums->busiestUnknown) {
    printf("# balance %d: busiest link, bytes of one call: dispatch %.0f, combine %.0f\n", balance,
           sums->busiestBytes[BENCH_DISPATCH] / (double)sums->lines,
           sums->busiestBytes[BENCH_COMBINE] / (double)sums->lines);
  }
  if (report->options->baseline != BENCH_BASELINE_NONE) {
    printf(
        "# balance %d: ncclSend and ncclRecv of the same rows: dispatch %.1f us, %.2f x ours; combine %.1f "
        "us, %.2f x ours\n",
        balance, us[BENCH_BASE_DISPATCH] / (double)sums->lines,
        bench_ratio(us[BENCH_BASE_DISPATCH], us[BENCH_DISPATCH]),
        us[BENCH_BASE_COMBINE] / (double)sums->lines, bench_ratio(us[BENCH_BASE_COMBINE], us[BENCH_COMBINE]));
  }
  printf("# balance %d: dispatch + combine move %.2f GB/s read and written, a copy %.2f GB/s: ratio %.3f\n",
         balance, bench_ratio(floor, moveUs) * rate, rate, bench_ratio(floor, moveUs));
}

static void bench_sums_print(const benchReport_t *report, int balance) {
  const benchSums_t *sums = &report->sums[balance];
  if (sums->lines == 0) return;
  double lines = (double)sums->lines;
  printf("# balance %d: %lld lines, mean imbalance %.4f -> %.4f (worst %.4f), %.1f replicas; mean us: route "
         "%.1f, weights %.1f, dispatch %.1f, combine %.1f\n",
         balance, (long long)sums->lines, sums->before / lines, sums->after / lines, sums->worstAfter,
         sums->replicas / lines, sums->us[BENCH_ROUTE] / lines, sums->us[BENCH_WEIGHTS] / lines,
         sums->us[BENCH_DISPATCH] / lines, sums->us[BENCH_COMBINE] / lines);
  if (report->machine->nDevices > 0) {
    bench_gpu_sums_print(report, sums, balance);
  } else {
    bench_host_sums_print(sums, balance, report->options->nRanks);
  }
}

/* What balancing and this library gain together over what a user has without them. */
static void bench_gain_print(const benchReport_t *report) {
  const benchSums_t *plain = &report->sums[0], *balanced = &report->sums[1];
  if (report->options->baseline == BENCH_BASELINE_NONE || plain->lines == 0 || balanced->lines == 0) return;
  printf("# balance 1 against ncclSend and ncclRecv of balance 0: dispatch %.2f x, route + dispatch %.2f x, "
         "combine %.2f x\n",
         bench_ratio(plain->us[BENCH_BASE_DISPATCH], balanced->us[BENCH_DISPATCH]),
         bench_ratio(plain->us[BENCH_BASE_DISPATCH], balanced->us[BENCH_STEP]),
         bench_ratio(plain->us[BENCH_BASE_COMBINE], balanced->us[BENCH_COMBINE]));
}

int benchReportFinish(benchReport_t *report, perfError_t *error) {
  if (report == NULL) return 0;
  const benchSums_t *sums = report->sums;
  double lines = (double)(sums[0].lines + sums[1].lines);
  double bus = lines == 0 ? 0 : (sums[0].busBandwidth + sums[1].busBandwidth) / (2 * lines);
  bench_progress_clear(report);
  printf("#\n");
  for (int balance = 0; balance < 2; balance++) bench_sums_print(report, balance);
  bench_gain_print(report);
  if (report->machine->nDevices > 0) {
    printf("# memory of a group on one rank, at most: window %.1f MB, private %.1f MB, slots %.1f MB\n",
           (double)report->windowBytes / 1e6, (double)report->privateBytes / 1e6,
           (double)report->slotBytes / 1e6);
  }
  if (report->fault.text[0] != '\0') printf("# first fault: %s\n", report->fault.text);
  printf("# %-20s : %lld %s\n", "Out of bounds values", (long long)report->wrong,
         report->wrong ? "FAILED" : "OK");
  printf("# %-20s : %g\n#\n", "Avg bus bandwidth", bus);
  printf("# Collective test concluded: ultraep_perf\n#\n");
  if (benchJsonFinish(report->json, report->wrong, bus, error) != 0) return -1;
  if (fflush(stdout) != 0 || ferror(stdout)) return perfErrorSet(error, "stdout: cannot be written");
  return 0;
}

int benchReportOpen(benchReport_t **report, const benchOptions_t *options, const benchMachine_t *machine,
                    int argc, char **argv, perfError_t *error) {
  benchReport_t *opened = calloc(1, sizeof(*opened));
  if (opened == NULL) return perfErrorSet(error, "no memory for the report");
  opened->options = options;
  opened->machine = machine;
  opened->terminal = isatty(STDERR_FILENO);
  opened->started = perfSeconds();
  if (benchJsonOpen(&opened->json, options, machine, argc, argv, error) != 0) {
    benchReportDestroy(opened);
    return -1;
  }
  bench_header_print(options, machine);
  *report = opened;
  return 0;
}

void benchReportDestroy(benchReport_t *report) {
  if (report == NULL) return;
  bench_progress_clear(report);
  benchJsonDestroy(report->json);
  free(report);
}
