#include "workload.h"

#include "ultraep_balancer.h"

#include <stdlib.h>
#include <string.h>

/* ---- made and freed ---- */

static int workload_init(workload_t *workload, int32_t nRanks, int32_t nExperts, int32_t topK,
                         perfError_t *error) {
  if (topK < 1 || topK > ULTRAEP_MAX_TOPK) {
    return perfErrorSet(error, "top-%d is outside 1..%d", topK, ULTRAEP_MAX_TOPK);
  }
  if (nExperts % nRanks != 0)
    return perfErrorSet(error, "%d experts are no multiple of %d ranks", nExperts, nRanks);
  *workload = (workload_t){.nRanks = nRanks, .nExperts = nExperts, .topK = topK};
  workload->nTokens = calloc((size_t)nRanks, sizeof(workload->nTokens[0]));
  workload->topk = calloc((size_t)nRanks, sizeof(workload->topk[0]));
  if (workload->nTokens == NULL || workload->topk == NULL) {
    workloadFree(workload);
    return perfErrorSet(error, "no memory for %d ranks", nRanks);
  }
  return 0;
}

void workloadFree(workload_t *workload) {
  for (int32_t rank = 0; workload->topk != NULL && rank < workload->nRanks; rank++)
    free(workload->topk[rank]);
  free(workload->topk);
  free(workload->nTokens);
  workload->topk = NULL;
  workload->nTokens = NULL;
}

/* Room for a rank's tokens, all entries unused. */
static int workload_rank_allocate(workload_t *workload, int32_t rank, int64_t tokens, perfError_t *error) {
  if (tokens > WORKLOAD_MAX_TOKENS) {
    return perfErrorSet(error, "%lld tokens on rank %d are more than %d: ask for fewer with --tokens",
                        (long long)tokens, rank, WORKLOAD_MAX_TOKENS);
  }
  size_t entries = (size_t)tokens * (size_t)workload->topK;
  int32_t *topk = calloc(entries == 0 ? 1 : entries, sizeof(topk[0]));
  if (topk == NULL) return perfErrorSet(error, "no memory for %lld tokens", (long long)tokens);
  for (size_t i = 0; i < entries; i++) topk[i] = -1;
  workload->topk[rank] = topk;
  workload->nTokens[rank] = (int32_t)tokens;
  return 0;
}

static bool workload_token_repeats(const int32_t *experts, int32_t topK) {
  for (int32_t k = 1; k < topK; k++) {
    for (int32_t i = 0; experts[k] >= 0 && i < k; i++) {
      if (experts[i] == experts[k]) return true;
    }
  }
  return false;
}

/* Fills in what follows from the routing. */
static int workload_finish(workload_t *workload, perfError_t *error) {
  int64_t *loads = calloc((size_t)workload->nRanks, sizeof(loads[0])); /* of each rank, masters only */
  if (loads == NULL) return perfErrorSet(error, "no memory for %d ranks", workload->nRanks);
  int64_t tokens = 0;
  int32_t perRank = workload->nExperts / workload->nRanks;
  for (int32_t rank = 0; rank < workload->nRanks; rank++) {
    int64_t sent = 0, entries = (int64_t)workload->nTokens[rank] * workload->topK;
    for (int64_t i = 0; i < entries; i++) {
      int32_t expert = workload->topk[rank][i];
      if (i % workload->topK == 0 && workload_token_repeats(&workload->topk[rank][i], workload->topK)) {
        workload->repeats = true;
      }
      if (expert < 0) continue;
      loads[expert / perRank]++;
      sent++;
    }
    tokens += workload->nTokens[rank];
    workload->assignments += sent;
    if (sent > workload->maxSend) workload->maxSend = sent;
    if (workload->nTokens[rank] > workload->maxTokens) workload->maxTokens = workload->nTokens[rank];
  }
  for (int32_t rank = 0; rank < workload->nRanks; rank++) {
    if (loads[rank] > workload->maxBefore) workload->maxBefore = loads[rank];
  }
  workload->nominalTokens = (int32_t)((tokens + workload->nRanks / 2) / workload->nRanks);
  free(loads);
  return 0;
}

/* ---- zipf ---- */

