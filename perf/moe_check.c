/* Whether a run's results are right.
 *
 * Balanced results are compared with unbalanced ones. Besides, in every run, for any number of ranks and
 * replicas, <dW2, W2> = sum over rows of <dY, Y> = <dOut, out>     and     <dW1, W1> = sum over rows of <dX,
 * X> = <dx, x> since dW2 = dY^T A and Y = A W2^T, dW1 = dGU^T X and dX = dGU W1, and out and dx are sums of
 * rows. So a gradient that is lost or counted twice on its way home shows. The difference is measured against
 * the root of the sum of the tokens' squares, for the terms of either sum have both signs. */
#include "bench_job.h"
#include "moe.h"
#include "moe_values.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Limits, as ||a - b|| / ||b||; see the help of ultraep_moe. */
static const double checkLimitSums = 1e-2, checkLimitSample = 3e-2, checkLimitHostGrads = 1e-5,
                    checkLimitRounded = 1e-2;

/* A tensor in this program's memory: itself, or copied to scratch. Null where copying fails. */
static const void *check_look(moeRank_t *rank, const void *from, void *scratch, size_t bytes) {
  const benchOps_t *ops = rank->base->run->ops;
  if (!ops->mirrored) return from;
  return ops->copy(rank->base, scratch, from, bytes) == 0 ? scratch : NULL;
}

double moeDistance(double difference, double norm) {
  double ratio = sqrt(difference / norm);
  if (difference == 0) return 0;
  return norm <= 0 ? 1 : isfinite(ratio) ? ratio : DBL_MAX;
}

/* The same, and above 0 where any bit differs. */
static double check_distance(double difference, double norm, bool same) {
  return same ? 0 : fmax(moeDistance(difference, norm), DBL_MIN);
}

static double check_values_compare(const uint16_t *a, const uint16_t *b, int64_t count) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; i++) {
    double x = moeFloat(a[i]), y = moeFloat(b[i]);
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return check_distance(difference, norm, memcmp(a, b, (size_t)count * sizeof(*a)) == 0);
}

static double check_grads_compare(const float *a, const float *b, int64_t count) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < count; i++) {
    double x = a[i], y = b[i];
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return check_distance(difference, norm, memcmp(a, b, (size_t)count * sizeof(*a)) == 0);
}

/* ---- tokens ---- */

/* <a, b>, and the sum over tokens of the tokens' squares. */
static void check_tokens_multiply(const moeRank_t *rank, const uint16_t *a, const uint16_t *b, double *sum,
                                  double *squares) {
  int64_t hidden = moe_options(rank)->bench.hidden, tokens = moe_token_values(rank) / hidden;
  *sum = *squares = 0;
  for (int64_t token = 0; token < tokens; token++) {
    double product = 0;
    for (int64_t i = token * hidden; i < (token + 1) * hidden; i++)
      product += (double)moeFloat(a[i]) * (double)moeFloat(b[i]);
    *sum += product;
    *squares += product * product;
  }
}

/* One of out and dx: `from` holds it, `with` what it is multiplied with; scratch[2 * values]. */
static int check_tokens_look(moeRank_t *rank, const uint16_t *from, const uint16_t *with,
                             uint16_t **reference, double *distance, moeSum_t first, uint16_t *scratch) {
  int64_t values = moe_token_values(rank);
  size_t bytes = (size_t)values * sizeof(uint16_t);
  const uint16_t *mine = check_look(rank, from, scratch, bytes);
  const uint16_t *other = check_look(rank, with, scratch + values, bytes);
  if (mine == NULL || other == NULL) return -1;
  check_tokens_multiply(rank, other, mine, &rank->sums[first], &rank->sums[first + 1]);
  if (moe_run(rank)->kind == MOE_BALANCED) *distance = check_values_compare(mine, *reference, values);
  if (moe_run(rank)->kind != MOE_UNBALANCED) return 0;
  *reference = benchAllocate(1, bytes);
  if (*reference == NULL) return benchRankFail(rank->base, "no memory to keep %zu bytes of tokens", bytes);
  memcpy(*reference, mine, bytes);
  return 0;
}

static int check_tokens_all(moeRank_t *rank) {
  moeReference_t *reference = &moe_run(rank)->references[rank->base->local];
  int32_t nLayers = moe_options(rank)->nLayers;
  uint16_t *scratch = benchAllocate((size_t)moe_token_values(rank), 2 * sizeof(*scratch));
  if (scratch == NULL) return benchRankFail(rank->base, "no memory for checking tokens");
  int status = check_tokens_look(rank, rank->out[(nLayers - 1) % 2], rank->outGrad, &reference->out,
                                 &rank->check.out, MOE_SUM_OUT, scratch);
  if (status == 0)
    status = check_tokens_look(rank, rank->inGrad[0], rank->x, &reference->dx, &rank->check.dx, MOE_SUM_IN,
                               scratch);
  free(scratch);
  return status;
}

/* ---- weights' gradients ---- */

/* One tensor of one expert: `at` is its place in the reference. */
static int check_grad_look(moeRank_t *rank, const float *from, float *reference, int64_t count,
                           float *scratch) {
  size_t bytes = (size_t)count * sizeof(float);
  const float *grad = check_look(rank, from, scratch, bytes);
  if (grad == NULL) return -1;
  if (moe_run(rank)->kind == MOE_UNBALANCED) memcpy(reference, grad, bytes);
  if (moe_run(rank)->kind != MOE_BALANCED) return 0;
  rank->check.grads = fmax(rank->check.grads, check_grads_compare(grad, reference, count));
  return 0;
}

