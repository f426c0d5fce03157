#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WHY 256

static uint64_t oracle_random(uint64_t *state) {
  uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

/* ---- numbers: sign, exponent and fraction taken apart with the math library, no bit tricks ---- */

typedef struct {
  int fractionBits, minExponent, maxExponent;
} oracleFormat_t;

static const oracleFormat_t bf16 = {7, -126, 127}, f16 = {10, -14, 15};

static float oracle_decode(const oracleFormat_t *format, uint16_t bits) {
  int exponentBits = 15 - format->fractionBits;
  int exponent = (bits >> format->fractionBits) & ((1 << exponentBits) - 1);
  int fraction = bits & ((1 << format->fractionBits) - 1);
  double value;
  if (exponent == (1 << exponentBits) - 1)
    value = fraction ? NAN : INFINITY;
  else if (exponent == 0)
    value = ldexp(fraction, format->minExponent - format->fractionBits);
  else
    value = ldexp(fraction + (1 << format->fractionBits),
                  exponent - 1 + format->minExponent - format->fractionBits);
  return (float)copysign(value, bits & 0x8000 ? -1.0 : 1.0);
}

static uint16_t oracle_encode(const oracleFormat_t *format, float value) {
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  int exponentBits = 15 - format->fractionBits;
  uint16_t infinity = (uint16_t)(((1 << exponentBits) - 1) << format->fractionBits);
  if (isnan(value)) return (uint16_t)(sign | infinity | 1u);
  double magnitude = fabs((double)value);
  int exponent = magnitude > 0 ? ilogb(magnitude) : format->minExponent;
  if (exponent < format->minExponent) exponent = format->minExponent;
  double units = nearbyint(ldexp(magnitude, format->fractionBits - exponent)); /* to nearest, ties to even */
  double rounded = ldexp(units, exponent - format->fractionBits);
  if (isinf(magnitude) || rounded >= ldexp(1.0, format->maxExponent + 1)) return (uint16_t)(sign | infinity);
  /* From one unit to the next the bits count up, also over a change of exponent. */
  double first = ldexp(1.0, format->fractionBits);
  int64_t bits = (int64_t)units;
  if (units >= first) bits += (int64_t)(exponent - format->minExponent) << format->fractionBits;
  return (uint16_t)(sign | (uint16_t)bits);
}

float oracle_load(int32_t dataType, const unsigned char *row, int i) {
  uint16_t half;
  float whole;
  switch (dataType) {
  case ULTRAEP_BFLOAT16:
    memcpy(&half, row + 2 * i, 2);
    return oracle_decode(&bf16, half);
  case ULTRAEP_FLOAT16:
    memcpy(&half, row + 2 * i, 2);
    return oracle_decode(&f16, half);
  case ULTRAEP_FLOAT32:
    memcpy(&whole, row + 4 * i, 4);
    return whole;
  default:
    return row[i];
  }
}

void oracle_store(int32_t dataType, unsigned char *row, int i, float value) {
  uint16_t half;
  switch (dataType) {
  case ULTRAEP_BFLOAT16:
    half = oracle_encode(&bf16, value);
    memcpy(row + 2 * i, &half, 2);
    break;
  case ULTRAEP_FLOAT16:
    half = oracle_encode(&f16, value);
    memcpy(row + 2 * i, &half, 2);
    break;
  case ULTRAEP_FLOAT32:
    memcpy(row + 4 * i, &value, 4);
    break;
  default:
    row[i] = (unsigned char)value;
  }
}

/* ---- tokens: the first three elements name the token, small integers that every type holds exactly ---- */

static void oracle_stamp(const oracleCase_t *c, int src, int token, unsigned char *row) {
  int high = token / 128, low = token % 128;
  oracle_store(c->dataType, row, 0, (float)src);
  oracle_store(c->dataType, row, 1, (float)high);
  oracle_store(c->dataType, row, 2, (float)low);
}

static bool oracle_read_stamp(const oracleCase_t *c, const unsigned char *row, int *src, int *token) {
  float s = oracle_load(c->dataType, row, 0), high = oracle_load(c->dataType, row, 1);
  float low = oracle_load(c->dataType, row, 2);
  if (!(s >= 0 && s < c->nRanks && high >= 0 && high < 256 && low >= 0 && low < 128)) return false;
  *src = (int)s;
  *token = (int)high * 128 + (int)low;
  return *token < c->nTokens[*src];
}

void oracle_fill_token(const oracleCase_t *c, int src, int token, unsigned char *row) {
  uint64_t state = c->seed ^ ((uint64_t)src << 40) ^ ((uint64_t)token << 8);
  for (int i = 0; i < c->hidden; i++) {
    uint64_t bits = oracle_random(&state);
    float value = (float)((int64_t)(bits % 4001) - 2000) / 977.0f;
    if (c->dataType == ULTRAEP_FLOAT8 || c->dataType == ULTRAEP_BYTES) value = (float)(bits & 255);
    oracle_store(c->dataType, row, i, value);
  }
  oracle_stamp(c, src, token, row);
}

void oracle_fill_scales(const oracleCase_t *c, int src, int token, unsigned char *scales) {
  uint64_t state = ~c->seed ^ ((uint64_t)src << 40) ^ ((uint64_t)token << 8);
  for (size_t i = 0; i < c->scaleBytes; i++) scales[i] = (unsigned char)oracle_random(&state);
}

/* ---- dispatch ---- */

static bool oracle_is_poison(const unsigned char *bytes, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (bytes[i] != ORACLE_POISON) return false;
  return true;
}

static bool oracle_check_padding(const oracleCase_t *c, const oracleView_t *view, int64_t from, int64_t to) {
  size_t n = (size_t)(to - from), first = (size_t)from;
  return oracle_is_poison(view->rows + first * c->rowBytes, n * c->rowBytes) &&
         (!view->scales || oracle_is_poison(view->scales + first * c->scaleBytes, n * c->scaleBytes)) &&
         (!view->weights ||
          oracle_is_poison((const unsigned char *)(view->weights + first), n * sizeof(float)));
}

/* Masters by expert, then slots; aligned, in order, apart; nothing written outside. */
static bool oracle_check_segments(const oracleCase_t *c, int rank, const oracleView_t *view, char *why) {
  const ultraepSegments_t *s = &view->segments;
  int nLocal = c->nExperts / c->nRanks;
  int64_t end = 0;
  if (s->nSegments != nLocal + c->nSlots)
    return snprintf(why, WHY, "rank %d: %d segments", rank, s->nSegments), false;
  for (int i = 0; i < s->nSegments; i++) {
    if (i < nLocal ? s->expert[i] != rank * nLocal + i : s->expert[i] < -1 || s->expert[i] >= c->nExperts)
      return snprintf(why, WHY, "rank %d segment %d: expert %d", rank, i, s->expert[i]), false;
    if (s->rows[i] < 0 || (s->expert[i] < 0 && s->rows[i] != 0))
      return snprintf(why, WHY, "rank %d segment %d: %lld rows", rank, i, (long long)s->rows[i]), false;
    if (s->firstRow[i] % c->alignment != 0 || s->firstRow[i] < end || s->firstRow[i] >= end + c->alignment)
      return snprintf(why, WHY, "rank %d segment %d: first row %lld after %lld", rank, i,
                      (long long)s->firstRow[i], (long long)end),
             false;
    if (s->firstRow[i] + s->rows[i] > view->maxRecvRows)
      return snprintf(why, WHY, "rank %d segment %d: past maxRecvRows", rank, i), false;
    if (!oracle_check_padding(c, view, end, s->firstRow[i]))
      return snprintf(why, WHY, "rank %d: padding before segment %d was written", rank, i), false;
    end = s->firstRow[i] + s->rows[i];
  }
  if (!oracle_check_padding(c, view, end, view->maxRecvRows))
    return snprintf(why, WHY, "rank %d: rows past the last segment were written", rank), false;
  if (*s->totalRows != (end + c->alignment - 1) / c->alignment * c->alignment ||
      *s->totalRows > view->maxRecvRows)
    return snprintf(why, WHY, "rank %d: totalRows %lld, end %lld", rank, (long long)*s->totalRows,
                    (long long)end),
           false;
  return true;
}

/* The segment of an expert on a rank, -1 if there is none; more than one is an error of its own (-2). */
static int oracle_find_segment(const oracleView_t *view, int expert) {
  int found = -1;
  for (int i = 0; i < view->segments.nSegments; i++)
    if (view->segments.expert[i] == expert) found = found == -1 ? i : -2;
  return found;
}

/* Takes the rows of source `src` from where the walk of the segment of `expert` on `rank` stands: they must
 * be the source's next assignments of this expert. *next is the index of that in (token, k) order. */
static bool oracle_take_rows(oracleCase_t *c, const oracleView_t *views, int expert, int rank, int src,
                             int64_t *stand, int64_t *next, char *why) {
  const oracleView_t *view = &views[rank];
  int segment = oracle_find_segment(view, expert);
  int64_t first = view->segments.firstRow[segment], rows = view->segments.rows[segment];
  unsigned char *expected = malloc(c->rowBytes + c->scaleBytes);
  bool good = true;
  for (; good && *stand < rows; (*stand)++) {
    size_t row = (size_t)(first + *stand);
    int from = -1, token = -1;
    good = oracle_read_stamp(c, view->rows + row * c->rowBytes, &from, &token);
    if (good && from != src) break;
    int64_t n = (int64_t)c->nTokens[src] * c->topK;
    while (*next < n && c->topk[src][*next] != expert) (*next)++;
    good = good && *next < n && token == *next / c->topK;
    if (good) {
      oracle_fill_token(c, src, token, expected);
      oracle_fill_scales(c, src, token, expected + c->rowBytes);
      float weight = c->weights[src] ? c->weights[src][*next] : 1.0f;
      good = memcmp(expected, view->rows + row * c->rowBytes, c->rowBytes) == 0 &&
             (!view->scales ||
              memcmp(expected + c->rowBytes, view->scales + row * c->scaleBytes, c->scaleBytes) == 0) &&
             (!view->weights || memcmp(&weight, &view->weights[row], sizeof(weight)) == 0);
      c->rankOf[src][(*next)++] = rank;
    }
    if (!good)
      snprintf(why, WHY, "expert %d on rank %d, row %lld of its segment: not the next of source %d", expert,
               rank, (long long)*stand, src);
  }
  free(expected);
  return good;
}

/* One expert: sources in order; a source's assignments fill the instance on its own rank, the master, then
 * the other ranks ascending; none is missing and none is left over. */
static bool oracle_check_expert(oracleCase_t *c, const oracleView_t *views, int expert, char *why) {
  int master = expert / (c->nExperts / c->nRanks);
  int64_t stand[ORACLE_MAX_RANKS] = {0};
  for (int r = 0; r < c->nRanks; r++)
    if (oracle_find_segment(&views[r], expert) == -2)
      return snprintf(why, WHY, "rank %d has two instances of expert %d", r, expert), false;
  for (int src = 0; src < c->nRanks; src++) {
    int64_t next = 0, n = (int64_t)c->nTokens[src] * c->topK;
    for (int i = -2; i < c->nRanks; i++) {
      int rank = i == -2 ? src : i == -1 ? master : i;
      if ((i >= 0 && (rank == src || rank == master)) || (i == -1 && master == src)) continue;
      if (oracle_find_segment(&views[rank], expert) < 0) continue;
      if (!oracle_take_rows(c, views, expert, rank, src, &stand[rank], &next, why)) return false;
    }
    for (; next < n; next++)
      if (c->topk[src][next] == expert)
        return snprintf(why, WHY, "expert %d misses token %lld of source %d", expert,
                        (long long)(next / c->topK), src),
               false;
  }
  for (int r = 0; r < c->nRanks; r++) {
    int segment = oracle_find_segment(&views[r], expert);
    if (segment >= 0 && stand[r] != views[r].segments.rows[segment])
      return snprintf(why, WHY, "expert %d on rank %d: rows left over", expert, r), false;
  }
  return true;
}

bool oracle_check_dispatch(oracleCase_t *c, const oracleView_t *views, char *why) {
  for (int r = 0; r < c->nRanks; r++) {
    if (!oracle_check_segments(c, r, &views[r], why)) return false;
    for (int64_t i = 0; i < (int64_t)c->nTokens[r] * c->topK; i++) c->rankOf[r][i] = -1;
  }
  for (int e = 0; e < c->nExperts; e++)
    if (!oracle_check_expert(c, views, e, why)) return false;
  return true;
}

/* ---- combine ---- */

void oracle_expert(const oracleCase_t *c, int expert, const unsigned char *in, unsigned char *out) {
  float factor = 0.25f + (float)(expert % 7) * 0.375f;
  if (expert % 3 == 0) factor = -factor;
  for (int i = 0; i < c->hidden; i++)
    oracle_store(c->dataType, out, i, oracle_load(c->dataType, in, i) * factor);
}

static float oracle_round(int32_t dataType, float value) {
  unsigned char bytes[4];
  oracle_store(dataType, bytes, 0, value);
  return oracle_load(dataType, bytes, 0);
}

/* products[k] * used[k] of one element -> the combined value. */
static float oracle_sum(const oracleCase_t *c, const float *products, const int32_t *topk,
                        const int32_t *rankOf, int src, bool partial) {
  float sum = 0.0f;
  for (int k = 0; k < c->topK; k++) {
    if (topk[k] < 0) continue;
    if (!partial || rankOf[k] == src) {
      sum += products[k];
      continue;
    }
    int n = 0;
    float part = 0.0f;
    bool first = true;
    for (int j = 0; j < c->topK; j++) {
      if (topk[j] < 0 || rankOf[j] != rankOf[k]) continue;
      if (j < k) first = false;
      part += products[j];
      n++;
    }
    if (first) sum += n > 1 ? oracle_round(c->dataType, part) : part;
  }
  return sum;
}

static void oracle_combine_token(const oracleCase_t *c, int src, int token, bool weighted, bool partial,
                                 const unsigned char *x, unsigned char *outs, unsigned char *y) {
  const int32_t *topk = c->topk[src] + (int64_t)token * c->topK;
  const int32_t *rankOf = c->rankOf[src] + (int64_t)token * c->topK;
  float products[ULTRAEP_MAX_TOPK] = {0};
  for (int k = 0; k < c->topK; k++)
    if (topk[k] >= 0) oracle_expert(c, topk[k], x, outs + (size_t)k * c->rowBytes);
  for (int i = 0; i < c->hidden; i++) {
    for (int k = 0; k < c->topK; k++) {
      if (topk[k] < 0) continue;
      float weight = weighted && c->weights[src] ? c->weights[src][(int64_t)token * c->topK + k] : 1.0f;
      products[k] = weight * oracle_load(c->dataType, outs + (size_t)k * c->rowBytes, i);
    }
    oracle_store(c->dataType, y, i, oracle_sum(c, products, topk, rankOf, src, partial));
  }
}

bool oracle_check_combine(const oracleCase_t *c, int src, const unsigned char *tokens, bool weighted,
                          bool partial, char *why) {
  unsigned char *x = malloc(c->rowBytes), *y = malloc(c->rowBytes);
  unsigned char *outs = malloc(c->rowBytes * (size_t)c->topK);
  bool good = true;
  for (int t = 0; good && t < c->nTokens[src]; t++) {
    oracle_fill_token(c, src, t, x);
    oracle_combine_token(c, src, t, weighted, partial, x, outs, y);
    good = memcmp(y, tokens + (size_t)t * c->rowBytes, c->rowBytes) == 0;
    if (!good) snprintf(why, WHY, "token %d of rank %d is not the sum of its rows", t, src);
  }
  free(outs);
  free(y);
  free(x);
  return good;
}
