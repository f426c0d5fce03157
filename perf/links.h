/* ultraep_links: what GPUs copy within themselves and between one another, and how long a flag takes. */
#ifndef ULTRAEP_PERF_LINKS_H_
#define ULTRAEP_PERF_LINKS_H_

#include "options.h"

enum { LINKS_MAX_GPUS = 16, LINKS_MAX_BUDGETS = 16 };

typedef struct {
  int32_t nGpus;                                /* the first of them; 0: all */
  int64_t bytes;                                /* of one copy */
  int32_t rounds;                               /* timed copies */
  int32_t trips;                                /* of the flags */
  int32_t nBudgets, budgets[LINKS_MAX_BUDGETS]; /* thread blocks of copies by a kernel */
  int32_t list;
  const char *jsonPath;
} linksOptions_t;

typedef struct {
  char name[64], uuid[48];
  int32_t sms, major, minor; /* compute capability 9.0: 9 and 0 */
} linksGpu_t;

/* How a kernel copies: on the sender, storing to the receiver's memory, or on the receiver, loading from the
 * sender's; plain, each thread 16 bytes at a time, or by bulk copies. Within one GPU LINKS_STORE and
 * LINKS_STORE_BULK. */
typedef enum { LINKS_STORE, LINKS_STORE_BULK, LINKS_LOAD, LINKS_LOAD_BULK, LINKS_WAYS } linksWay_t;

/* Bytes a second from one GPU to another; within one GPU bytes read and written. 0: not measured. */
typedef struct {
  bool reachable; /* kernels can use the other GPU's memory */
  double copy;    /* by the copy engines */
  double both;    /* while they copy as much the other way */
  double kernel[LINKS_WAYS][LINKS_MAX_BUDGETS];
  double kernelBoth[LINKS_WAYS][LINKS_MAX_BUDGETS]; /* while as many blocks copy as much the other way */
  double flagUs;                                    /* to the other GPU and back */
} linksPair_t;

typedef struct {
  int32_t nGpus, driver, runtime; /* versions as CUDA has them: 13000 */
  linksGpu_t gpus[LINKS_MAX_GPUS];
  linksPair_t pairs[LINKS_MAX_GPUS][LINKS_MAX_GPUS]; /* [from][to] */
} linksFigures_t;

/* links_report.c. What keeps the time modest with more than two GPUs: timed copies of each kind by a kernel,
 * and between which GPUs kernels copy both ways at once. */
int32_t linksKernelRounds(const linksOptions_t *options, int32_t nGpus);
bool linksKernelBoth(int32_t nGpus, int32_t from, int32_t to);

/* links_cuda.c. Fills in GPUs and versions; fails where no GPU can be used. */
int linksFind(const linksOptions_t *options, linksFigures_t *figures, perfError_t *error);
/* Fills in the pairs. */
int linksMeasure(const linksOptions_t *options, linksFigures_t *figures, perfError_t *error);

/* links_report.c */
void linksList(const linksFigures_t *figures);
int linksReport(const linksOptions_t *options, const linksFigures_t *figures, perfError_t *error);

#endif
