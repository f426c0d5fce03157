/* The reference: products and SwiGLU in plain C. An element of a product is a sum in fp32 in order of k that
 * no other row has a part in, so a row's results do not depend on where it is and what is beside it.
 * (Compiled without fused multiply-add, so that they do not depend on the loop it is in either.) */
#include "moe.h"
#include "moe_values.h"

#include <math.h>
#include <stdlib.h>

enum { HOST_COLUMNS = 64 };

typedef struct {
  float *panel; /* [k][HOST_COLUMNS] columns of B */
} hostRank_t;

static int host_open(moeRank_t *rank) {
  const moeOptions_t *options = moe_options(rank);
  int64_t most = rank->ownRows;
  hostRank_t *self = calloc(1, sizeof(*self));
  if (self == NULL) return benchRankFail(rank->base, "no memory for a rank");
  rank->device = self;
  if (options->bench.hidden > most) most = options->bench.hidden;
  if (2 * options->inter > most) most = 2 * options->inter;
  self->panel = benchAllocate((size_t)most, HOST_COLUMNS * sizeof(float));
  return self->panel == NULL ? benchRankFail(rank->base, "no memory for %lld columns", (long long)most) : 0;
}

static void host_close(moeRank_t *rank) {
  hostRank_t *self = rank->device;
  if (self != NULL) free(self->panel);
  free(self);
  rank->device = NULL;
}

static int host_values_fill(moeRank_t *rank, uint16_t *to, int64_t count, uint64_t seed, float scale) {
  (void)rank;
  for (int64_t i = 0; i < count; i++) to[i] = moeBfloat(moeValue(seed, (uint64_t)i) * scale);
  return 0;
}

/* ---- products ---- */

/* Columns first..first+HOST_COLUMNS of B as fp32, zeros beyond its last. */
static void host_panel_fill(const moeGemm_t *gemm, int64_t first, float *panel) {
  for (int64_t k = 0; k < gemm->k; k++) {
    for (int64_t j = 0; j < HOST_COLUMNS; j++) {
      int64_t at = gemm->bTransposed ? (first + j) * gemm->k + k : k * gemm->n + first + j;
      panel[k * HOST_COLUMNS + j] = first + j < gemm->n ? moeFloat(gemm->b[at]) : 0;
    }
  }
}

/* Row m of C, columns first..first+count. */
static void host_row_multiply(const moeGemm_t *gemm, int64_t m, int64_t first, int64_t count,
                              const float *panel) {
  float sums[HOST_COLUMNS] = {0}, *sumsTo = (float *)gemm->c + m * gemm->n + first;
  uint16_t *roundedTo = (uint16_t *)gemm->c + m * gemm->n + first;
  for (int64_t j = 0; gemm->accumulate && j < count; j++) sums[j] = sumsTo[j];
  for (int64_t k = 0; k < gemm->k; k++) {
    float a = moeFloat(gemm->a[gemm->aTransposed ? k * gemm->m + m : m * gemm->k + k]);
    for (int j = 0; j < HOST_COLUMNS; j++) sums[j] += a * panel[k * HOST_COLUMNS + j];
  }
  for (int64_t j = 0; gemm->isWide && j < count; j++) sumsTo[j] = sums[j];
  for (int64_t j = 0; !gemm->isWide && j < count; j++) roundedTo[j] = moeBfloat(sums[j]);
}

static int host_gemms(moeRank_t *rank, const moeGemm_t *gemms, int32_t count) {
  const hostRank_t *self = rank->device;
  for (const moeGemm_t *gemm = gemms; gemm < gemms + count; gemm++) {
    for (int64_t first = 0; first < gemm->n; first += HOST_COLUMNS) {
      int64_t left = gemm->n - first;
      host_panel_fill(gemm, first, self->panel);
      for (int64_t m = 0; m < gemm->m; m++)
        host_row_multiply(gemm, m, first, left < HOST_COLUMNS ? left : HOST_COLUMNS, self->panel);
    }
  }
  return 0;
}

/* ---- between them ---- */

static int host_rows_scale(moeRank_t *rank, uint16_t *rows, const float *weights, int64_t count) {
  int64_t hidden = moe_options(rank)->bench.hidden;
  for (int64_t r = 0; r < count; r++) {
    for (int64_t j = 0; j < hidden; j++)
      rows[r * hidden + j] = moeBfloat(moeFloat(rows[r * hidden + j]) * weights[r]);
  }
  return 0;
}

static int host_swiglu(moeRank_t *rank, const uint16_t *gateUp, uint16_t *act, int64_t count) {
  int64_t inter = moe_options(rank)->inter;
  for (int64_t r = 0; r < count; r++) {
    const uint16_t *gates = gateUp + r * 2 * inter, *ups = gates + inter;
    for (int64_t j = 0; j < inter; j++) {
      float gate = moeFloat(gates[j]), up = moeFloat(ups[j]);
      act[r * inter + j] = moeBfloat(gate / (1 + expf(-gate)) * up);
    }
  }
  return 0;
}

static int host_swiglu_back(moeRank_t *rank, uint16_t *gateUp, const uint16_t *actGrad, int64_t count) {
  int64_t inter = moe_options(rank)->inter;
  for (int64_t r = 0; r < count; r++) {
    uint16_t *gates = gateUp + r * 2 * inter, *ups = gates + inter;
    for (int64_t j = 0; j < inter; j++) {
      float gate = moeFloat(gates[j]), up = moeFloat(ups[j]), grad = moeFloat(actGrad[r * inter + j]);
      float sigmoid = 1 / (1 + expf(-gate));
      gates[j] = moeBfloat(grad * up * sigmoid * (1 + gate * (1 - sigmoid)));
      ups[j] = moeBfloat(grad * gate * sigmoid);
    }
  }
  return 0;
}

/* ---- times and segments ---- */

static int host_mark(moeRank_t *rank, int32_t index) {
  rank->markTimes[index] = perfSeconds();
  return 0;
}

/* They are there already. */
static int host_marks_read(moeRank_t *rank, int32_t count) {
  (void)rank;
  (void)count;
  return 0;
}

static int host_segments_ask(moeRank_t *rank, int32_t layer, cudaStream_t stream) {
  (void)stream;
  BENCH_CALL(rank->base, ultraepRouteSegments(rank->layers[layer].route, &rank->layers[layer].segments));
  return 0;
}

static int host_segments_take(moeRank_t *rank, int32_t layer) {
  (void)rank;
  (void)layer;
  return 0;
}

/* What is called is done at once. */
static int host_side(moeRank_t *rank) {
  (void)rank;
  return 0;
}

const moeOps_t moeHostOps = {.open = host_open,
                             .close = host_close,
                             .valuesFill = host_values_fill,
                             .mark = host_mark,
                             .marksRead = host_marks_read,
                             .segmentsAsk = host_segments_ask,
                             .segmentsTake = host_segments_take,
                             .gemms = host_gemms,
                             .sideBegin = host_side,
                             .sideEnd = host_side,
                             .rowsScale = host_rows_scale,
                             .swiglu = host_swiglu,
                             .swigluBack = host_swiglu_back};
