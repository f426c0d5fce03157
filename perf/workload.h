/* What each rank of an ultraep_perf run sends: tokens and the experts they are routed to. */
#ifndef ULTRAEP_PERF_WORKLOAD_H_
#define ULTRAEP_PERF_WORKLOAD_H_

#include "trace.h"
#include "zipf.h"

#define WORKLOAD_MAX_TOKENS (1 << 24) /* on one rank */

typedef struct {
  int32_t nRanks, nExperts, topK;
  char label[80];        /* of a record: step/layer/microbatch; else what made it */
  bool repeats;          /* some token is routed to one expert more than once */
  int32_t nominalTokens; /* mean tokens a rank, rounded */
  int32_t maxTokens;     /* most tokens of one rank */
  int64_t assignments;   /* of all ranks */
  int64_t maxSend;       /* assignments of the rank that sends most */
  int64_t maxBefore;     /* assignments of the rank that gets most with masters only */
  int32_t *nTokens;      /* [R] */
  int32_t **topk;        /* [R] -> [nTokens][topK], -1: unused */
} workload_t;

/* `tokens` on every rank, drawn as zipfLoads draws them. */
int workloadZipf(workload_t *workload, zipf_t *zipf, int32_t nRanks, int32_t nExperts, int32_t topK,
                 int32_t tokens, uint64_t seed, uint64_t record, perfError_t *error);
/* Tokens whose loads are exactly loads[R][E]: a rank with A assignments has ceil(A / topK) tokens, with
 * different experts each wherever no expert has more assignments than the rank has tokens. tokens >= 0 first
 * scales all counts to tokens * topK assignments a rank on average, by largest remainders; -1 takes them as
 * they are. The order of the tokens is drawn from the seed. */
int workloadRecord(workload_t *workload, int32_t nRanks, int32_t nExperts, int32_t topK, const int32_t *loads,
                   int32_t tokens, uint64_t seed, perfError_t *error);
/* The rows of a routing trace: rank r's token t is row (r * tokens + t) mod rows; tokens -1: the rows split
 * evenly, remainders to the lower ranks. */
int workloadRouting(workload_t *workload, const routingTrace_t *routing, int32_t nRanks, int32_t nExperts,
                    int32_t tokens, perfError_t *error);
typedef enum {
  /* All entries in use, over the ranks in order, are dealt from decks of the E experts, each deck shuffled,
   * so no two experts' loads differ by more than one. */
  WORKLOAD_IDEAL_EVEN,
  /* Every token draws its experts from all, as a router does whose scores are random numbers: how frameworks
   * force a balance. Experts' loads differ by chance. */
  WORKLOAD_IDEAL_RANDOM
} workloadIdeal_t;
extern const char *const workloadIdeals[2];
/* The tokens of `like` with their experts redrawn so that all ranks get the same. A token gets different
 * experts wherever there are enough. */
int workloadUniform(workload_t *workload, const workload_t *like, workloadIdeal_t ideal, uint64_t seed,
                    perfError_t *error);
void workloadFree(workload_t *workload);

#endif
