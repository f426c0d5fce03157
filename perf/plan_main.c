#include "plan_tool.h"

#include "trace.h"
#include "ultraep.h"
#include "zipf.h"

#include <locale.h>
#include <stdlib.h>
#include <string.h>

/* Where load matrices come from. */
typedef struct {
  loadTrace_t *trace; /* or null: zipf */
  zipf_t *zipf;
  int32_t nExperts; /* 0 until the first record of a trace */
  int64_t nTaken;
  int32_t *loads; /* [R][E] */
} planSource_t;

/* The planner and what it works on. */
typedef struct {
  ultraepPlannerConfig_t config;
  void *workspace;
  size_t workspaceBytes;
  double *seconds;   /* [repeat] */
  int64_t *realised; /* [R] */
  int32_t *source;   /* [R*S + 1] of the relay */
} planWork_t;

static int plan_loads_allocate(planSource_t *source, int32_t nRanks, int32_t nExperts, perfError_t *error) {
  source->nExperts = nExperts;
  source->loads = calloc((size_t)nRanks * (size_t)nExperts, sizeof(source->loads[0]));
  if (source->loads == NULL) return perfErrorSet(error, "no memory for %d x %d loads", nRanks, nExperts);
  return 0;
}

static int plan_source_open(planSource_t *source, const planOptions_t *options, perfError_t *error) {
  if (options->tracePath != NULL) return loadTraceOpen(&source->trace, options->tracePath, error);
  if (zipfCreate(&source->zipf, options->nRanks, options->nExperts, options->topK, options->zipfRatio,
                 error) != 0) {
    return -1;
  }
  return plan_loads_allocate(source, options->nRanks, options->nExperts, error);
}

static void plan_source_close(planSource_t *source) {
  loadTraceClose(source->trace);
  zipfDestroy(source->zipf);
  free(source->loads);
}

/* 1: loads and labels of the next record; 0: no more. */
static int plan_source_next(planSource_t *source, const planOptions_t *options, planFigures_t *figures,
                            perfError_t *error) {
  if (options->limit > 0 && source->nTaken == options->limit) return 0;
  if (source->zipf != NULL) {
    if (source->nTaken == options->nRecords) return 0;
    zipfLoads(source->zipf, (uint64_t)options->seed, (uint64_t)source->nTaken, options->nTokens,
              source->loads);
    figures->microbatch = source->nTaken++;
    return 1;
  }
  loadRecord_t record;
  int more = 0;
  do {
    more = loadTraceNext(source->trace, &record, error);
    if (more <= 0) return more;
  } while (options->layer >= 0 && record.layer != options->layer);
  if (source->loads == NULL && plan_loads_allocate(source, options->nRanks, record.nExperts, error) != 0)
    return -1;
  if (loadRecordMap(&record, options->nRanks, source->loads, error) != 0) {
    perfError_t inner = *error;
    return perfErrorSet(error, "%s: %.400s", options->tracePath, inner.text);
  }
  figures->step = record.step;
  figures->layer = record.layer;
  figures->microbatch = record.microbatch;
  source->nTaken++;
  return 1;
}

static int plan_work_open(planWork_t *work, const planOptions_t *options, int32_t nExperts,
                          perfError_t *error) {
  work->config = (ultraepPlannerConfig_t){.nRanks = options->nRanks,
                                          .nExperts = nExperts,
                                          .nSlots = options->nSlots,
                                          .nDomainRanks = options->nDomainRanks,
                                          .tolerancePpm = (uint32_t)(options->tolerance * 1e6 + 0.5),
                                          .replicaRows = options->replicaRows};
  planCostRates(options, &work->config);
  ultraepResult_t result = ultraepPlannerWorkspaceSize(&work->config, &work->workspaceBytes);
  if (result != ultraepSuccess) {
    return perfErrorSet(error, "planner: %s: %s", ultraepGetErrorString(result),
                        ultraepPlannerConfigError(&work->config));
  }
  work->workspace = aligned_alloc(64, (work->workspaceBytes + 63) / 64 * 64);
  work->seconds = calloc((size_t)options->repeat, sizeof(work->seconds[0]));
  work->realised = calloc((size_t)options->nRanks, sizeof(work->realised[0]));
  work->source = calloc((size_t)options->nRanks * (size_t)options->nSlots + 1, sizeof(work->source[0]));
  if (work->workspace == NULL || work->seconds == NULL || work->realised == NULL || work->source == NULL) {
    return perfErrorSet(error, "no memory for a workspace of %zu bytes", work->workspaceBytes);
  }
  /* The first touch of its pages is not the planner's cost. */
  memset(work->workspace, 0, work->workspaceBytes);
  return 0;
}

