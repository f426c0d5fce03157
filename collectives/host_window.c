/* Windows: signals, bounded waits, failures, and who may touch whose memory. One lock a window, never two at
 * once. */
#include "host.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int window_cond_make(pthread_cond_t *cond) {
  pthread_condattr_t attributes;
  int error = pthread_condattr_init(&attributes);
  if (error != 0) return error;
  error = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
  if (error == 0) error = pthread_cond_init(cond, &attributes);
  pthread_condattr_destroy(&attributes);
  return error;
}

ultraepResult_t host_window_make(hostWindow_t *window, int nRanks) {
  window->peerState = calloc((size_t)nRanks, sizeof(*window->peerState));
  if (!window->peerState) goto fail;
  window->signals[0] = calloc(2 * (size_t)nRanks, sizeof(*window->signals[0]));
  if (!window->signals[0]) goto free_states;
  window->signals[1] = window->signals[0] + nRanks;
  if (pthread_mutex_init(&window->lock, NULL) != 0) goto free_signals;
  if (window_cond_make(&window->changed) != 0) goto destroy_lock;
  if (window_cond_make(&window->idle) != 0) goto destroy_changed;
  return ultraepSuccess;

destroy_changed:
  pthread_cond_destroy(&window->changed);
destroy_lock:
  pthread_mutex_destroy(&window->lock);
free_signals:
  free(window->signals[0]);
free_states:
  free(window->peerState);
fail:
  return error_set(ultraepSystemError, "no memory or no locks for a window");
}

void host_window_free(hostWindow_t *window) {
  pthread_cond_destroy(&window->idle);
  pthread_cond_destroy(&window->changed);
  pthread_mutex_destroy(&window->lock);
  free(window->signals[0]);
  free(window->peerState);
  free(window->block);
}

/* ---- failures ---- */

static hostFailure_t window_failure(const hostRank_t *self, const char *phase, ultraepResult_t code, int rank,
                                    const char *text) {
  hostFailure_t failure = {.code = code, .rank = rank, .finder = self->rank};
  snprintf(failure.phase, sizeof(failure.phase), "%s", phase);
  snprintf(failure.text, sizeof(failure.text), "%s", text);
  return failure;
}

/* A peer's failure as this rank's: the cause is passed on as it was found, unless the cause is this rank. */
static hostFailure_t window_failure_told(const hostRank_t *self, const char *phase) {
  hostFailure_t failure = self->window->peers;
  if (failure.rank == self->rank) {
    failure.code = ultraepRemoteError;
    failure.rank = failure.finder;
    snprintf(failure.text, sizeof(failure.text), "%s: rank %d gave up waiting for this rank", phase,
             failure.finder);
    failure.finder = self->rank;
  }
  snprintf(failure.phase, sizeof(failure.phase), "%s", phase);
  return failure;
}

static ultraepResult_t window_report(const hostRank_t *self, const hostFailure_t *failure) {
  if (failure->finder == self->rank) return error_set(failure->code, "%s", failure->text);
  return error_set(failure->code, "%.*s (told by rank %d)", ERROR_TEXT_BYTES - 32, failure->text,
                   failure->finder);
}

static ultraepResult_t window_fail(hostRank_t *self, const hostFailure_t *failure) {
  hostWindow_t *window = self->window;
  pthread_mutex_lock(&window->lock);
  if (window->own.code == ultraepSuccess) window->own = *failure;
  hostFailure_t first = window->own;
  pthread_mutex_unlock(&window->lock);
  host_rank_close(self, HOST_PEER_FAILED);
  return window_report(self, &first);
}

ultraepResult_t host_rank_fail(hostRank_t *self, const char *phase, ultraepResult_t code, int rank,
                               const char *text) {
  hostFailure_t failure = window_failure(self, phase, code, rank, text);
  return window_fail(self, &failure);
}

void host_rank_close(hostRank_t *self, hostPeerState_t state) {
  hostShared_t *shared = self->shared;
  pthread_mutex_lock(&self->window->lock);
  hostFailure_t failure = self->window->own;
  pthread_mutex_unlock(&self->window->lock);
  for (int r = 0; r < shared->nRanks; r++) {
    if (r == self->rank) continue;
    hostWindow_t *peer = &shared->windows[r];
    pthread_mutex_lock(&peer->lock);
    if (peer->peerState[self->rank] == HOST_PEER_ALIVE) {
      peer->peerState[self->rank] = (uint8_t)state;
      if (state == HOST_PEER_FAILED && peer->nFailed++ == 0) peer->peers = failure;
      if (state == HOST_PEER_LEFT) peer->nLeft++;
      pthread_cond_broadcast(&peer->changed);
    }
    /* Not an open end: a block is at most HOST_BLOCK_BYTES or one row, and the peer begins no other. */
    while (peer->touching) pthread_cond_wait(&peer->idle, &peer->lock);
    pthread_mutex_unlock(&peer->lock);
  }
}

