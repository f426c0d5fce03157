/* An oracle for dispatch and combine that knows nothing of the library's layout code: it sees only what a
 * caller sees (segments, rows, tokens) and the rules written in ultraep.h. Conversions and sums are its own.
 */
#ifndef ORACLE_H_
#define ORACLE_H_

#include "ultraep.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ORACLE_MAX_RANKS 16
#define ORACLE_POISON 0xa5

/* One microbatch over all ranks. */
typedef struct {
  int nRanks, nExperts, topK, nSlots, alignment, hidden;
  int32_t dataType;
  size_t rowBytes, scaleBytes;
  uint64_t seed; /* of the tokens' contents */
  int nTokens[ORACLE_MAX_RANKS];
  int32_t *topk[ORACLE_MAX_RANKS];  /* [nTokens][topK] */
  float *weights[ORACLE_MAX_RANKS]; /* [nTokens][topK]; null where the route has none */
  int32_t
      *rankOf[ORACLE_MAX_RANKS]; /* [nTokens][topK] where the assignment went: set by oracle_check_dispatch */
} oracleCase_t;

/* What one rank sees after a dispatch. Everything that the library should not write was filled with
 * ORACLE_POISON. */
typedef struct {
  ultraepSegments_t segments;
  int64_t maxRecvRows;
  const unsigned char *rows;   /* [maxRecvRows][rowBytes] */
  const unsigned char *scales; /* [maxRecvRows][scaleBytes] or null */
  const float *weights;        /* [maxRecvRows] or null */
} oracleView_t;

/* Token `token` of rank `src`: its row and its scales, made from the seed. */
void oracle_fill_token(const oracleCase_t *c, int src, int token, unsigned char *row);
void oracle_fill_scales(const oracleCase_t *c, int src, int token, unsigned char *scales);

/* Checks what all ranks received; sets c->rankOf. False with a reason in why[256]. */
bool oracle_check_dispatch(oracleCase_t *c, const oracleView_t *views, char *why);

/* What expert `expert` makes of a row of a type that adds: each element times a factor of the expert,
 * rounded. */
void oracle_expert(const oracleCase_t *c, int expert, const unsigned char *in, unsigned char *out);

/* Checks the tokens [nTokens][rowBytes] that rank src got back when every row went through oracle_expert.
 * partial: the sums of ULTRAEP_COMBINE_PARTIAL. Needs rankOf for partial. */
bool oracle_check_combine(const oracleCase_t *c, int src, const unsigned char *tokens, bool weighted,
                          bool partial, char *why);

/* Exact conversions, by arithmetic on the value. */
float oracle_load(int32_t dataType, const unsigned char *row, int i);
void oracle_store(int32_t dataType, unsigned char *row, int i, float value);

#endif
