#include "gate.h"

#include <stdio.h>

#define US_PER_PS 1e-6

static double gate_total_us(ultraepPlanCost_t cost) {
  return US_PER_PS * ((double)cost.rowsPs + (double)cost.copiesPs);
}

int gateFind(const ultraepPlannerConfig_t *planner, const int32_t *loads, void *workspace,
             size_t workspaceBytes, ultraepPlan_t *plan, gateFigures_t *figures, perfError_t *error) {
  ultraepPlannerConfig_t open = *planner;
  gateFigures_t found = {.planner = *planner};
  open.copyPs = 0;
  ultraepResult_t result = ultraepPlannerRun(&open, loads, workspace, workspaceBytes, plan);
  if (result == ultraepSuccess) result = ultraepPlanCost(planner, plan, &found.full);
  if (result == ultraepSuccess) {
    found.all = plan->nReplicas;
    found.before = US_PER_PS * (double)plan->maxBefore * planner->rowPs;
    result = ultraepPlannerRun(planner, loads, workspace, workspaceBytes, plan);
  }
  if (result == ultraepSuccess) result = ultraepPlanCost(planner, plan, &found.gated);
  if (result != ultraepSuccess) return perfErrorSet(error, "the planner refuses the loads");
  found.kept = plan->nReplicas;
  *figures = found;
  return 0;
}

/* "rows 90.0 us and 1 copy 10.0 us instead of 120.0 us, 20.0 us less" */
static void gate_cost_text(const gateFigures_t *figures, ultraepPlanCost_t cost, char *text, size_t size) {
  double saved = figures->before - gate_total_us(cost);
  snprintf(text, size, "rows %.1f us and %d cop%s over the busiest link %.1f us, %.1f us %s than none",
           US_PER_PS * (double)cost.rowsPs, cost.copies, cost.copies == 1 ? "y" : "ies",
           US_PER_PS * (double)cost.copiesPs, saved < 0 ? -saved : saved, saved < 0 ? "more" : "less");
}

void gateText(const gateFigures_t *figures, char *text, size_t size) {
  char kept[160], all[160];
  if (figures->planner.copyPs == 0) {
    snprintf(text, size, "off, the rates of rows and copies are not given");
    return;
  }
  gate_cost_text(figures, figures->gated, kept, sizeof(kept));
  gate_cost_text(figures, figures->full, all, sizeof(all));
  if (figures->all == 0) {
    snprintf(text, size, "no replicas to weigh: rows %.1f us", figures->before);
  } else if (figures->kept == 0) {
    snprintf(text, size, "kept none of %d replicas: rows %.1f us; all: %s", figures->all, figures->before,
             all);
  } else if (figures->gated.copies == figures->full.copies && figures->kept == figures->all) {
    snprintf(text, size, "kept all %d replicas: %s", figures->all, kept);
  } else {
    snprintf(text, size, "kept %d of %d replicas: %s; all: %s", figures->kept, figures->all, kept, all);
  }
}

static json_t *gate_cost_json(ultraepPlanCost_t cost) {
  return json_pack("{s:f,s:f,s:i}", "rows_us", US_PER_PS * (double)cost.rowsPs, "copies_us",
                   US_PER_PS * (double)cost.copiesPs, "copies", (int)cost.copies);
}

void gatePrint(const gateFigures_t *figures) {
  char text[512];
  if (figures->planner.copyPs == 0) return;
  gateText(figures, text, sizeof(text));
  printf("#   gate, %g ns a row, %g us a copy: %s\n", 1e-3 * figures->planner.rowPs,
         1e-6 * (double)figures->planner.copyPs, text);
}

json_t *gateJson(const gateFigures_t *figures) {
  char text[512];
  if (figures->planner.copyPs == 0) return json_pack("{s:b}", "on", 0);
  gateText(figures, text, sizeof(text));
  return json_pack("{s:b,s:f,s:f,s:b,s:i,s:i,s:f,s:o,s:o,s:s}", "on", 1, "row_ns",
                   1e-3 * figures->planner.rowPs, "copy_us", US_PER_PS * (double)figures->planner.copyPs,
                   "relay", (int)figures->planner.relayCopies, "kept", (int)figures->kept, "all",
                   (int)figures->all, "none_rows_us", figures->before, "gated",
                   gate_cost_json(figures->gated), "full", gate_cost_json(figures->full), "text", text);
}
