/* What a communicator's records say: imbalance, hottest pairs, the line in the log, and the public call. */
#include "traffic_internal.h"

#include "error.h"

#include <string.h>

int32_t traffic_group_known(const trafficGroup_t *group) {
  int32_t count = 0;

  for (int32_t r = 0; r < group->nRanks; r++) count += group->recordsOf[r] > 0;
  return count;
}

int32_t traffic_group_windows(const trafficGroup_t *group) {
  uint64_t most = 0;

  for (const trafficComm_t *comm = group->records; comm; comm = comm->next) {
    uint64_t count = trafficState.nWindows - comm->openedWindow;

    if (count > most) most = count;
  }
  return most < TRAFFIC_WINDOWS ? (int32_t)most : TRAFFIC_WINDOWS;
}

/* Bytes and calls with a peer; a window has no calls. */
static ultraepTrafficPair_t traffic_pair_read(const trafficComm_t *comm, int window, int direction,
                                              int32_t peer) {
  size_t row = (size_t)comm->nRanks, at = (size_t)direction * row + (size_t)peer;
  bool isSend = direction == TRAFFIC_SEND;
  ultraepTrafficPair_t pair = {.from = isSend ? comm->rank : peer, .to = isSend ? peer : comm->rank};

  if (window > 0) {
    size_t slot = (trafficState.nWindows - (uint64_t)window) % TRAFFIC_WINDOWS;

    pair.bytes = (int64_t)comm->windows[slot * TRAFFIC_DIRECTIONS * row + at];
    return pair;
  }
  trafficCount_t count = traffic_cell_read(comm, at);
  pair.bytes = (int64_t)count.bytes;
  pair.calls = (int64_t)count.calls;
  return pair;
}

/* Keeps the pairs with the most bytes, in order. */
static void traffic_pairs_insert(trafficSummary_t *summary, const ultraepTrafficPair_t *pair) {
  int32_t at = summary->nPairs;

  if (pair->bytes == 0) return;
  if (at == TRAFFIC_PAIRS && summary->pairs[at - 1].bytes >= pair->bytes) return;
  if (at == TRAFFIC_PAIRS) at--;
  for (; at > 0 && summary->pairs[at - 1].bytes < pair->bytes; at--)
    summary->pairs[at] = summary->pairs[at - 1];
  summary->pairs[at] = *pair;
  if (summary->nPairs < TRAFFIC_PAIRS) summary->nPairs++;
}

static void traffic_summary_add(const trafficComm_t *comm, int window, trafficSummary_t *summary) {
  const trafficGroup_t *group = comm->group;

  for (int32_t peer = 0; peer < comm->nRanks; peer++) {
    ultraepTrafficPair_t sent = traffic_pair_read(comm, window, TRAFFIC_SEND, peer);
    ultraepTrafficPair_t received = traffic_pair_read(comm, window, TRAFFIC_RECV, peer);

    group->columns[peer] += (uint64_t)sent.bytes;
    summary->bytes[TRAFFIC_SEND] += (uint64_t)sent.bytes;
    summary->bytes[TRAFFIC_RECV] += (uint64_t)received.bytes;
    traffic_pairs_insert(summary, &sent);
    if (group->recordsOf[peer] == 0) traffic_pairs_insert(summary, &received);
  }
}

void traffic_group_summary(const trafficGroup_t *group, int window, trafficSummary_t *summary) {
  uint64_t most = 0;

  memset(summary, 0, sizeof(*summary));
  summary->hottestRank = -1;
  memset(group->columns, 0, (size_t)group->nRanks * sizeof(group->columns[0]));
  for (const trafficComm_t *comm = group->records; comm; comm = comm->next)
    traffic_summary_add(comm, window, summary);
  for (int32_t r = 0; r < group->nRanks; r++) {
    if (group->columns[r] <= most) continue;
    most = group->columns[r];
    summary->hottestRank = r;
  }
  if (most > 0) summary->imbalance = (double)most * group->nRanks / (double)summary->bytes[TRAFFIC_SEND];
}

/* ---- the line in NCCL's log ---- */
/* How far the two sources agree; "" where the profiler told nothing. */
static void traffic_comm_text_events(const trafficComm_t *comm, char *text, size_t size) {
  const size_t nCells = TRAFFIC_DIRECTIONS * (size_t)comm->nRanks;
  uint64_t calls = 0, events = 0;

  for (size_t i = 0; i < nCells; i++) {
    calls += traffic_source_read(comm, TRAFFIC_TAKEN, i).calls;
    events += traffic_source_read(comm, TRAFFIC_TOLD, i).calls;
  }
  text[0] = '\0';
  if (events > 0)
    snprintf(text, size, "; %llu calls taken over, %llu told to the profiler", (unsigned long long)calls,
             (unsigned long long)events);
}