/* Needs the lock. True with the reason when this rank has failed or been told of a failure. */
static bool window_has_failed(const hostRank_t *self, const char *phase, hostFailure_t *failure) {
  const hostWindow_t *window = self->window;
  if (window->own.code != ultraepSuccess)
    *failure = window->own;
  else if (window->nFailed > 0)
    *failure = window_failure_told(self, phase);
  else
    return false;
  return true;
}

/* Needs the lock. The lowest rank that left without sending step seq; -1 if none. */
static int window_find_left(const hostRank_t *self, uint64_t seq) {
  const hostWindow_t *window = self->window;
  for (int r = 0; window->nLeft > 0 && r < self->nRanks; r++)
    if (window->peerState[r] == HOST_PEER_LEFT && window->signals[seq & 1][r].seq != seq) return r;
  return -1;
}

static hostFailure_t window_failure_left(const hostRank_t *self, const char *phase, int rank) {
  char text[ERROR_TEXT_BYTES];
  snprintf(text, sizeof(text), "%s: rank %d has left the group", phase, rank);
  return window_failure(self, phase, ultraepRemoteError, rank, text);
}

static hostFailure_t window_failure_timeout(const hostRank_t *self, const char *phase) {
  const hostSignal_t *signals = self->window->signals[self->seq & 1];
  int first = -1, more = -1;
  for (int r = 0; r < self->nRanks; r++)
    if (signals[r].seq != self->seq) {
      if (first < 0) first = r;
      more++;
    }
  char text[ERROR_TEXT_BYTES];
  int n =
      snprintf(text, sizeof(text), "%s: rank %d did not come within %d ms", phase, first, self->timeoutMs);
  if (more > 0) snprintf(text + n, sizeof(text) - (size_t)n, ", nor did %d more", more);
  return window_failure(self, phase, ultraepTimeout, first, text);
}

ultraepResult_t host_rank_check(ultraepGroup_t group, const char *phase) {
  hostRank_t *self = host_rank(group);
  hostFailure_t failure;
  pthread_mutex_lock(&self->window->lock);
  bool failed = window_has_failed(self, phase, &failure);
  pthread_mutex_unlock(&self->window->lock);
  return failed ? window_fail(self, &failure) : ultraepSuccess;
}

void host_rank_status(ultraepGroup_t group, ultraepStatus_t *status) {
  hostRank_t *self = host_rank(group);
  hostFailure_t failure = {.code = ultraepSuccess, .rank = -1};
  pthread_mutex_lock(&self->window->lock);
  (void)window_has_failed(self, self->window->peers.phase, &failure);
  pthread_mutex_unlock(&self->window->lock);
  *status = (ultraepStatus_t){.code = failure.code, .missingRank = failure.rank};
  memcpy(status->phase, failure.phase, sizeof(status->phase));
}

void host_rank_abort(ultraepGroup_t group) {
  hostRank_t *self = host_rank(group);
  char text[ERROR_TEXT_BYTES];
  snprintf(text, sizeof(text), "abort: rank %d called ultraepGroupAbort", self->rank);
  hostFailure_t failure = window_failure(self, "abort", ultraepRemoteError, self->rank, text);
  hostWindow_t *window = self->window;
  pthread_mutex_lock(&window->lock);
  if (window->own.code == ultraepSuccess) window->own = failure;
  pthread_cond_broadcast(&window->changed);
  pthread_mutex_unlock(&window->lock);
  host_rank_close(self, HOST_PEER_FAILED);
}

/* ---- signals ---- */

static void window_send(hostRank_t *self, const hostSignal_t *signal) {
  int parity = (int)(signal->seq & 1);
  for (int i = 1; i <= self->nRanks; i++) { /* each rank starts at another peer */
    hostWindow_t *peer = &self->shared->windows[(self->rank + i) % self->nRanks];
    pthread_mutex_lock(&peer->lock);
    peer->signals[parity][self->rank] = *signal;
    if (++peer->nArrived[parity] == self->nRanks) pthread_cond_signal(&peer->changed);
    pthread_mutex_unlock(&peer->lock);
  }
}

static struct timespec window_deadline(int timeoutMs) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  time.tv_sec += timeoutMs / 1000;
  time.tv_nsec += (long)(timeoutMs % 1000) * 1000000;
  if (time.tv_nsec >= 1000000000) {
    time.tv_sec++;
    time.tv_nsec -= 1000000000;
  }
  return time;
}

