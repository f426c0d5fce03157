#include "zipf.h"

#include "ultraep_balancer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ZIPF_LOCAL_EXPONENT 4.0
#define ZIPF_MAX_EXPONENT 64.0
#define ZIPF_WEIGHT_SUM 0x1p60 /* what the integer weights sum to, about */

struct zipf {
  int32_t nRanks, nExperts, topK;
  double exponent;
  int32_t nLeaves; /* power of two >= E */
  /* A binary tree of weight sums, tree[1] the root, tree[nLeaves + e] expert e; 0 where an expert is picked.
   */
  uint64_t *tree;    /* [2 * nLeaves] */
  uint64_t *weights; /* [E] */
  double *picked;    /* [E] scratch of the bisection: weights */
};

/* ---- random numbers ---- */

static uint64_t random_splitmix(uint64_t *state) {
  uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

static uint64_t random_rotate(uint64_t x, int bits) {
  return (x << bits) | (x >> (64 - bits));
}

void perfRandomSeed(perfRandom_t *random, uint64_t seed, uint64_t record, uint64_t rank) {
  uint64_t mix = seed;
  mix = random_splitmix(&mix) ^ record;
  mix = random_splitmix(&mix) ^ rank;
  for (int i = 0; i < 4; i++) random->state[i] = random_splitmix(&mix);
}

uint64_t perfRandomNext(perfRandom_t *random) {
  uint64_t *s = random->state;
  uint64_t result = random_rotate(s[1] * 5, 7) * 9;
  uint64_t shifted = s[1] << 17;
  s[2] ^= s[0];
  s[3] ^= s[1];
  s[1] ^= s[2];
  s[0] ^= s[3];
  s[2] ^= shifted;
  s[3] = random_rotate(s[3], 45);
  return result;
}

uint64_t perfRandomBelow(perfRandom_t *random, uint64_t bound) {
  uint64_t threshold =
      -bound % bound; /* 2^64 mod bound: below it lie the values that would be drawn once too often */
  for (;;) {
    unsigned __int128 product = (unsigned __int128)perfRandomNext(random) * bound;
    if ((uint64_t)product >= threshold) return (uint64_t)(product >> 64);
  }
}

/* ---- the exponent ---- */

static void zipf_weights_fill(const zipf_t *zipf, double exponent, double *weights) {
  int32_t perRank = zipf->nExperts / zipf->nRanks;
  for (int32_t e = 0; e < zipf->nExperts; e++) {
    int32_t rank = e / perRank, local = e % perRank;
    weights[e] = pow(rank + 1, -exponent) * pow(local + 1, -ZIPF_LOCAL_EXPONENT);
  }
}

/* Expected picks of the first `count` experts when the race runs until t. */
static double zipf_picks_expect(const double *weights, int32_t count, double t) {
  double sum = 0;
  for (int32_t e = 0; e < count; e++) sum -= expm1(-weights[e] * t);
  return sum;
}

/* Expected load of rank 0 / mean. */
static double zipf_ratio_expect(const zipf_t *zipf, double exponent) {
  double *weights = zipf->picked;
  if (zipf->topK == zipf->nExperts) return 1.0;
  zipf_weights_fill(zipf, exponent, weights);
  double low = -10, high = 1000; /* log t: the least weight may be 1024^-64 */
  for (int i = 0; i < 60; i++) {
    double middle = 0.5 * (low + high);
    if (zipf_picks_expect(weights, zipf->nExperts, exp(middle)) < zipf->topK) {
      low = middle;
    } else {
      high = middle;
    }
  }
  double first = zipf_picks_expect(weights, zipf->nExperts / zipf->nRanks, exp(high));
  return first * zipf->nRanks / zipf->topK;
}

static int zipf_exponent_find(zipf_t *zipf, double ratio, perfError_t *error) {
  double reach = zipf_ratio_expect(zipf, ZIPF_MAX_EXPONENT);
  if (!(ratio >= 1) || ratio > reach) {
    return perfErrorSet(error,
                        "skew %g is outside 1..%.4g, the range with %d of %d experts a token on %d ranks",
                        ratio, reach, zipf->topK, zipf->nExperts, zipf->nRanks);
  }
  double low = 0, high = ZIPF_MAX_EXPONENT;
  for (int i = 0; i < 50; i++) {
    double middle = 0.5 * (low + high);
    if (zipf_ratio_expect(zipf, middle) < ratio) {
      low = middle;
    } else {
      high = middle;
    }
  }
  zipf->exponent = ratio == 1 ? 0 : high;
  return 0;
}

/* ---- the sampler ---- */

static void zipf_tree_build(zipf_t *zipf) {
  zipf_weights_fill(zipf, zipf->exponent, zipf->picked);
  double sum = 0;
  for (int32_t e = 0; e < zipf->nExperts; e++) sum += zipf->picked[e];
  for (int32_t e = 0; e < zipf->nExperts; e++) {
    /* At least 1, so that K experts can always be picked. */
    zipf->weights[e] = (uint64_t)(zipf->picked[e] / sum * ZIPF_WEIGHT_SUM) + 1;
    zipf->tree[zipf->nLeaves + e] = zipf->weights[e];
  }
  for (int32_t node = zipf->nLeaves - 1; node >= 1; node--) {
    zipf->tree[node] = zipf->tree[2 * node] + zipf->tree[2 * node + 1];
  }
}

static void zipf_leaf_add(zipf_t *zipf, int32_t expert, uint64_t weight) {
  for (int32_t node = zipf->nLeaves + expert; node >= 1; node /= 2) zipf->tree[node] += weight;
}

void zipfToken(zipf_t *zipf, perfRandom_t *random, int32_t *experts) {
  for (int32_t k = 0; k < zipf->topK; k++) {
    uint64_t at = perfRandomBelow(random, zipf->tree[1]);
    int32_t node = 1;
    while (node < zipf->nLeaves) {
      node *= 2;
      if (at >= zipf->tree[node]) at -= zipf->tree[node++];
    }
    experts[k] = node - zipf->nLeaves;
    zipf_leaf_add(zipf, experts[k], -zipf->weights[experts[k]]);
  }
  for (int32_t k = 0; k < zipf->topK; k++) zipf_leaf_add(zipf, experts[k], zipf->weights[experts[k]]);
}

void zipfLoads(zipf_t *zipf, uint64_t seed, uint64_t record, int32_t tokens, int32_t *loads) {
  int32_t experts[ULTRAEP_MAX_TOPK] = {0};
  memset(loads, 0, (size_t)zipf->nRanks * (size_t)zipf->nExperts * sizeof(loads[0]));
  for (int32_t rank = 0; rank < zipf->nRanks; rank++) {
    perfRandom_t random;
    perfRandomSeed(&random, seed, record, (uint64_t)rank);
    int32_t *row = loads + (size_t)rank * (size_t)zipf->nExperts;
    for (int32_t token = 0; token < tokens; token++) {
      zipfToken(zipf, &random, experts);
      for (int32_t k = 0; k < zipf->topK; k++) row[experts[k]]++;
    }
  }
}

double zipfExponent(const zipf_t *zipf) {
  return zipf->exponent;
}

static int zipf_arguments_check(int32_t nRanks, int32_t nExperts, int32_t topK, perfError_t *error) {
  if (nRanks < 1 || nRanks > ULTRAEP_MAX_RANKS) {
    return perfErrorSet(error, "%d ranks are outside 1..%d", nRanks, ULTRAEP_MAX_RANKS);
  }
  if (nExperts < 1 || nExperts > ULTRAEP_MAX_EXPERTS || nExperts % nRanks != 0) {
    return perfErrorSet(error, "%d experts: must be a multiple of %d ranks, at most %d", nExperts, nRanks,
                        ULTRAEP_MAX_EXPERTS);
  }
  if (topK < 1 || topK > ULTRAEP_MAX_TOPK || topK > nExperts) {
    return perfErrorSet(error, "top-%d of %d experts: must be at least 1, at most %d and at most the experts",
                        topK, nExperts, ULTRAEP_MAX_TOPK);
  }
  return 0;
}

int zipfCreate(zipf_t **zipf, int32_t nRanks, int32_t nExperts, int32_t topK, double ratio,
               perfError_t *error) {
  if (zipf_arguments_check(nRanks, nExperts, topK, error) != 0) return -1;
  zipf_t *made = calloc(1, sizeof(*made));
  if (made == NULL) return perfErrorSet(error, "no memory for %d experts", nExperts);
  *made = (zipf_t){.nRanks = nRanks, .nExperts = nExperts, .topK = topK, .nLeaves = 1};
  while (made->nLeaves < nExperts) made->nLeaves *= 2;
  made->tree = calloc(2 * (size_t)made->nLeaves, sizeof(made->tree[0]));
  made->weights = calloc((size_t)nExperts, sizeof(made->weights[0]));
  made->picked = calloc((size_t)nExperts, sizeof(made->picked[0]));
  if (made->tree == NULL || made->weights == NULL || made->picked == NULL) {
    perfErrorSet(error, "no memory for %d experts", nExperts);
    goto destroy_zipf;
  }
  if (zipf_exponent_find(made, ratio, error) != 0) goto destroy_zipf;
  zipf_tree_build(made);
  *zipf = made;
  return 0;

destroy_zipf:
  zipfDestroy(made);
  return -1;
}

void zipfDestroy(zipf_t *zipf) {
  if (zipf == NULL) return;
  free(zipf->tree);
  free(zipf->weights);
  free(zipf->picked);
  free(zipf);
}
