/* What the cost gate decided for one load matrix, and why: for the reports of the tools. */
#ifndef ULTRAEP_PERF_GATE_H_
#define ULTRAEP_PERF_GATE_H_

#include "options.h"
#include "ultraep_balancer.h"

#include <jansson.h>

typedef struct {
  ultraepPlannerConfig_t planner; /* copyPs 0: no gate, and the rest is not set */
  int32_t kept, all;              /* replicas with the gate, and of the full balance */
  double before;                  /* us of rows without replicas */
  ultraepPlanCost_t gated, full;
} gateFigures_t;

/* Plans loads without the gate and with it, for a planner with a gate. The workspace is as for
 * ultraepPlannerRun; the plan with the gate stays in it and in *plan. */
int gateFind(const ultraepPlannerConfig_t *planner, const int32_t *loads, void *workspace,
             size_t workspaceBytes, ultraepPlan_t *plan, gateFigures_t *figures, perfError_t *error);
/* One line without its end: "kept 3 of 7 replicas: ...". */
void gateText(const gateFigures_t *figures, char *text, size_t size);
/* Under a line of a report: what the gate weighed for it; nothing where there was none. */
void gatePrint(const gateFigures_t *figures);
/* The same as an object; null without memory. */
json_t *gateJson(const gateFigures_t *figures);

#endif
