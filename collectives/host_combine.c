/* Combine on the host: a token's rows are read from where they are, added in fp32, and written once. */
#include "host.h"

#define PHASE "combine"

typedef struct {
  const backendExchange_t *exchange;
  hostRank_t *self;
  const hostRoute_t *route;
  ultraepGroup_t group;
  int topK;
  bool weighted, partial;
  size_t rowBytes;
  int64_t crossed; /* bytes read from other ranks */
} hostCombine_t;

static const void *combine_row(hostCombine_t *call, layoutPlace_t place) {
  if (place.rank != call->self->rank) call->crossed += (int64_t)call->rowBytes;
  return group_peer(call->group, call->exchange->rows, place.rank) + (size_t)place.row * call->rowBytes;
}

static const void *combine_partial(hostCombine_t *call, layoutPlace_t place) {
  if (place.rank != call->self->rank) call->crossed += (int64_t)call->rowBytes;
  return call->self->shared->windows[place.rank].partials + (size_t)place.row * call->rowBytes;
}

static float combine_weight(const hostCombine_t *call, int64_t token, int k) {
  return call->weighted ? call->route->weights[token * call->topK + k] : 1.0f;
}

/* Lists what makes up the token: its rows in order of k. Returns how many. */
static int combine_list_exact(hostCombine_t *call, int64_t token) {
  const layoutPlace_t *places = call->route->places + token * call->topK;
  int n = 0;
  for (int k = 0; k < call->topK; k++) {
    if (places[k].rank < 0) continue;
    call->self->rows[n] = combine_row(call, places[k]);
    call->self->weights[n++] = combine_weight(call, token, k);
  }
  return n;
}

/* Likewise for partial sums: one row of every other rank, in order of the rank's first k, and all rows of
 * this one. A rank's only row has not been weighted there; two or more have been summed and lie at the first
 * one's number in that rank's window. */
static int combine_list_partial(hostCombine_t *call, int64_t token) {
  const layoutPlace_t *places = call->route->places + token * call->topK;
  int n = 0;
  for (int k = 0; k < call->topK; k++) {
    if (places[k].rank < 0) continue;
    int earlier = 0, later = 0;
    for (int j = 0; j < k; j++) earlier += places[j].rank == places[k].rank;
    for (int j = k + 1; j < call->topK; j++) later += places[j].rank == places[k].rank;
    if (places[k].rank == call->self->rank) earlier = later = 0;
    if (earlier > 0) continue;
    call->self->rows[n] = later ? combine_partial(call, places[k]) : combine_row(call, places[k]);
    call->self->weights[n++] = later ? 1.0f : combine_weight(call, token, k);
  }
  return n;
}

static ultraepResult_t combine_tokens(hostCombine_t *call) {
  const backendExchange_t *exchange = call->exchange;
  hostRank_t *self = call->self;
  int64_t nTokens = exchange->route->nTokens;
  size_t nElements = (size_t)call->group->config.hidden;
  int64_t block = (int64_t)(HOST_BLOCK_BYTES / (call->rowBytes * (size_t)call->topK)) + 1;
  for (int64_t first = 0; first < nTokens; first += block) {
    ultraepResult_t result = host_touch_begin(self, PHASE);
    if (result != ultraepSuccess) return result;
    int64_t end = first + block < nTokens ? first + block : nTokens;
    for (int64_t t = first; t < end; t++) {
      int n = call->partial ? combine_list_partial(call, t) : combine_list_exact(call, t);
      host_sum_rows(exchange->recvbuff + (size_t)t * call->rowBytes, self->rows, self->weights, n, nElements,
                    exchange->dataType);
    }
    host_touch_end(self);
  }
  return ultraepSuccess;
}

/* At the experts' rank: sums the rows here of every token that has two or more. */
static void combine_make_partials(const hostCombine_t *call) {
  ultraepRoute_t route = call->exchange->route;
  hostRank_t *self = call->self;
  const hostMeta_t *meta = self->window->meta[route->index];
  const unsigned char *rows = group_peer(call->group, call->exchange->rows, self->rank);
  for (int i = 0; i < route->segments.nSegments; i++)
    for (int64_t r = 0; r < route->segments.rows[i]; r++) {
      size_t first = (size_t)(route->segments.firstRow[i] + r);
      if (!meta[first].isFirst || meta[first].next < 0) continue;
      int n = 0;
      for (int32_t row = (int32_t)first; row >= 0; row = meta[row].next) {
        self->rows[n] = rows + (size_t)row * call->rowBytes;
        self->weights[n++] = call->weighted ? meta[row].weight : 1.0f;
      }
      host_sum_rows(self->window->partials + first * call->rowBytes, self->rows, self->weights, n,
                    (size_t)call->group->config.hidden, call->exchange->dataType);
    }
}

ultraepResult_t host_combine(const backendExchange_t *exchange, cudaStream_t stream) {
  (void)stream;
  static const char *const names[] = {"the route", "the data type", "the region or offset of sendbuff"};
  ultraepGroup_t group = exchange->route->group;
  hostRank_t *self = host_rank(group);
  const hostRoute_t *route = exchange->route->impl;
  hostCombine_t call = {
      .exchange = exchange,
      .self = self,
      .route = route,
      .group = group,
      .topK = group->config.topK,
      .partial = group->config.combineMode == ULTRAEP_COMBINE_PARTIAL,
      .rowBytes = exchange->rowBytes,
  };
  if (call.partial) {
    call.weighted = exchange->weighted; /* rows of a route without weights carry 1 */
    combine_make_partials(&call);
  }
  call.weighted = exchange->weighted && route->hasWeights;
  hostSignal_t signal = {.op = exchange->direction == ULTRAEP_COMBINE ? HOST_OP_COMBINE : HOST_OP_COMBINE_SUM,
                         .args = {(uint64_t)exchange->route->index, (uint64_t)exchange->dataType,
                                  host_place_word(exchange->rows)}};
  ultraepResult_t result = host_signal_exchange(self, signal, PHASE, 3, names);
  if (result == ultraepSuccess) result = combine_tokens(&call);
  if (result == ultraepSuccess) result = host_signal_done(self, PHASE);
  if (result == ultraepSuccess) group->counters.combineBytes += call.crossed;
  return result;
}
