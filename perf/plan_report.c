#include "plan_tool.h"

#include "chart.h"

#include <errno.h>
#include <jansson.h>
#include <langinfo.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The most skewed record so far, for the chart. */
typedef struct {
  planFigures_t figures;
  int32_t nRanks;
  int64_t *before; /* [R] */
  int64_t *after;  /* [R] */
} planShown_t;

struct planReport {
  const planOptions_t *options;
  FILE *json; /* null: none */
  bool table; /* stdout carries the table */
  int64_t nRecords;
  planFigures_t sum;
  planFigures_t worst; /* maxima */
  planCostSums_t cost;
  planShown_t shown;
};

/* ---- table ---- */

static void plan_table_open(const planOptions_t *options) {
  printf(
      "# ultraep_plan: %d ranks, %d slots a rank, domain %d, tolerance %g, replica rows %d, cost gate %s\n",
      options->nRanks, options->nSlots, options->nDomainRanks == 0 ? options->nRanks : options->nDomainRanks,
      options->tolerance, options->replicaRows, options->gate == PLAN_GATE_OFF ? "off" : "on");
  if (options->tracePath != NULL) {
    printf("# %s\n", options->tracePath);
  } else {
    printf("# zipf: ratio %g, %d experts, top-%d, %d tokens a rank, seed %lld\n", options->zipfRatio,
           options->nExperts, options->topK, options->nTokens, (long long)options->seed);
  }
  planCostHeaderPrint(options);
  printf("#\n#%9s %6s %5s  %8s %8s %8s %8s %7s  %8s %6s %6s  %6s %9s\n", "step", "layer", "micro", "before",
         "planned", "realised", "bound", "gap", "replicas", "fanout", "rankin", "local", "plan");
  printf("#%9s %6s %5s  %8s %8s %8s %8s %7s  %8s %6s %6s  %6s %9s\n", "", "", "batch", "max/mean", "max/mean",
         "max/mean", "max/mean", "(%)", "", "", "", "(%)", "(us)");
}

static void plan_table_figures_print(const planFigures_t *figures) {
  printf("  %8.4f %8.4f %8.4f %8.4f %7.3f  %8lld %6lld %6lld  %6.2f %9.1f\n", figures->before,
         figures->planned, figures->realised, figures->bound, 100 * figures->gap,
         (long long)figures->replicas, (long long)figures->fanout, (long long)figures->rankIn,
         100 * figures->local, figures->planUs);
}

/* ---- JSON ---- */

static int plan_json_write(planReport_t *report, json_t *object, perfError_t *error) {
  int status = -1;
  if (object == NULL) {
    perfErrorSet(error, "no memory for a line of JSON");
  } else if (json_dumpf(object, report->json, JSON_COMPACT | JSON_REAL_PRECISION(10)) != 0 ||
             fputc('\n', report->json) == EOF) {
    perfErrorSet(error, "%s: cannot be written: %s", report->options->jsonPath, strerror(errno));
  } else {
    status = 0;
  }
  json_decref(object);
  return status;
}

/* Puts into target, which is object or in it, what was asked for of gate and copies, and writes the object.
 * Takes over object, gate and copies. */
static int plan_json_finish(planReport_t *report, json_t *object, json_t *target, json_t *gate,
                            json_t *copies, perfError_t *error) {
  bool whole = object != NULL;
  if (report->options->gate != PLAN_GATE_OFF) whole = whole && json_object_set(target, "gate", gate) == 0;
  if (report->options->cost) whole = whole && json_object_set(target, "copies", copies) == 0;
  json_decref(gate);
  json_decref(copies);
  if (whole) return plan_json_write(report, object, error);
  json_decref(object);
  return perfErrorSet(error, "no memory for a line of JSON");
}

static json_t *plan_json_instances(const ultraepPlan_t *plan) {
  json_t *array = json_array();
  for (int32_t i = 0; i < plan->nInstances; i++) {
    const ultraepInstance_t *instance = &plan->instances[i];
    json_array_append_new(
        array, json_pack("[i,i,I]", (int)instance->expert, (int)instance->rank, (json_int_t)instance->quota));
  }
  return array;
}

