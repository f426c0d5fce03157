#include "top.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TOP_PAIRS = 5, TOP_MATRIX_RANKS = 16, TOP_COMMUNICATORS = 16 };

typedef struct {
  int32_t from, to;
  uint64_t bytes, calls;
} topPair_t;

/* A communicator: ranks[first .. first + count) of what was read. */
typedef struct {
  const topRank_t *ranks;
  size_t count;
  int32_t nRanks, nKnown;
  uint64_t sent, received; /* bytes */
  double imbalance;        /* max / mean by receiver of what the known ranks sent; 0: nothing */
  double rate;             /* bytes per second, sent and received */
  int32_t nPairs;
  topPair_t pairs[TOP_PAIRS];
} topComm_t;

/* 5 characters: "12.3M" in powers of 1000. */
static void top_text_bytes(char *text, size_t size, double bytes) {
  static const char units[] = " KMGTPE";
  int unit = 0;

  while (bytes >= 999.5 && unit < 6) {
    bytes /= 1000;
    unit++;
  }
  snprintf(text, size, bytes >= 99.95 || unit == 0 ? "%.0f%c" : "%.1f%c", bytes, units[unit]);
}

static void top_pair_insert(topComm_t *comm, topPair_t pair) {
  int32_t at = comm->nPairs;

  if (pair.bytes == 0) return;
  if (at == TOP_PAIRS && comm->pairs[at - 1].bytes >= pair.bytes) return;
  if (at == TOP_PAIRS) at--;
  for (; at > 0 && comm->pairs[at - 1].bytes < pair.bytes; at--) comm->pairs[at] = comm->pairs[at - 1];
  comm->pairs[at] = pair;
  if (comm->nPairs < TOP_PAIRS) comm->nPairs++;
}

