/* From a plan to rows: where each instance's segment begins on its rank, and where each assignment of a
 * source goes. Pure functions of data, the same for every backend: the row layout of ultraep.h is defined
 * here and nowhere else. */
#ifndef ULTRAEP_LAYOUT_H_
#define ULTRAEP_LAYOUT_H_

#include "ultraep.h"

/* Where one assignment goes. */
typedef struct {
  int32_t rank; /* -1: unused entry */
  int32_t row;
} layoutPlace_t;

/* Sets firstRow[nInstances], the first row of each instance's segment on its rank, and rankRows[R], the rows
 * in use on each rank: every segment, the last one too, is padded to a multiple of `alignment`. */
void layout_segments(const ultraepPlan_t *plan, int alignment, int64_t *firstRow, int64_t *rankRows);

/* Sets nextRow[nInstances]: the row of the first assignment that source rank src sends to each instance.
 * loads is C[R][E]. In a segment the rows of lower source ranks come first. */
void layout_source(const ultraepPlan_t *plan, const int32_t *loads, int src, const int64_t *firstRow,
                   int64_t *nextRow);

/* Scratch of layout_places: the piece that an expert's next assignment belongs to, and what is left of it. */
typedef struct {
  int32_t *piece; /* [E] */
  int32_t *left;  /* [E] */
} layoutCursor_t;

/* Sets places[n] for source rank src's entries topkIdx[n], in order of (token, k), each -1 or an expert; they
 * must be what loads counted. nextRow comes from layout_source and is used up. */
void layout_places(const ultraepPlan_t *plan, int src, const int32_t *topkIdx, int64_t n, int64_t *nextRow,
                   const layoutCursor_t *cursor, layoutPlace_t *places);

#endif