static void plan_work_close(planWork_t *work) {
  free(work->workspace);
  free(work->seconds);
  free(work->realised);
  free(work->source);
}

/* Plans with the clock running; what the gate weighed comes first, for it plans in the same workspace. */
static int plan_record_plan(planWork_t *work, const planOptions_t *options, const int32_t *loads,
                            ultraepPlan_t *plan, planFigures_t *figures, perfError_t *error) {
  ultraepResult_t result = ultraepSuccess;
  if (options->gate != PLAN_GATE_OFF && gateFind(&work->config, loads, work->workspace, work->workspaceBytes,
                                                 plan, &figures->cost.gate, error) != 0)
    return -1;
  for (int32_t i = 0; i < options->repeat && result == ultraepSuccess; i++) {
    double start = perfSeconds();
    result = ultraepPlannerRun(&work->config, loads, work->workspace, work->workspaceBytes, plan);
    work->seconds[i] = perfSeconds() - start;
  }
  if (result == ultraepSuccess) result = ultraepPlanRealised(plan, loads, work->realised);
  if (result != ultraepSuccess) return perfErrorSet(error, "planner: %s", ultraepGetErrorString(result));
  return options->cost ? planCostCopies(options, plan, work->source, &figures->cost, error) : 0;
}

static int plan_record_run(planWork_t *work, const planOptions_t *options, const int32_t *loads,
                           ultraepPlan_t *plan, planFigures_t *figures, perfError_t *error) {
  if (plan_record_plan(work, options, loads, plan, figures, error) != 0) {
    perfError_t inner = *error;
    return perfErrorSet(error, "step %lld, layer %lld, microbatch %lld: %.300s", (long long)figures->step,
                        (long long)figures->layer, (long long)figures->microbatch, inner.text);
  }
  double mean = (double)plan->total / plan->nRanks;
  figures->planUs = 1e6 * perfMedian(work->seconds, options->repeat);
  figures->before = plan->total == 0 ? 1 : (double)plan->maxBefore / mean;
  figures->planned = plan->total == 0 ? 1 : (double)plan->maxPlanned / mean;
  figures->bound = plan->total == 0 ? 1 : (double)plan->bound / mean;
  figures->realised = perfImbalance(work->realised, plan->nRanks);
  figures->gap = plan->bound == 0 ? 0 : (double)plan->maxPlanned / (double)plan->bound - 1;
  figures->local = plan->total == 0 ? 1 : (double)plan->localAssignments / (double)plan->total;
  figures->replicas = plan->nReplicas;
  figures->fanout = plan->maxFanout;
  figures->rankIn = plan->maxRankIn;
  return 0;
}

static int plan_records_run(planSource_t *source, planWork_t *work, planReport_t *report,
                            const planOptions_t *options, perfError_t *error) {
  for (;;) {
    planFigures_t figures = {0};
    ultraepPlan_t plan = {0};
    int more = plan_source_next(source, options, &figures, error);
    if (more < 0) return -1;
    if (more == 0) break;
    if (work->workspace == NULL && plan_work_open(work, options, source->nExperts, error) != 0) return -1;
    if (plan_record_run(work, options, source->loads, &plan, &figures, error) != 0) return -1;
    if (planReportRecord(report, &figures, &plan, work->realised, error) != 0) return -1;
  }
  if (source->nTaken == 0) return perfErrorSet(error, "no records to plan");
  return planReportFinish(report, error);
}

int main(int argc, char **argv) {
  planOptions_t options;
  planSource_t source = {0};
  planWork_t work = {0};
  planReport_t *report = NULL;
  perfError_t error = {""};
  setlocale(LC_CTYPE, "");
  planOptionsParse(&options, argc, argv);
  int status = plan_source_open(&source, &options, &error);
  if (status == 0) status = planReportOpen(&report, &options, &error);
  if (status == 0) status = plan_records_run(&source, &work, report, &options, &error);
  planReportDestroy(report);
  plan_work_close(&work);
  plan_source_close(&source);
  if (status == 0) return PERF_EXIT_OK;
  fflush(stdout);
  fprintf(stderr, "ultraep_plan: %s\n", error.text);
  return PERF_EXIT_FAILED;
}
