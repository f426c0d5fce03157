/* The experts: matrix products over the segments of a route, forward and backward. */
#include "moe.h"

typedef enum {
  MLP_GATE_UP,
  MLP_DOWN,
  MLP_ACT_GRAD,
  MLP_DOWN_GRAD,
  MLP_GATE_UP_GRAD,
  MLP_ROWS_GRAD
} mlpProduct_t;

static bool mlp_is_replica(const moeRank_t *rank, int32_t segment) {
  return segment >= moe_experts_per_rank(rank);
}

/* A segment's weights and gradients: the masters' as registered, the replicas' as the synchronisation of
 * weights has named them. */
static const uint16_t *mlp_weights(const moeRank_t *rank, const moeLayer_t *layer, int tensor,
                                   int32_t segment) {
  if (mlp_is_replica(rank, segment)) return layer->segments.weights[tensor][segment];
  return layer->weights[tensor] + segment * moe_tensor_count(moe_options(rank), tensor);
}
static float *mlp_grads(const moeRank_t *rank, const moeLayer_t *layer, int tensor, int32_t segment) {
  if (mlp_is_replica(rank, segment)) return layer->segments.grads[tensor][segment];
  return layer->grads[tensor] + segment * moe_tensor_count(moe_options(rank), tensor);
}

static int64_t mlp_round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

/* The product of one segment: n rows from row `at` on. */
static moeGemm_t mlp_product_make(const moeRank_t *rank, const moeLayer_t *layer, mlpProduct_t product,
                                  int32_t segment) {
  const moeOptions_t *options = moe_options(rank);
  const ultraepSegments_t *segments = &layer->segments;
  int64_t h = options->bench.hidden, i = options->inter, n = segments->rows[segment];
  int64_t at = segments->firstRow[segment];
  /* Weight gradients sum over the rows; those of padding are zeros, and cuBLAS is slow where their number is
   * odd. */
  int64_t padded = mlp_round_up(n, options->bench.alignment);
  /* A replica's gradients are written anew: there is nothing to add to. */
  bool isReplica = mlp_is_replica(rank, segment);
  const uint16_t *w1 = mlp_weights(rank, layer, 0, segment), *w2 = mlp_weights(rank, layer, 1, segment);
  uint16_t *rows = layer->rows + at * h, *rowsOut = rank->rowsOut + at * h;
  uint16_t *gateUp = layer->gateUp + at * 2 * i, *act = layer->act + at * i,
           *actGrad = rank->actGrad + at * i;
  switch (product) {
  case MLP_GATE_UP: /* GU = X W1^T */
    return (moeGemm_t){.m = n, .n = 2 * i, .k = h, .a = rows, .b = w1, .bTransposed = true, .c = gateUp};
  case MLP_DOWN: /* Y = A W2^T */
    return (moeGemm_t){.m = n, .n = h, .k = i, .a = act, .b = w2, .bTransposed = true, .c = rowsOut};
  case MLP_ACT_GRAD: /* dA = dY W2 */
    return (moeGemm_t){.m = n, .n = i, .k = h, .a = rowsOut, .b = w2, .c = actGrad};
  case MLP_DOWN_GRAD: /* dW2 += dY^T A */
    return (moeGemm_t){.m = h,
                       .n = i,
                       .k = padded,
                       .a = rowsOut,
                       .aTransposed = true,
                       .b = act,
                       .c = mlp_grads(rank, layer, 1, segment),
                       .isWide = true,
                       .accumulate = !isReplica};
  case MLP_GATE_UP_GRAD: /* dW1 += dGU^T X */
    return (moeGemm_t){.m = 2 * i,
                       .n = h,
                       .k = padded,
                       .a = gateUp,
                       .aTransposed = true,
                       .b = rows,
                       .c = mlp_grads(rank, layer, 0, segment),
                       .isWide = true,
                       .accumulate = !isReplica};
  default: /* dX = dGU W1, in place of X */
    return (moeGemm_t){.m = n, .n = h, .k = 2 * i, .a = gateUp, .b = w1, .c = rows};
  }
}

/* Makes *piece the nth piece of a product: of its rows, or, where it sums over rows, of those. False: there
 * are not so many. */
