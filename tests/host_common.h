/* Threads as ranks, for the tests of the host backend. cmocka's asserts belong to the main thread; ranks use
 * CHECK, which records the first failure and leaves the rank's function, and the main thread asserts that
 * there was none. */
#ifndef HOST_COMMON_H_
#define HOST_COMMON_H_

#include "oracle.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct hostTeam {
  int nRanks;
  ultraepHostWorld_t world;
  void *arg;
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int nWaiting, generation;
  bool failed;
  char why[512];
} hostTeam_t;

typedef struct {
  hostTeam_t *team;
  int rank, nRanks;
  ultraepHostWorld_t world;
  void *arg;
} hostRankArg_t;

typedef void (*hostRankFn_t)(hostRankArg_t *self);

/* Makes a world, runs fn on every rank, destroys the world. Fails the test if a rank's CHECK failed. */
void host_run(int nRanks, hostRankFn_t fn, void *arg);

/* Waits for the other ranks; false when one of them has failed a CHECK. */
bool host_sync(hostRankArg_t *self);
void host_fail(hostRankArg_t *self, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#define CHECK(self, condition)                                                                               \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      host_fail(self, __FILE__, __LINE__, "%s (last error: %s)", #condition, ultraepGetLastError());         \
      return;                                                                                                \
    }                                                                                                        \
  } while (0)
#define CHECK_OK(self, call) CHECK_IS(self, call, ultraepSuccess)
#define CHECK_IS(self, call, expected)                                                                       \
  do {                                                                                                       \
    ultraepResult_t check_ = (call);                                                                         \
    if (check_ != (expected)) {                                                                              \
      host_fail(self, __FILE__, __LINE__, "%s is %s, not %s: %s", #call, ultraepGetErrorString(check_),      \
                ultraepGetErrorString(expected), ultraepGetLastError());                                     \
      return;                                                                                                \
    }                                                                                                        \
  } while (0)
#define SYNC(self)                                                                                           \
  do {                                                                                                       \
    if (!host_sync(self)) return;                                                                            \
  } while (0)

/* A small generator of random numbers, the same everywhere. */
typedef struct {
  uint64_t state;
} hostRandom_t;
uint64_t host_random(hostRandom_t *random);
/* In low..high, both included. */
int host_random_in(hostRandom_t *random, int low, int high);

uint64_t host_hash(uint64_t hash, const void *bytes, size_t n);
double host_seconds(void);

/* A config with small numbers that every test can start from: bfloat16 rows of 32 elements. */
ultraepConfig_t host_config(void);

/* Random routing for c's shape: kind picks how skewed it is. Fills topk, weights (unless null) and allocates
 * rankOf. */
enum { HOST_UNIFORM, HOST_SKEWED, HOST_ONE_EXPERT, HOST_SPARSE, HOST_KINDS };
void host_make_routing(oracleCase_t *c, hostRandom_t *random, int kind, int maxTokens, bool weights);
void host_free_routing(oracleCase_t *c);

#endif