static int plan_json_record(planReport_t *report, const planFigures_t *figures, const ultraepPlan_t *plan,
                            perfError_t *error) {
  json_t *object = json_pack(
      "{s:I,s:I,s:I,s:f,s:f,s:f,s:f,s:i,s:i,s:i,s:f,s:f,s:o}", "step", (json_int_t)figures->step, "layer",
      (json_int_t)figures->layer, "microbatch", (json_int_t)figures->microbatch, "before", figures->before,
      "planned", figures->planned, "realised", figures->realised, "bound", figures->bound, "replicas",
      (int)figures->replicas, "fanout", (int)figures->fanout, "rank_in", (int)figures->rankIn, "plan_us",
      figures->planUs, "local", figures->local, "instances", plan_json_instances(plan));
  return plan_json_finish(report, object, object, gateJson(&figures->cost.gate),
                          planCostJson(report->options, &figures->cost), error);
}

static json_t *plan_json_figures(const planFigures_t *figures, double count) {
  return json_pack("{s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f}", "before", figures->before / count, "planned",
                   figures->planned / count, "realised", figures->realised / count, "bound",
                   figures->bound / count, "gap", figures->gap / count, "replicas", figures->replicas / count,
                   "fanout", figures->fanout / count, "rank_in", figures->rankIn / count, "local",
                   figures->local / count, "plan_us", figures->planUs / count);
}

static int plan_json_summary(planReport_t *report, perfError_t *error) {
  json_t *object = json_pack("{s:{s:I,s:i,s:i,s:i,s:o,s:o}}", "summary", "records",
                             (json_int_t)report->nRecords, "ranks", (int)report->options->nRanks, "slots",
                             (int)report->options->nSlots, "replica_rows", (int)report->options->replicaRows,
                             "mean", plan_json_figures(&report->sum, (double)report->nRecords), "worst",
                             plan_json_figures(&report->worst, 1));
  json_t *gate =
      json_pack("{s:I,s:I}", "kept", (json_int_t)report->cost.kept, "all", (json_int_t)report->cost.all);
  return plan_json_finish(report, object, json_object_get(object, "summary"), gate,
                          planCostSumsJson(report->options, &report->cost), error);
}

/* ---- chart ---- */

static bool plan_chart_wanted(const planReport_t *report) {
  if (!report->table || report->options->chart == PLAN_CHART_NEVER) return false;
  return report->options->chart == PLAN_CHART_ALWAYS || isatty(STDOUT_FILENO);
}

static int plan_chart_keep(planShown_t *shown, const planFigures_t *figures, const ultraepPlan_t *plan,
                           const int64_t *realised, perfError_t *error) {
  size_t bytes = (size_t)plan->nRanks * sizeof(int64_t);
  if (shown->before == NULL) {
    shown->before = malloc(bytes);
    shown->after = malloc(bytes);
    if (shown->before == NULL || shown->after == NULL) return perfErrorSet(error, "no memory for the chart");
  } else if (figures->before <= shown->figures.before) {
    return 0;
  }
  shown->figures = *figures;
  shown->nRanks = plan->nRanks;
  memcpy(shown->before, plan->rankLoadBefore, bytes);
  memcpy(shown->after, realised, bytes);
  return 0;
}

static void plan_chart_print(const planShown_t *shown) {
  chart_t chart = {.nRanks = shown->nRanks,
                   .before = shown->before,
                   .after = shown->after,
                   .width = chartTerminalWidth(stdout),
                   .unicode = strcmp(nl_langinfo(CODESET), "UTF-8") == 0};
  printf("\nAssignments on each rank, most skewed record (step %lld, layer %lld, microbatch %lld): imbalance "
         "%.3f -> "
         "%.4f\n\n",
         (long long)shown->figures.step, (long long)shown->figures.layer,
         (long long)shown->figures.microbatch, shown->figures.before, shown->figures.realised);
  chartPrint(stdout, &chart);
}

/* ---- report ---- */