int workloadZipf(workload_t *workload, zipf_t *zipf, int32_t nRanks, int32_t nExperts, int32_t topK,
                 int32_t tokens, uint64_t seed, uint64_t record, perfError_t *error) {
  if (workload_init(workload, nRanks, nExperts, topK, error) != 0) return -1;
  snprintf(workload->label, sizeof(workload->label), "zipf");
  for (int32_t rank = 0; rank < nRanks; rank++) {
    perfRandom_t random;
    if (workload_rank_allocate(workload, rank, tokens, error) != 0) goto free_workload;
    perfRandomSeed(&random, seed, record, (uint64_t)rank);
    for (int32_t token = 0; token < tokens; token++) {
      zipfToken(zipf, &random, workload->topk[rank] + (size_t)token * (size_t)topK);
    }
  }
  if (workload_finish(workload, error) != 0) goto free_workload;
  return 0;

free_workload:
  workloadFree(workload);
  return -1;
}

/* ---- load records ---- */

/* How far a share is from what was wanted, to order by. */
typedef struct {
  double missing;
  int32_t index;
} workloadOrder_t;

static int workload_order_compare(const void *a, const void *b) {
  const workloadOrder_t *x = a, *y = b;
  if (x->missing != y->missing) return x->missing < y->missing ? 1 : -1;
  return (x->index > y->index) - (x->index < y->index);
}

/* Rounds wanted[n] to shares[n], each >= 0, that add up to total; wanted adds up to about that. Ties go to
 * the lower index. order is scratch for n. */
static void workload_round(const double *wanted, int32_t n, int64_t total, int64_t *shares,
                           workloadOrder_t *order) {
  int64_t left = total;
  for (int32_t i = 0; i < n; i++) {
    shares[i] = wanted[i] > 0 ? (int64_t)wanted[i] : 0;
    order[i] = (workloadOrder_t){.missing = wanted[i] - (double)shares[i], .index = i};
    left -= shares[i];
  }
  qsort(order, (size_t)n, sizeof(order[0]), workload_order_compare);
  for (int32_t i = 0; left > 0; i = (i + 1) % n, left--) shares[order[i].index]++;
  for (int32_t i = n - 1; left<0; i = i> 0 ? i - 1 : n - 1) {
    if (shares[order[i].index] == 0) continue;
    shares[order[i].index]--;
    left++;
  }
}

/* Lays counts[E] out as tokens: assignment p of the rank, experts in order, is entry p / n of token p mod n.
 * An expert with at most n assignments meets a token once. Then shuffles the tokens, and turns each one's
 * entries. */
static void workload_tokens_lay(workload_t *workload, int32_t rank, const int64_t *counts, uint64_t seed) {
  int32_t topK = workload->topK, nTokens = workload->nTokens[rank], *topk = workload->topk[rank];
  int64_t at = 0;
  for (int32_t expert = 0; expert < workload->nExperts; expert++) {
    for (int64_t i = 0; i < counts[expert]; i++, at++) topk[at % nTokens * topK + at / nTokens] = expert;
  }
  perfRandom_t random;
  perfRandomSeed(&random, seed, (uint64_t)rank, 0);
  for (int32_t token = nTokens - 1; token > 0; token--) {
    int32_t other = (int32_t)perfRandomBelow(&random, (uint64_t)token + 1);
    int32_t turn = (int32_t)perfRandomBelow(&random, (uint64_t)topK), mixed[ULTRAEP_MAX_TOPK];
    int32_t *a = topk + (size_t)token * (size_t)topK, *b = topk + (size_t)other * (size_t)topK;
    for (int32_t k = 0; k < topK; k++) mixed[k] = b[(k + turn) % topK];
    memcpy(b, a, (size_t)topK * sizeof(a[0]));
    memcpy(a, mixed, (size_t)topK * sizeof(a[0]));
  }
}

typedef struct {
  double *wanted;         /* [max(R, E)] */
  double *carried;        /* [E] what earlier ranks' rounding left over */
  int64_t *sent;          /* [R] assignments in the record */
  int64_t *target;        /* [R] assignments after scaling */
  int64_t *counts;        /* [E] of one rank, after scaling */
  workloadOrder_t *order; /* [max(R, E)] */
} workloadScratch_t;

static int workload_scratch_allocate(workloadScratch_t *scratch, int32_t nRanks, int32_t nExperts,
                                     perfError_t *error) {
  scratch->wanted = calloc((size_t)nExperts, sizeof(double)); /* E >= R */
  scratch->carried = calloc((size_t)nExperts, sizeof(double));
  scratch->sent = calloc((size_t)nRanks, sizeof(int64_t));
  scratch->target = calloc((size_t)nRanks, sizeof(int64_t));
  scratch->counts = calloc((size_t)nExperts, sizeof(int64_t));
  scratch->order = calloc((size_t)nExperts, sizeof(scratch->order[0]));
  if (scratch->wanted == NULL || scratch->carried == NULL || scratch->sent == NULL ||
      scratch->target == NULL || scratch->counts == NULL || scratch->order == NULL) {
    return perfErrorSet(error, "no memory for %d ranks, %d experts", nRanks, nExperts);
  }
  return 0;
}

