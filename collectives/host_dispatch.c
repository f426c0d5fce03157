/* Dispatch on the host: each row straight to its final place. */
#include "host.h"

#include <string.h>

#define PHASE "dispatch"

/* What one call's loops need. */
typedef struct {
  const backendExchange_t *exchange;
  hostRank_t *self;
  const hostRoute_t *route;
  ultraepGroup_t group;
  int topK;
  bool once; /* one row per (token, destination rank) */
  size_t rowBytes, scaleBytes;
  int64_t crossed; /* bytes written to other ranks */
} hostDispatch_t;

static bool dispatch_is_repeat(const layoutPlace_t *places, int k) {
  for (int j = 0; j < k; j++)
    if (places[j].rank == places[k].rank) return true;
  return false;
}

static void dispatch_row(hostDispatch_t *call, int64_t token, layoutPlace_t place) {
  const backendExchange_t *exchange = call->exchange;
  size_t row = (size_t)place.row;
  memcpy(group_peer(call->group, exchange->rows, place.rank) + row * call->rowBytes,
         exchange->sendbuff + (size_t)token * call->rowBytes, call->rowBytes);
  if (exchange->sendScales)
    memcpy(group_peer(call->group, exchange->scales, place.rank) + row * call->scaleBytes,
           exchange->sendScales + (size_t)token * call->scaleBytes, call->scaleBytes);
  if (place.rank != call->self->rank) call->crossed += (int64_t)(call->rowBytes + call->scaleBytes);
}

static void dispatch_token(hostDispatch_t *call, int64_t token) {
  const layoutPlace_t *places = call->route->places + token * call->topK;
  for (int k = 0; k < call->topK; k++) {
    layoutPlace_t place = places[k];
    if (place.rank < 0) continue;
    if (call->exchange->weights.region >= 0) {
      float *weights = (float *)(void *)group_peer(call->group, call->exchange->weights, place.rank);
      weights[place.row] = call->route->hasWeights ? call->route->weights[token * call->topK + k] : 1.0f;
    }
    if (!call->once || !dispatch_is_repeat(places, k)) dispatch_row(call, token, place);
  }
}

static ultraepResult_t dispatch_tokens(hostDispatch_t *call) {
  int64_t nTokens = call->exchange->route->nTokens;
  int64_t block =
      (int64_t)(HOST_BLOCK_BYTES / ((call->rowBytes + call->scaleBytes) * (size_t)call->topK)) + 1;
  for (int64_t first = 0; first < nTokens; first += block) {
    ultraepResult_t result = host_touch_begin(call->self, PHASE);
    if (result != ultraepSuccess) return result;
    int64_t end = first + block < nTokens ? first + block : nTokens;
    for (int64_t t = first; t < end; t++) dispatch_token(call, t);
    host_touch_end(call->self);
  }
  return ultraepSuccess;
}

/* After arrival: each token's first row here to the token's other rows here. */
static void dispatch_spread(const hostDispatch_t *call) {
  const backendExchange_t *exchange = call->exchange;
  ultraepRoute_t route = exchange->route;
  const hostMeta_t *meta = call->self->window->meta[route->index];
  unsigned char *rows = group_peer(call->group, exchange->rows, call->self->rank);
  unsigned char *scales = group_peer(call->group, exchange->scales, call->self->rank);
  for (int i = 0; i < route->segments.nSegments; i++)
    for (int64_t r = 0; r < route->segments.rows[i]; r++) {
      size_t first = (size_t)(route->segments.firstRow[i] + r);
      if (!meta[first].isFirst) continue;
      for (int32_t row = meta[first].next; row >= 0; row = meta[row].next) {
        memcpy(rows + (size_t)row * call->rowBytes, rows + first * call->rowBytes, call->rowBytes);
        if (scales)
          memcpy(scales + (size_t)row * call->scaleBytes, scales + first * call->scaleBytes,
                 call->scaleBytes);
      }
    }
}

ultraepResult_t host_dispatch(const backendExchange_t *exchange, cudaStream_t stream) {
  (void)stream;
  static const char *const names[] = {"the route", "the data type", "the region or offset of recvbuff",
                                      "the region or offset of recvScales",
                                      "the region or offset of recvWeights"};
  ultraepGroup_t group = exchange->route->group;
  hostRank_t *self = host_rank(group);
  hostSignal_t signal = {.op = HOST_OP_DISPATCH,
                         .args = {(uint64_t)exchange->route->index, (uint64_t)exchange->dataType,
                                  host_place_word(exchange->rows), host_place_word(exchange->scales),
                                  host_place_word(exchange->weights)}};
  ultraepResult_t result = host_signal_exchange(self, signal, PHASE, 5, names);
  if (result != ultraepSuccess) return result;
  hostDispatch_t call = {
      .exchange = exchange,
      .self = self,
      .route = exchange->route->impl,
      .group = group,
      .topK = group->config.topK,
      .once = group->config.dispatchMode == ULTRAEP_DISPATCH_ONCE,
      .rowBytes = exchange->rowBytes,
      .scaleBytes = exchange->scales.region < 0 ? 0 : (size_t)group->config.scaleBytes,
  };
  result = dispatch_tokens(&call);
  if (result == ultraepSuccess) result = host_signal_done(self, PHASE);
  if (result != ultraepSuccess) return result;
  if (call.once) dispatch_spread(&call);
  group->counters.dispatchBytes += call.crossed;
  return ultraepSuccess;
}
