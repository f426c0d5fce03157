/* ultraep_plan: plans load matrices and says how good the plans are. */
#ifndef ULTRAEP_PERF_PLAN_TOOL_H_
#define ULTRAEP_PERF_PLAN_TOOL_H_

#include "options.h"
#include "ultraep_balancer.h"

#include <stdio.h>

typedef enum { PLAN_CHART_AUTO, PLAN_CHART_ALWAYS, PLAN_CHART_NEVER } planChart_t;

typedef struct {
  const char *tracePath; /* null: zipf */
  int32_t nRanks, nSlots, nDomainRanks;
  double tolerance;
  /* Cost gate: off while copyPs is 0. */
  int64_t rowPs, copyPs;
  int32_t relayCopies;
  /* zipf */
  double zipfRatio; /* 0: not asked for */
  int32_t nExperts, topK, nTokens, nRecords;
  int64_t seed;
  /* filters on a trace; layer -1: all, limit 0: all */
  int64_t layer, limit;
  int32_t repeat;
  const char *jsonPath; /* null: none, "-": stdout */
  int32_t chart;        /* planChart_t */
} planOptions_t;

/* What is said of one record. Imbalances are max / mean over ranks. */
typedef struct {
  int64_t step, layer, microbatch;
  double before, planned, realised, bound;
  double gap;    /* planned max / bound - 1 */
  double local;  /* share of the assignments whose instance is on their source's rank */
  double planUs; /* median over the repeats */
  int64_t replicas, fanout, rankIn;
} planFigures_t;

/* Reads the options or exits with PERF_EXIT_USAGE. */
void planOptionsParse(planOptions_t *options, int argc, char **argv);

typedef struct planReport planReport_t;

/* Where the figures go: a table on stdout, JSON lines, a chart. */
int planReportOpen(planReport_t **report, const planOptions_t *options, perfError_t *error);
int planReportRecord(planReport_t *report, const planFigures_t *figures, const ultraepPlan_t *plan,
                     const int64_t *realised, perfError_t *error);
/* Prints the summary and closes; fails where anything could not be written. */
int planReportFinish(planReport_t *report, perfError_t *error);
void planReportDestroy(planReport_t *report);

#endif