static void workload_scratch_free(workloadScratch_t *scratch) {
  free(scratch->wanted);
  free(scratch->carried);
  free(scratch->sent);
  free(scratch->target);
  free(scratch->counts);
  free(scratch->order);
}

/* Fills sent and target. */
static void workload_targets_set(const workload_t *workload, const int32_t *loads, int32_t tokens,
                                 workloadScratch_t *scratch) {
  int32_t nRanks = workload->nRanks, nExperts = workload->nExperts;
  int64_t sum = 0, total = (int64_t)tokens * workload->topK * nRanks;
  for (int32_t rank = 0; rank < nRanks; rank++) {
    const int32_t *row = loads + (size_t)rank * (size_t)nExperts;
    for (int32_t e = 0; e < nExperts; e++) scratch->sent[rank] += row[e];
    sum += scratch->sent[rank];
  }
  memcpy(scratch->target, scratch->sent, (size_t)nRanks * sizeof(scratch->sent[0]));
  if (tokens < 0 || sum == 0) return;
  for (int32_t rank = 0; rank < nRanks; rank++) {
    scratch->wanted[rank] = (double)scratch->sent[rank] * (double)total / (double)sum;
  }
  workload_round(scratch->wanted, nRanks, total, scratch->target, scratch->order);
}

/* Scales one rank's counts into scratch->counts, and carries what rounding left. */
static void workload_counts_scale(const workload_t *workload, const int32_t *row, int32_t rank,
                                  workloadScratch_t *scratch) {
  double sent = (double)scratch->sent[rank], target = (double)scratch->target[rank];
  for (int32_t e = 0; e < workload->nExperts; e++) {
    scratch->wanted[e] = scratch->carried[e] + (sent > 0 ? row[e] * target / sent : 0);
  }
  workload_round(scratch->wanted, workload->nExperts, scratch->target[rank], scratch->counts, scratch->order);
  for (int32_t e = 0; e < workload->nExperts; e++) {
    scratch->carried[e] = scratch->wanted[e] - (double)scratch->counts[e];
  }
}

int workloadRecord(workload_t *workload, int32_t nRanks, int32_t nExperts, int32_t topK, const int32_t *loads,
                   int32_t tokens, uint64_t seed, perfError_t *error) {
  workloadScratch_t scratch = {0};
  if (workload_init(workload, nRanks, nExperts, topK, error) != 0) return -1;
  if (workload_scratch_allocate(&scratch, nRanks, nExperts, error) != 0) goto free_workload;
  workload_targets_set(workload, loads, tokens, &scratch);
  for (int32_t rank = 0; rank < nRanks; rank++) {
    const int32_t *row = loads + (size_t)rank * (size_t)nExperts;
    int64_t rankTokens = (scratch.target[rank] + topK - 1) / topK;
    if (workload_rank_allocate(workload, rank, rankTokens, error) != 0) goto free_workload;
    if (tokens >= 0) {
      workload_counts_scale(workload, row, rank, &scratch);
    } else {
      for (int32_t e = 0; e < nExperts; e++) scratch.counts[e] = row[e];
    }
    if (rankTokens > 0) workload_tokens_lay(workload, rank, scratch.counts, seed);
  }
  if (workload_finish(workload, error) != 0) goto free_workload;
  workload_scratch_free(&scratch);
  return 0;

free_workload:
  workload_scratch_free(&scratch);
  workloadFree(workload);
  return -1;
}

/* ---- routing traces ---- */

int workloadRouting(workload_t *workload, const routingTrace_t *routing, int32_t nRanks, int32_t nExperts,
                    int32_t tokens, perfError_t *error) {
  int32_t topK = routing->topK;
  if (routing->maxExpert >= nExperts) {
    return perfErrorSet(error, "the routing trace names expert %d of %d", routing->maxExpert, nExperts);
  }
  if (workload_init(workload, nRanks, nExperts, topK, error) != 0) return -1;
  snprintf(workload->label, sizeof(workload->label), "routing");
  int64_t next = 0;
  for (int32_t rank = 0; rank < nRanks; rank++) {
    int64_t split = routing->nTokens / nRanks + (rank < routing->nTokens % nRanks ? 1 : 0);
    int64_t count = tokens >= 0 ? tokens : split;
    if (workload_rank_allocate(workload, rank, count, error) != 0) goto free_workload;
    for (int64_t token = 0; token < count; token++) {
      memcpy(workload->topk[rank] + token * topK, routing->experts + next % routing->nTokens * topK,
             (size_t)topK * sizeof(routing->experts[0]));
      next++;
    }
  }
  if (workload_finish(workload, error) != 0) goto free_workload;
  return 0;

free_workload:
  workloadFree(workload);
  return -1;
}

