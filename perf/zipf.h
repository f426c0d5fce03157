/* Made-up skewed traffic: the zipf family.
 *
 * Expert e = r * (E/R) + l, the l-th on rank r, has weight (r+1)^-a * (l+1)^-4. A token picks K different
 * experts one after another, each with probability proportional to its weight among those not yet picked
 * (which is Gumbel top-k). a is found by bisection so that the expected load of rank 0 is `ratio` times the
 * mean. That expectation follows from the experts' probabilities of being picked, p_e ~ 1 - exp(-w_e t) with
 * t such that they sum to K: the exponential race, whose K first arrivals are exactly such a pick, stopped at
 * a fixed time instead of at the K-th arrival.
 *
 * Random numbers: xoshiro256** (Blackman and Vigna) whose state is filled by splitmix64 from the seed, the
 * record and the rank, so a rank's tokens do not depend on which ranks were drawn before. Weights are drawn
 * from as integers.
 */
#ifndef ULTRAEP_PERF_ZIPF_H_
#define ULTRAEP_PERF_ZIPF_H_

#include "options.h"

typedef struct {
  uint64_t state[4];
} perfRandom_t;

void perfRandomSeed(perfRandom_t *random, uint64_t seed, uint64_t record, uint64_t rank);
uint64_t perfRandomNext(perfRandom_t *random);
/* Uniform in 0..bound-1, bound >= 1. */
uint64_t perfRandomBelow(perfRandom_t *random, uint64_t bound);

typedef struct zipf zipf_t;

/* Ratios from 1 to what K different experts a token allow: rank 0 gets min(K, E/R) of a token's K at most. */
int zipfCreate(zipf_t **zipf, int32_t nRanks, int32_t nExperts, int32_t topK, double ratio,
               perfError_t *error);
void zipfDestroy(zipf_t *zipf);
/* The exponent found. */
double zipfExponent(const zipf_t *zipf);
/* The experts of one token, experts[K], in the order picked. */
void zipfToken(zipf_t *zipf, perfRandom_t *random, int32_t *experts);
/* Loads of `tokens` tokens on every rank: loads[R][E]. */
void zipfLoads(zipf_t *zipf, uint64_t seed, uint64_t record, int32_t tokens, int32_t *loads);

#endif