/* <dW, W> of one tensor of one expert. */
static int check_grad_multiply(moeRank_t *rank, const float *from, const uint16_t *weights, int64_t count,
                               double *sum, float *scratch) {
  const float *grad = check_look(rank, from, scratch, (size_t)count * sizeof(float));
  const uint16_t *weight = check_look(rank, weights, scratch + count, (size_t)count * sizeof(uint16_t));
  if (grad == NULL || weight == NULL) return -1;
  for (int64_t i = 0; i < count; i++) *sum += (double)grad[i] * (double)moeFloat(weight[i]);
  return 0;
}

static int check_grads_tensor(moeRank_t *rank, int tensor, float *scratch) {
  const moeOptions_t *options = moe_options(rank);
  int64_t count = moe_tensor_count(options, tensor);
  int32_t perRank = moe_experts_per_rank(rank), last = options->nLayers - 1;
  float *reference = moe_run(rank)->references[rank->base->local].grads[tensor];
  double *sum = &rank->sums[tensor == 0 ? MOE_SUM_GATE_UP : MOE_SUM_DOWN];
  for (int32_t l = 0; l <= last; l++) {
    const moeLayer_t *layer = &rank->layers[l];
    for (int64_t e = 0; e < perRank; e++) {
      const float *grad = layer->grads[tensor] + e * count;
      if (check_grad_look(rank, grad, reference + (l * perRank + e) * count, count, scratch) != 0) return -1;
      if (l == (tensor == 0 ? 0 : last) &&
          check_grad_multiply(rank, grad, layer->weights[tensor] + e * count, count, sum, scratch) != 0)
        return -1;
    }
  }
  return 0;
}

static int check_grads_all(moeRank_t *rank) {
  const moeOptions_t *options = moe_options(rank);
  moeReference_t *reference = &moe_run(rank)->references[rank->base->local];
  size_t experts = (size_t)options->nLayers * (size_t)moe_experts_per_rank(rank);
  float *scratch = benchAllocate((size_t)moe_tensor_count(options, 0), 2 * sizeof(*scratch));
  bool whole = scratch != NULL;
  for (int t = 0; t < MOE_TENSORS && moe_run(rank)->kind == MOE_UNBALANCED; t++) {
    reference->grads[t] = benchAllocate(experts, (size_t)moe_tensor_count(options, t) * sizeof(float));
    whole = whole && reference->grads[t] != NULL;
  }
  int status =
      whole ? 0 : benchRankFail(rank->base, "no memory to keep gradients for the check: -c 0 needs none");
  for (int t = 0; t < MOE_TENSORS && status == 0; t++) status = check_grads_tensor(rank, t, scratch);
  free(scratch);
  return status;
}

int moeRankCheck(moeRank_t *rank) {
  if (check_tokens_all(rank) != 0 || check_grads_all(rank) != 0) return -1;
  return moe_options(rank)->nLayers == 1 ? moeSampleCheck(rank) : 0;
}

/* ---- all ranks ---- */

static double check_identity(double left, double right, double squares) {
  if (left == right) return 0;
  return squares > 0 ? fabs(left - right) / sqrt(squares) : 1;
}

/* False also for what is no number. */
static bool check_within(double value, double limit) {
  return value <= limit;
}

moeCheck_t moeCheckMerge(const moeRun_t *run) {
  moeCheck_t check = {.compared = run->kind == MOE_BALANCED, .sampled = run->options->nLayers == 1};
  double sums[MOE_SUMS] = {0};
  bool bad = false, gpu = run->base.ops->mirrored;
  for (int32_t i = 0; i < run->base.nLocal; i++) {
    const moeRank_t *rank = &run->ranks[i];
    const moeCheck_t *mine = &rank->check;
    double exact = gpu || run->base.options->combineMode == ULTRAEP_COMBINE_PARTIAL ? checkLimitRounded : 0;
    bad = bad || !check_within(mine->out, exact) || !check_within(mine->dx, exact) ||
          !check_within(mine->grads, gpu ? checkLimitRounded : checkLimitHostGrads) ||
          !check_within(mine->sampleOut, checkLimitSample) || !check_within(mine->sampleDx, checkLimitSample);
    check.out = fmax(check.out, mine->out);
    check.dx = fmax(check.dx, mine->dx);
    check.grads = fmax(check.grads, mine->grads);
    check.sampleOut = fmax(check.sampleOut, mine->sampleOut);
    check.sampleDx = fmax(check.sampleDx, mine->sampleDx);
    for (int s = 0; s < MOE_SUMS; s++) sums[s] += rank->sums[s];
  }
  double *worst[] = {&check.out, &check.dx, &check.grads, &check.sampleOut, &check.sampleDx};
  for (size_t i = 0; i < sizeof(worst) / sizeof(worst[0]); i++) *worst[i] = benchJobMax(*worst[i]);
  for (int s = 0; s < MOE_SUMS; s++) sums[s] = benchJobAdd(sums[s]);
  check.identity = fmax(check_identity(sums[MOE_SUM_DOWN], sums[MOE_SUM_OUT], sums[MOE_SUM_OUT_SQUARE]),
                        check_identity(sums[MOE_SUM_GATE_UP], sums[MOE_SUM_IN], sums[MOE_SUM_IN_SQUARE]));
  bool finite = true;
  for (int s = 0; s < MOE_SUMS; s++) finite = finite && isfinite(sums[s]);
  check.bad = benchJobAny(bad) || !finite || !check_within(check.identity, checkLimitSums);
  return check;
}
