/* What gpu_schedule's ranks exchange: any rank can draw any pair's sizes, and knows any byte. */
#ifndef ULTRAEP_TESTS_GPU_SCHEDULE_PAIRS_H_
#define ULTRAEP_TESTS_GPU_SCHEDULE_PAIRS_H_

#include "planner_common.h"

#include <stddef.h>
#include <stdint.h>

#define ARENA ((size_t)24 << 20) /* of a rank, to send from and to receive into */

typedef struct {
  int n; /* transfers of the pair */
  size_t bytes[3], from[3], to[3];
} pair_t;

/* Every rank draws alike; offsets are the pairs' own parts of the arenas. */
static inline pair_t pair_draw(int nRanks, int round, int from, int to) {
  planner_random_t random = {(uint64_t)(round * 97 + from * 11 + to * 3 + nRanks)};
  size_t part = ARENA / (size_t)nRanks / 3;
  pair_t pair = {.n = planner_random_below(&random, 4)};
  if (from == to) pair.n = pair.n > 1;
  for (int i = 0; i < pair.n; i++) {
    size_t odd = planner_random_below(&random, 3) ? 0 : (size_t)planner_random_below(&random, 40);
    switch (planner_random_below(&random, 4)) {
    case 0:
      pair.bytes[i] = (size_t)planner_random_below(&random, 3) * 7;
      break;
    case 1:
      pair.bytes[i] = (size_t)planner_random_below(&random, 30000);
      break;
    default:
      pair.bytes[i] = 16 * (size_t)planner_random_below(&random, (int)(part / 16) - 8);
    }
    pair.from[i] = ((size_t)to * 3 + (size_t)i) * part + odd;
    pair.to[i] = ((size_t)from * 3 + (size_t)i) * part + (planner_random_below(&random, 4) ? odd : 0);
  }
  return pair;
}

static inline unsigned char value(int round, int from, size_t at) {
  uint64_t x = (uint64_t)at * 0x9e3779b97f4a7c15u + (uint64_t)(round * 131 + from);
  return (unsigned char)(x >> 29);
}

#endif