/* Waits for every rank's signal of this rank's last step. A failure anywhere ends the wait, also one found
 * after all signals are there; a rank that has left ends it only if its signal is missing. */
static ultraepResult_t window_wait(hostRank_t *self, const char *phase) {
  hostWindow_t *window = self->window;
  int *nArrived = &window->nArrived[self->seq & 1];
  struct timespec deadline = window_deadline(self->timeoutMs);
  hostFailure_t failure;
  bool late = false;
  pthread_mutex_lock(&window->lock);
  for (;;) {
    if (window_has_failed(self, phase, &failure)) goto fail;
    if (*nArrived == self->nRanks) break;
    int left = window_find_left(self, self->seq);
    if (left >= 0) {
      failure = window_failure_left(self, phase, left);
      goto fail;
    }
    if (late) {
      failure = window_failure_timeout(self, phase);
      goto fail;
    }
    late = pthread_cond_timedwait(&window->changed, &window->lock, &deadline) == ETIMEDOUT;
  }
  *nArrived = 0;
  pthread_mutex_unlock(&window->lock);
  return ultraepSuccess;

fail:
  pthread_mutex_unlock(&window->lock);
  return window_fail(self, &failure);
}

const hostSignal_t *host_signal_from(const hostRank_t *self, int src) {
  return &self->window->signals[self->seq & 1][src];
}

static const char *window_op_name(hostOp_t op) {
  static const char *const names[] = {
      [HOST_OP_CREATE] = "ultraepGroupCreateHost",
      [HOST_OP_ALLOC] = "ultraepMemAlloc",
      [HOST_OP_REGISTER] = "ultraepMemRegister",
      [HOST_OP_FREE] = "ultraepMemFree",
      [HOST_OP_ROUTE] = "ultraepRouteUpdate",
      [HOST_OP_DISPATCH] = "a dispatch",
      [HOST_OP_COMBINE] = "a combine",
      [HOST_OP_COMBINE_SUM] = "a combine of plain sums",
      [HOST_OP_EXPERTS] = "ultraepExpertsRegister",
      [HOST_OP_WEIGHTS] = "ultraepWeightsSync",
      [HOST_OP_GRADS] = "ultraepGradsReduce",
      [HOST_OP_DONE] = "the end of a call",
  };
  return names[op];
}

/* All ranks hold the same signals, so all come to the same verdict. */
static ultraepResult_t window_compare(const hostRank_t *self, int nEqual, const char *const *names) {
  const hostSignal_t *first = host_signal_from(self, 0);
  for (int r = 1; r < self->nRanks; r++) {
    const hostSignal_t *signal = host_signal_from(self, r);
    if (signal->op != first->op)
      return error_set(ultraepInvalidUsage, "the ranks are in different calls: rank 0 in %s, rank %d in %s",
                       window_op_name(first->op), r, window_op_name(signal->op));
  }
  for (int i = 0; i < nEqual; i++)
    for (int r = 1; r < self->nRanks; r++)
      if (host_signal_from(self, r)->args[i] != first->args[i])
        return error_set(ultraepInvalidUsage, "%s: ranks 0 and %d differ in %s", window_op_name(first->op), r,
                         names[i]);
  return ultraepSuccess;
}

ultraepResult_t host_signal_exchange(hostRank_t *self, hostSignal_t signal, const char *phase, int nEqual,
                                     const char *const *names) {
  signal.seq = ++self->seq;
  window_send(self, &signal);
  ultraepResult_t result = window_wait(self, phase);
  return result == ultraepSuccess ? window_compare(self, nEqual, names) : result;
}

ultraepResult_t host_signal_done(hostRank_t *self, const char *phase) {
  return host_signal_exchange(self, (hostSignal_t){.op = HOST_OP_DONE}, phase, 0, NULL);
}

/* ---- touching the peers' memory ---- */

ultraepResult_t host_touch_begin(hostRank_t *self, const char *phase) {
  hostWindow_t *window = self->window;
  hostFailure_t failure;
  pthread_mutex_lock(&window->lock);
  bool failed = window_has_failed(self, phase, &failure);
  int left = failed ? -1 : window_find_left(self, host_signal_next(self));
  if (left >= 0) {
    failure = window_failure_left(self, phase, left);
    failed = true;
  }
  window->touching = !failed;
  pthread_mutex_unlock(&window->lock);
  return failed ? window_fail(self, &failure) : ultraepSuccess;
}

void host_touch_end(hostRank_t *self) {
  hostWindow_t *window = self->window;
  pthread_mutex_lock(&window->lock);
  window->touching = false;
  pthread_cond_broadcast(&window->idle);
  pthread_mutex_unlock(&window->lock);
}