static bool mlp_piece_make(const moeRank_t *rank, const moeGemm_t *whole, int64_t nth, moeGemm_t *piece) {
  int64_t rows = whole->isWide ? whole->k : whole->m, most = moe_options(rank)->pieceRows, each = rows;
  if (most > 0) {
    int64_t nPieces = (rows + most - 1) / most;
    each = mlp_round_up((rows + nPieces - 1) / nPieces, MOE_PIECE_ALIGN);
  }
  int64_t first = nth * each, left = rows - first < each ? rows - first : each;
  if (left <= 0) return false;
  *piece = *whole;
  if (whole->isWide) {
    piece->a = (const uint16_t *)whole->a + first * whole->m;
    piece->b = (const uint16_t *)whole->b + first * whole->n;
    piece->k = left;
    piece->accumulate = whole->accumulate || nth > 0;
  } else {
    piece->a = (const uint16_t *)whole->a + first * whole->k;
    piece->c = (uint16_t *)whole->c + first * whole->n;
    piece->m = left;
  }
  return true;
}

/* Of segments first..end-1: the first pieces of all, then the second ones of those that have them, as pieces
 * of one sum may not be made at a time. */
static int mlp_products_of(moeRank_t *rank, const moeLayer_t *layer, mlpProduct_t product, int32_t first,
                           int32_t end) {
  for (int64_t nth = 0;; nth++) {
    int32_t count = 0;
    for (int32_t s = first; s < end; s++) {
      if (layer->segments.rows[s] == 0) continue;
      moeGemm_t whole = mlp_product_make(rank, layer, product, s);
      count += mlp_piece_make(rank, &whole, nth, &rank->gemms[count]);
    }
    if (count == 0) return 0;
    if (moe_run(rank)->ops->gemms(rank, rank->gemms, count) != 0) return -1;
  }
}
static int mlp_products_run(moeRank_t *rank, const moeLayer_t *layer, mlpProduct_t product) {
  return mlp_products_of(rank, layer, product, 0, layer->segments.nSegments);
}

/* The first products of a pass. Where the replicas' weights are under way: the masters', and then theirs. */
static int mlp_products_first(moeRank_t *rank, int32_t index, mlpProduct_t product, bool underWay) {
  const moeOps_t *ops = moe_run(rank)->ops;
  const moeLayer_t *layer = &rank->layers[index];
  int32_t nMasters = moe_experts_per_rank(rank);
  if (!underWay) return mlp_products_run(rank, layer, product);
  if (mlp_products_of(rank, layer, product, 0, nMasters) != 0) return -1;
  if (ops->sideEnd(rank) != 0 || ops->segmentsTake(rank, index) != 0) return -1;
  return mlp_products_of(rank, layer, product, nMasters, layer->segments.nSegments);
}

/* Element-wise steps go over all rows in use, padding included. */
int moeMlpForward(moeRank_t *rank, int32_t index) {
  const moeOps_t *ops = moe_run(rank)->ops;
  moeLayer_t *layer = &rank->layers[index];
  int64_t rows = layer->segments.totalRows[0];
  if (mlp_products_first(rank, index, MLP_GATE_UP, moe_overlaps(rank)) != 0) return -1;
  if (ops->swiglu(rank, layer->gateUp, layer->act, rows) != 0) return -1;
  return mlp_products_run(rank, layer, MLP_DOWN);
}

int moeMlpBackward(moeRank_t *rank, int32_t index, bool underWay) {
  const moeOps_t *ops = moe_run(rank)->ops;
  moeLayer_t *layer = &rank->layers[index];
  int64_t rows = layer->segments.totalRows[0];
  if (ops->rowsScale(rank, rank->rowsOut, layer->rowWeights, rows) != 0) return -1;
  if (mlp_products_first(rank, index, MLP_ACT_GRAD, underWay) != 0) return -1;
  if (mlp_products_run(rank, layer, MLP_DOWN_GRAD) != 0) return -1;
  if (ops->swigluBack(rank, layer->gateUp, rank->actGrad, rows) != 0) return -1;
  if (mlp_products_run(rank, layer, MLP_GATE_UP_GRAD) != 0) return -1;
  if (!moe_overlaps(rank)) return mlp_products_run(rank, layer, MLP_ROWS_GRAD);
  if (ops->sideBegin(rank) != 0) return -1;
  BENCH_CALL(rank->base, ultraepGradsReduce(layer->route, index, rank->side));
  if (mlp_products_run(rank, layer, MLP_ROWS_GRAD) != 0) return -1;
  return ops->sideEnd(rank);
}
