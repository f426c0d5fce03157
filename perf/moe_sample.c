/* One token of a rank, calculated in double from the tensors' definition alone: no ranks, routes, rows or
 * rounding of what is in between. */
#include "moe.h"
#include "moe_values.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  const moeOptions_t *options;
  double *x, *outGrad, *out, *inGrad; /* [h] */
  double *gateUp, *gateUpGrad;        /* [2i] */
  double *act, *actGrad;              /* [i] */
  uint16_t *row;                      /* [h] */
} sample_t;

static double sample_value(uint64_t seed, int64_t index, float scale) {
  return moeFloat(moeBfloat(moeValue(seed, (uint64_t)index) * scale));
}

/* Lays the arrays into zeroed memory. */
enum { SAMPLE_HIDDEN = 4, SAMPLE_INTER = 6 }; /* in all */
static sample_t sample_lay(const moeOptions_t *options, double *memory, uint16_t *row) {
  size_t h = (size_t)options->bench.hidden, i = (size_t)options->inter;
  sample_t sample = {.options = options, .x = memory, .row = row};
  sample.outGrad = sample.x + h;
  sample.out = sample.outGrad + h;
  sample.inGrad = sample.out + h;
  sample.gateUp = sample.inGrad + h;
  sample.gateUpGrad = sample.gateUp + 2 * i;
  sample.act = sample.gateUpGrad + 2 * i;
  sample.actGrad = sample.act + i;
  return sample;
}

/* out += weight * expert(x). */
static void sample_forward(sample_t *sample, int32_t expert, double weight) {
  int64_t h = sample->options->bench.hidden, i = sample->options->inter;
  float scales[] = {moeWeightScale(sample->options, 0), moeWeightScale(sample->options, 1)};
  uint64_t seeds[] = {moeWeightSeed(0, expert, 0), moeWeightSeed(0, expert, 1)};
  for (int64_t j = 0; j < 2 * i; j++) {
    sample->gateUp[j] = 0;
    for (int64_t c = 0; c < h; c++)
      sample->gateUp[j] += sample->x[c] * sample_value(seeds[0], j * h + c, scales[0]);
  }
  for (int64_t j = 0; j < i; j++)
    sample->act[j] = sample->gateUp[j] / (1 + exp(-sample->gateUp[j])) * sample->gateUp[i + j];
  for (int64_t c = 0; c < h; c++) {
    double y = 0;
    for (int64_t j = 0; j < i; j++) y += sample->act[j] * sample_value(seeds[1], c * i + j, scales[1]);
    sample->out[c] += weight * y;
  }
}

/* inGrad += the gradient through the expert that sample_forward was last called for. */
static void sample_backward(sample_t *sample, int32_t expert, double weight) {
  int64_t h = sample->options->bench.hidden, i = sample->options->inter;
  float scales[] = {moeWeightScale(sample->options, 0), moeWeightScale(sample->options, 1)};
  uint64_t seeds[] = {moeWeightSeed(0, expert, 0), moeWeightSeed(0, expert, 1)};
  for (int64_t j = 0; j < i; j++) sample->actGrad[j] = 0;
  for (int64_t c = 0; c < h; c++) {
    for (int64_t j = 0; j < i; j++)
      sample->actGrad[j] += weight * sample->outGrad[c] * sample_value(seeds[1], c * i + j, scales[1]);
  }
  for (int64_t j = 0; j < i; j++) {
    double gate = sample->gateUp[j], up = sample->gateUp[i + j], sigmoid = 1 / (1 + exp(-gate));
    sample->gateUpGrad[j] = sample->actGrad[j] * up * (sigmoid + gate * sigmoid * (1 - sigmoid));
    sample->gateUpGrad[i + j] = sample->actGrad[j] * gate * sigmoid;
  }
  for (int64_t j = 0; j < 2 * i; j++) {
    for (int64_t c = 0; c < h; c++)
      sample->inGrad[c] += sample->gateUpGrad[j] * sample_value(seeds[0], j * h + c, scales[0]);
  }
}

/* ||row - wanted|| / ||wanted|| of a token's row, wherever it is. */
static int sample_compare(moeRank_t *rank, sample_t *sample, const uint16_t *from, const double *wanted,
                          double *distance) {
  int64_t h = sample->options->bench.hidden;
  double difference = 0, norm = 0;
  if (rank->base->run->ops->copy(rank->base, sample->row, from, (size_t)h * sizeof(uint16_t)) != 0) return -1;
  for (int64_t c = 0; c < h; c++) {
    double apart = moeFloat(sample->row[c]) - wanted[c];
    difference += apart * apart;
    norm += wanted[c] * wanted[c];
  }
  *distance = moeDistance(difference, norm);
  return 0;
}

static int sample_token_check(moeRank_t *rank, sample_t *sample, int64_t token) {
  const workload_t *workload = rank->base->run->workload;
  int64_t h = sample->options->bench.hidden, topK = workload->topK;
  int32_t number = rank->base->rank;
  for (int64_t c = 0; c < h; c++) {
    sample->x[c] = sample_value(moeTokenSeed(number, MOE_TOKEN_X), token * h + c, moeTokenScale);
    sample->outGrad[c] = sample_value(moeTokenSeed(number, MOE_TOKEN_GRAD), token * h + c, moeTokenScale);
  }
  for (int64_t k = 0; k < topK; k++) {
    int32_t expert = workload->topk[number][token * topK + k];
    double weight = rank->hostTopkWeights[token * topK + k];
    if (expert < 0) continue;
    sample_forward(sample, expert, weight);
    sample_backward(sample, expert, weight);
  }
  if (sample_compare(rank, sample, rank->out[0] + token * h, sample->out, &rank->check.sampleOut) != 0)
    return -1;
  return sample_compare(rank, sample, rank->inGrad[0] + token * h, sample->inGrad, &rank->check.sampleDx);
}

int moeSampleCheck(moeRank_t *rank) {
  const moeOptions_t *options = moe_options(rank);
  size_t h = (size_t)options->bench.hidden, i = (size_t)options->inter;
  int32_t tokens = rank->base->run->workload->nTokens[rank->base->rank];
  int status = -1;
  if (tokens == 0) return 0;
  double *memory = calloc(SAMPLE_HIDDEN * h + SAMPLE_INTER * i, sizeof(*memory));
  uint16_t *row = calloc(h, sizeof(*row));
  if (memory == NULL || row == NULL) {
    benchRankFail(rank->base, "no memory for checking a token");
  } else {
    sample_t sample = sample_lay(options, memory, row);
    status = sample_token_check(rank, &sample, tokens / 2);
  }
  free(row);
  free(memory);
  return status;
}