/* ---- uniform traffic ---- */

typedef struct {
  perfRandom_t random;
  int32_t nExperts, next; /* cards[next..] are still to be dealt */
  int32_t *cards;         /* [E] */
} workloadDeck_t;

static void workload_swap(int32_t *a, int32_t *b) {
  int32_t kept = *a;
  *a = *b;
  *b = kept;
}

static void workload_deck_shuffle(workloadDeck_t *deck) {
  for (int32_t i = deck->nExperts - 1; i > 0; i--)
    workload_swap(&deck->cards[i], &deck->cards[perfRandomBelow(&deck->random, (uint64_t)i + 1)]);
  deck->next = 0;
}

/* The next card that is not among held[count]; where there is none, the next. */
static int32_t workload_deck_deal(workloadDeck_t *deck, const int32_t *held, int32_t count) {
  if (deck->next == deck->nExperts) workload_deck_shuffle(deck);
  for (int32_t i = deck->next; i < deck->nExperts; i++) {
    int32_t k = 0;
    while (k < count && held[k] != deck->cards[i]) k++;
    if (k < count) continue;
    workload_swap(&deck->cards[deck->next], &deck->cards[i]);
    break;
  }
  return deck->cards[deck->next++];
}

/* Any card of the whole deck that the token does not have yet; where it has all, any. */
static int32_t workload_deck_draw(workloadDeck_t *deck) {
  if (deck->next == deck->nExperts) deck->next = 0;
  int32_t left = deck->nExperts - deck->next;
  int32_t *drawn = &deck->cards[deck->next + (int32_t)perfRandomBelow(&deck->random, (uint64_t)left)];
  workload_swap(&deck->cards[deck->next], drawn);
  return deck->cards[deck->next++];
}

static void workload_tokens_deal(workload_t *workload, const workload_t *like, int32_t rank,
                                 workloadIdeal_t ideal, workloadDeck_t *deck) {
  int32_t topK = workload->topK;
  for (int32_t token = 0; token < workload->nTokens[rank]; token++) {
    const int32_t *from = like->topk[rank] + (size_t)token * (size_t)topK;
    int32_t *to = workload->topk[rank] + (size_t)token * (size_t)topK;
    if (ideal == WORKLOAD_IDEAL_RANDOM) deck->next = 0;
    /* Entries not dealt yet are -1, which is no card. */
    for (int32_t k = 0; k < topK; k++) {
      if (from[k] < 0) continue;
      to[k] = ideal == WORKLOAD_IDEAL_RANDOM ? workload_deck_draw(deck) : workload_deck_deal(deck, to, topK);
    }
  }
}

const char *const workloadIdeals[2] = {"even", "random"};

int workloadUniform(workload_t *workload, const workload_t *like, workloadIdeal_t ideal, uint64_t seed,
                    perfError_t *error) {
  workloadDeck_t deck = {.nExperts = like->nExperts, .next = like->nExperts};
  if (workload_init(workload, like->nRanks, like->nExperts, like->topK, error) != 0) return -1;
  snprintf(workload->label, sizeof(workload->label), "%s", like->label);
  deck.cards = calloc((size_t)like->nExperts, sizeof(deck.cards[0]));
  if (deck.cards == NULL) {
    perfErrorSet(error, "no memory for %d experts", like->nExperts);
    goto free_workload;
  }
  for (int32_t e = 0; e < like->nExperts; e++) deck.cards[e] = e;
  perfRandomSeed(&deck.random, seed, 0, (uint64_t)like->nRanks);
  for (int32_t rank = 0; rank < like->nRanks; rank++) {
    if (workload_rank_allocate(workload, rank, like->nTokens[rank], error) != 0) goto free_deck;
    workload_tokens_deal(workload, like, rank, ideal, &deck);
  }
  if (workload_finish(workload, error) != 0) goto free_deck;
  free(deck.cards);
  return 0;

free_deck:
  free(deck.cards);
free_workload:
  workloadFree(workload);
  return -1;
}