int planReportOpen(planReport_t **report, const planOptions_t *options, perfError_t *error) {
  planReport_t *opened = calloc(1, sizeof(*opened));
  if (opened == NULL) return perfErrorSet(error, "no memory for the report");
  opened->options = options;
  opened->table = options->jsonPath == NULL || strcmp(options->jsonPath, "-") != 0;
  if (!opened->table) {
    opened->json = stdout;
  } else if (options->jsonPath != NULL) {
    opened->json = fopen(options->jsonPath, "w");
    if (opened->json == NULL) {
      free(opened);
      return perfErrorSet(error, "%s: cannot be opened for writing: %s", options->jsonPath, strerror(errno));
    }
  }
  if (opened->table) plan_table_open(options);
  *report = opened;
  return 0;
}

#define PLAN_ACCUMULATE(field)                                                                               \
  do {                                                                                                       \
    report->sum.field += figures->field;                                                                     \
    if (report->nRecords == 0 || figures->field > report->worst.field) report->worst.field = figures->field; \
  } while (0)

static void plan_report_accumulate(planReport_t *report, const planFigures_t *figures) {
  PLAN_ACCUMULATE(before);
  PLAN_ACCUMULATE(planned);
  PLAN_ACCUMULATE(realised);
  PLAN_ACCUMULATE(bound);
  PLAN_ACCUMULATE(gap);
  PLAN_ACCUMULATE(planUs);
  PLAN_ACCUMULATE(replicas);
  PLAN_ACCUMULATE(fanout);
  PLAN_ACCUMULATE(rankIn);
  report->sum.local += figures->local;
  /* The worst share of local assignments is the least. */
  if (report->nRecords == 0 || figures->local < report->worst.local) report->worst.local = figures->local;
  report->nRecords++;
  planCostAdd(report->options, &figures->cost, &report->cost);
}

int planReportRecord(planReport_t *report, const planFigures_t *figures, const ultraepPlan_t *plan,
                     const int64_t *realised, perfError_t *error) {
  plan_report_accumulate(report, figures);
  if (report->table) {
    printf(" %9lld %6lld %5lld", (long long)figures->step, (long long)figures->layer,
           (long long)figures->microbatch);
    plan_table_figures_print(figures);
    planCostPrint(report->options, &figures->cost);
  }
  if (report->json != NULL && plan_json_record(report, figures, plan, error) != 0) return -1;
  if (plan_chart_wanted(report)) return plan_chart_keep(&report->shown, figures, plan, realised, error);
  return 0;
}

static void plan_summary_print(const planReport_t *report) {
  double count = (double)report->nRecords;
  const planFigures_t *sum = &report->sum;
  printf("#\n# %-21s", "mean");
  printf("  %8.4f %8.4f %8.4f %8.4f %7.3f  %8.2f %6.2f %6.2f  %6.2f %9.1f\n", sum->before / count,
         sum->planned / count, sum->realised / count, sum->bound / count, 100 * sum->gap / count,
         sum->replicas / count, sum->fanout / count, sum->rankIn / count, 100 * sum->local / count,
         sum->planUs / count);
  printf("# %-21s", "worst");
  plan_table_figures_print(&report->worst);
  printf("# %lld records: mean imbalance %.4f -> %.4f, worst %.4f -> %.4f\n", (long long)report->nRecords,
         sum->before / count, sum->realised / count, report->worst.before, report->worst.realised);
  planCostSumsPrint(report->options, &report->cost);
}

int planReportFinish(planReport_t *report, perfError_t *error) {
  if (report->json != NULL && plan_json_summary(report, error) != 0) return -1;
  if (report->table) plan_summary_print(report);
  if (plan_chart_wanted(report)) plan_chart_print(&report->shown);
  if (report->json != NULL && report->json != stdout) {
    int failed = ferror(report->json) | fclose(report->json);
    report->json = NULL;
    if (failed) return perfErrorSet(error, "%s: cannot be written", report->options->jsonPath);
  }
  if (fflush(stdout) != 0 || ferror(stdout)) return perfErrorSet(error, "stdout: cannot be written");
  return 0;
}

void planReportDestroy(planReport_t *report) {
  if (report == NULL) return;
  if (report->json != NULL && report->json != stdout) fclose(report->json);
  free(report->shown.before);
  free(report->shown.after);
  free(report);
}
