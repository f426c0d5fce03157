#include "layout.h"

#include <stdbool.h>

static int64_t layout_align(int64_t rows, int alignment) {
  return (rows + alignment - 1) / alignment * alignment;
}

void layout_segments(const ultraepPlan_t *plan, int alignment, int64_t *firstRow, int64_t *rankRows) {
  int nLocal = plan->nExperts / plan->nRanks;
  for (int rank = 0; rank < plan->nRanks; rank++) {
    int64_t row = 0;
    for (int e = rank * nLocal; e < (rank + 1) * nLocal; e++) {
      firstRow[e] = row;
      row += layout_align(plan->instances[e].quota, alignment);
    }
    for (int s = 0; s < plan->nSlots; s++) {
      int32_t instance = plan->slotInstance[rank * plan->nSlots + s];
      if (instance < 0) continue;
      firstRow[instance] = row;
      row += layout_align(plan->instances[instance].quota, alignment);
    }
    rankRows[rank] = row;
  }
}

static bool layout_is_replicated(const ultraepPlan_t *plan, int expert) {
  return plan->pieceFirst[expert] != plan->pieceFirst[expert + 1];
}

void layout_source(const ultraepPlan_t *plan, const int32_t *loads, int src, const int64_t *firstRow,
                   int64_t *nextRow) {
  int nExperts = plan->nExperts;
  for (int i = 0; i < plan->nInstances; i++) nextRow[i] = firstRow[i];
  for (int lower = 0; lower < src; lower++) {
    const int32_t *row = loads + (int64_t)lower * nExperts;
    for (int e = 0; e < nExperts; e++) nextRow[e] += row[e];
  }
  for (int e = 0; e < nExperts; e++) {
    if (!layout_is_replicated(plan, e)) continue;
    nextRow[e] = firstRow[e]; /* the pieces say which of the lower ranks' assignments go where */
    for (int p = plan->pieceFirst[e]; p < plan->pieceFirst[e + 1] && plan->pieces[p].src < src; p++)
      nextRow[plan->pieces[p].instance] += plan->pieces[p].count;
  }
}

static void layout_cursor_start(const ultraepPlan_t *plan, int src, const layoutCursor_t *cursor) {
  for (int e = 0; e < plan->nExperts; e++) {
    int p = plan->pieceFirst[e], end = plan->pieceFirst[e + 1];
    while (p < end && plan->pieces[p].src < src) p++;
    cursor->piece[e] = p;
    cursor->left[e] = p < end ? plan->pieces[p].count : 0;
  }
}

void layout_places(const ultraepPlan_t *plan, int src, const int32_t *topkIdx, int64_t n, int64_t *nextRow,
                   const layoutCursor_t *cursor, layoutPlace_t *places) {
  layout_cursor_start(plan, src, cursor);
  for (int64_t i = 0; i < n; i++) {
    int32_t e = topkIdx[i];
    if (e < 0) {
      places[i] = (layoutPlace_t){.rank = -1, .row = -1};
      continue;
    }
    int32_t instance = e;
    if (layout_is_replicated(plan, e)) {
      if (cursor->left[e] == 0) cursor->left[e] = plan->pieces[++cursor->piece[e]].count;
      cursor->left[e]--;
      instance = plan->pieces[cursor->piece[e]].instance;
    }
    places[i] = (layoutPlace_t){.rank = plan->instances[instance].rank, .row = (int32_t)nextRow[instance]++};
  }
}