static bool top_rank_is_known(const topComm_t *comm, int32_t rank) {
  size_t low = 0, high = comm->count;

  while (low < high) {
    size_t middle = low + (high - low) / 2;

    if (comm->ranks[middle].record->rank == rank) return true;
    if (comm->ranks[middle].record->rank < rank) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return false;
}

static void top_comm_add(topComm_t *comm, const topRank_t *rank, uint64_t *columns) {
  int32_t self = rank->record->rank;

  for (int32_t peer = 0; peer < comm->nRanks; peer++) {
    const trafficFileCell_t *sent = &rank->sent[peer], *received = &rank->received[peer];

    if (columns != NULL) columns[peer] += sent->bytes;
    comm->sent += sent->bytes;
    comm->received += received->bytes;
    top_pair_insert(comm, (topPair_t){self, peer, sent->bytes, sent->calls});
    /* A sender that is not seen is known by its receiver. */
    if (received->bytes > 0 && !top_rank_is_known(comm, peer))
      top_pair_insert(comm, (topPair_t){peer, self, received->bytes, received->calls});
  }
}

static void top_comm_sum(topComm_t *comm) {
  uint64_t *columns = calloc((size_t)comm->nRanks, sizeof(columns[0]));
  uint64_t most = 0;

  for (size_t i = 0; i < comm->count; i++) {
    comm->nKnown += i == 0 || comm->ranks[i].record->rank != comm->ranks[i - 1].record->rank;
    top_comm_add(comm, &comm->ranks[i], columns);
  }
  for (int32_t r = 0; columns != NULL && r < comm->nRanks; r++) {
    if (columns[r] > most) most = columns[r];
  }
  if (most > 0) comm->imbalance = (double)most * comm->nRanks / (double)comm->sent;
  free(columns);
}

/* Bytes of the communicator in an earlier read; 0 if it was not there. */
static double top_bytes_before(const topComm_t *comm, const topRead_t *before) {
  double bytes = 0;

  for (size_t i = 0; i < before->nRanks; i++) {
    const topRank_t *rank = &before->ranks[i];

    if (!topRanksMatch(rank, &comm->ranks[0])) continue;
    for (int32_t peer = 0; peer < comm->nRanks; peer++)
      bytes += (double)rank->sent[peer].bytes + (double)rank->received[peer].bytes;
  }
  return bytes;
}

/* Since the last refresh, or where there was none, since the communicator was opened. */
static double top_comm_rate(const topComm_t *comm, const topRead_t *now, const topRead_t *before) {
  double bytes = (double)comm->sent + (double)comm->received, since = comm->ranks[0].record->opened;

  if (before != NULL && before->nRanks > 0 && before->time < now->time) {
    bytes -= top_bytes_before(comm, before);
    since = before->time;
  }
  return now->time > since && bytes > 0 ? bytes / (now->time - since) : 0;
}

static size_t top_comm_next(const topRead_t *now, size_t first, topComm_t *comm) {
  size_t end = first + 1;

  while (end < now->nRanks && topRanksMatch(&now->ranks[end], &now->ranks[first])) end++;
  *comm = (topComm_t){
      .ranks = &now->ranks[first], .count = end - first, .nRanks = now->ranks[first].record->nRanks};
  return end;
}

static int top_compare_bytes(const void *a, const void *b) {
  const topComm_t *x = a, *y = b;

  return (x->sent + x->received < y->sent + y->received) - (x->sent + x->received > y->sent + y->received);
}

static void top_show_cell(FILE *out, uint64_t bytes, uint64_t most, bool hasColour) {
  char text[16];

  top_text_bytes(text, sizeof(text), (double)bytes);
  if (hasColour && bytes > 0) {
    /* 24 greys, the brightest for the hottest pair; and text that can be read on it. */
    int grey = 232 + (int)(23.0 * (double)bytes / (double)most);

    fprintf(out, " \033[48;5;%d;38;5;%dm%6s\033[0m", grey, grey < 244 ? 255 : 232, text);
  } else {
    fprintf(out, " %6s", bytes > 0 ? text : ".");
  }
}

static void top_show_matrix(FILE *out, const topComm_t *comm, bool hasColour) {
  uint64_t most = comm->nPairs > 0 ? comm->pairs[0].bytes : 1;

  fputs("  sent, from \\ to", out);
  for (int32_t r = 0; r < comm->nRanks; r++) fprintf(out, " %6d", r);
  fputs("\n", out);
  for (size_t i = 0; i < comm->count; i++) {
    fprintf(out, "  %14d ", comm->ranks[i].record->rank);
    for (int32_t peer = 0; peer < comm->nRanks; peer++)
      top_show_cell(out, comm->ranks[i].sent[peer].bytes, most, hasColour);
    fputs(comm->ranks[i].record->open ? "\n" : "  ended\n", out);
  }
}

static void top_show_pairs(FILE *out, const topComm_t *comm) {
  char bytes[16];

  for (int32_t i = 0; i < comm->nPairs; i++) {
    const topPair_t *pair = &comm->pairs[i];

    top_text_bytes(bytes, sizeof(bytes), (double)pair->bytes);
    fprintf(out, "  %s %5d -> %-5d %6sB  %" PRIu64 " calls\n", i == 0 ? "hottest" : "       ", pair->from,
            pair->to, bytes, pair->calls);
  }
}

static void top_show_comm(FILE *out, const topComm_t *comm, bool hasColour) {
  char sent[16], received[16], rate[16], name[96];
  const topRank_t *first = &comm->ranks[0];

  if (first->record->hash != 0) {
    snprintf(name, sizeof(name), "0x%" PRIx64, first->record->hash);
  } else {
    snprintf(name, sizeof(name), "%" PRIu64 " of %.40s:%" PRId64, first->record->id, first->process->host,
             first->process->pid);
  }
  top_text_bytes(sent, sizeof(sent), (double)comm->sent);
  top_text_bytes(received, sizeof(received), (double)comm->received);
  top_text_bytes(rate, sizeof(rate), comm->rate);
  fprintf(out, "\ncommunicator %s: %d of %d ranks seen, sent %sB, received %sB, %sB/s, imbalance ", name,
          comm->nKnown, comm->nRanks, sent, received, rate);
  if (comm->imbalance > 0) {
    fprintf(out, "%.2f\n", comm->imbalance);
  } else {
    fputs("-\n", out);
  }
  if (comm->nRanks <= TOP_MATRIX_RANKS) top_show_matrix(out, comm, hasColour);
  top_show_pairs(out, comm);
}

static void top_show_head(FILE *out, const topRead_t *now, size_t nComms) {
  time_t seconds = (time_t)now->time;
  char clock[16] = "--:--:--";
  struct tm local;

  if (now->nFiles > 0 && localtime_r(&seconds, &local) != NULL)
    strftime(clock, sizeof(clock), "%H:%M:%S", &local);
  fprintf(out, "ultraep_top %s  files %d", clock, now->nFiles);
  if (now->nMissing > 0) fprintf(out, " (%d not there yet)", now->nMissing);
  fprintf(out, "  communicators %zu\n", nComms);
}

void topShow(FILE *out, const topRead_t *now, const topRead_t *before, bool hasColour) {
  topComm_t *comms = calloc(now->nRanks + 1, sizeof(comms[0]));
  size_t nComms = 0;

  for (size_t first = 0; comms != NULL && first < now->nRanks; nComms++) {
    first = top_comm_next(now, first, &comms[nComms]);
    top_comm_sum(&comms[nComms]);
    comms[nComms].rate = top_comm_rate(&comms[nComms], now, before);
  }
  if (nComms > 0) qsort(comms, nComms, sizeof(comms[0]), top_compare_bytes);
  top_show_head(out, now, nComms);
  for (size_t i = 0; i < nComms && i < TOP_COMMUNICATORS; i++) top_show_comm(out, &comms[i], hasColour);
  if (nComms > TOP_COMMUNICATORS)
    fprintf(out, "\nand %zu communicators with fewer bytes\n", nComms - TOP_COMMUNICATORS);
  free(comms);
}