void traffic_comm_text(const trafficComm_t *comm, char *text, size_t size) {
  trafficTotals_t totals = {0};
  trafficSummary_t summary;
  char name[32] = "not known", hottest[96] = "none", events[96];

  traffic_totals_add(comm, &totals);
  traffic_group_summary(comm->group, 0, &summary);
  traffic_comm_text_events(comm, events, sizeof(events));
  if (comm->group->hash != 0) snprintf(name, sizeof(name), "0x%llx", (unsigned long long)comm->group->hash);
  if (summary.nPairs > 0) {
    const ultraepTrafficPair_t *pair = &summary.pairs[0];

    snprintf(hottest, sizeof(hottest), "%d to %d (%lld bytes, %lld calls)", pair->from, pair->to,
             (long long)pair->bytes, (long long)pair->calls);
  }
  snprintf(text, size,
           "UltraEP traffic: communicator %s, rank %d of %d: sent %llu bytes in %llu calls, received %llu "
           "bytes in "
           "%llu calls; %d known ranks' sends: imbalance %.3f (max/mean by receiver), hottest pair: %s%s",
           name, comm->rank, comm->nRanks, (unsigned long long)totals.bytes[TRAFFIC_SEND],
           (unsigned long long)totals.calls[TRAFFIC_SEND], (unsigned long long)totals.bytes[TRAFFIC_RECV],
           (unsigned long long)totals.calls[TRAFFIC_RECV], traffic_group_known(comm->group),
           summary.imbalance, hottest, events);
}

/* ---- ultraepTrafficGet ---- */
static void traffic_get_row(const trafficComm_t *comm, int direction, int64_t *bytes, int64_t *calls) {
  for (int32_t peer = 0; peer < comm->nRanks; peer++) {
    ultraepTrafficPair_t pair = traffic_pair_read(comm, 0, direction, peer);

    if (bytes) bytes[peer] = pair.bytes;
    if (calls) calls[peer] = pair.calls;
  }
}

static void traffic_get_windows(const trafficComm_t *comm, ultraepTraffic_t *traffic) {
  uint64_t nWindows = trafficState.nWindows - comm->openedWindow;
  trafficSummary_t summary;

  traffic->nWindows = nWindows < TRAFFIC_WINDOWS ? (int32_t)nWindows : TRAFFIC_WINDOWS;
  for (int w = 0; w < traffic->nWindows; w++) {
    const trafficWindow_t *times =
        &trafficState.windows[(trafficState.nWindows - 1 - (uint64_t)w) % TRAFFIC_WINDOWS];
    ultraepTrafficWindow_t *window = &traffic->windows[w];

    traffic_group_summary(comm->group, w + 1, &summary);
    *window = (ultraepTrafficWindow_t){
        .start = times->start, .seconds = times->seconds, .imbalance = summary.imbalance};
    for (int32_t peer = 0; peer < comm->nRanks; peer++) {
      window->sendBytes += traffic_pair_read(comm, w + 1, TRAFFIC_SEND, peer).bytes;
      window->recvBytes += traffic_pair_read(comm, w + 1, TRAFFIC_RECV, peer).bytes;
    }
  }
}

static void traffic_get_totals(const trafficComm_t *comm, ultraepTraffic_t *traffic) {
  trafficTotals_t totals = {0};
  trafficSummary_t summary;

  traffic_totals_add(comm, &totals);
  traffic_group_summary(comm->group, 0, &summary);
  traffic->rank = comm->rank;
  traffic->nRanks = comm->nRanks;
  traffic->nKnownRanks = traffic_group_known(comm->group);
  traffic->hash = comm->group->hash;
  traffic->totalSendBytes = (int64_t)totals.bytes[TRAFFIC_SEND];
  traffic->totalSendCalls = (int64_t)totals.calls[TRAFFIC_SEND];
  traffic->totalRecvBytes = (int64_t)totals.bytes[TRAFFIC_RECV];
  traffic->totalRecvCalls = (int64_t)totals.calls[TRAFFIC_RECV];
  traffic->imbalance = summary.imbalance;
  traffic->nPairs = summary.nPairs;
  memcpy(traffic->pairs, summary.pairs, sizeof(traffic->pairs));
}

/* Under the lock, so that the record cannot go. */
static ultraepResult_t traffic_get(ncclComm_t key, ultraepTraffic_t *traffic) {
  const trafficComm_t *comm = traffic_comm_find(key);
  bool hasArray = traffic->sendBytes || traffic->sendCalls || traffic->recvBytes || traffic->recvCalls;

  if (!comm)
    return error_set(
        ultraepInvalidArgument,
        "ultraepTrafficGet: nothing is recorded for this communicator: is the library NCCL's plugin, "
        "and ULTRAEP_P2P not off?");
  if (hasArray && traffic->capacity < comm->nRanks)
    return error_set(ultraepInvalidArgument, "ultraepTrafficGet: capacity %d is less than the %d ranks",
                     traffic->capacity, comm->nRanks);
  traffic_roll();
  traffic_get_totals(comm, traffic);
  traffic_get_windows(comm, traffic);
  traffic_get_row(comm, TRAFFIC_SEND, traffic->sendBytes, traffic->sendCalls);
  traffic_get_row(comm, TRAFFIC_RECV, traffic->recvBytes, traffic->recvCalls);
  return ultraepSuccess;
}

ultraepResult_t ultraepTrafficGet(ncclComm_t comm, ultraepTraffic_t *traffic) {
  ultraepResult_t result;

  if (!comm || !traffic)
    return error_set(ultraepInvalidArgument, "ultraepTrafficGet: comm or traffic is null");
  if (traffic->size != sizeof(*traffic) || traffic->magic != ULTRAEP_MAGIC)
    return error_set(ultraepInvalidArgument,
                     "ultraepTrafficGet: traffic was not set to ULTRAEP_TRAFFIC_INITIALIZER of this version");
  traffic_lock();
  result = traffic_get(comm, traffic);
  traffic_unlock();
  return result;
}
