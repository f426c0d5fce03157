/* The outputs of the traffic record as text: JSON, Prometheus; and the file for ultraep_top. All under the
 * lock. */
#include "traffic_file.h"
#include "traffic_internal.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

static const char *const trafficSides[TRAFFIC_DIRECTIONS] = {"send", "recv"};

void traffic_print_fixed(FILE *out, double number) {
  uint64_t tenThousandths = (uint64_t)llround(number * 1e4);

  fprintf(out, "%" PRIu64 ".%04" PRIu64, tenThousandths / 10000, tenThousandths % 10000);
}

static void traffic_host(char *host, size_t size) {
  memset(host, 0, size);
  if (gethostname(host, size - 1) != 0) memset(host, 0, size);
  /* Nothing that JSON would have to escape. */
  for (char *at = host; *at; at++) {
    if (*at < ' ' || *at > '~' || *at == '"' || *at == '\\') *at = '?';
  }
}

/* ---- JSON ---- */
static void traffic_json_totals(FILE *out, const trafficTotals_t *totals) {
  fprintf(out,
          "\"sendBytes\": %" PRIu64 ", \"sendCalls\": %" PRIu64 ", \"recvBytes\": %" PRIu64
          ", \"recvCalls\": %" PRIu64,
          totals->bytes[TRAFFIC_SEND], totals->calls[TRAFFIC_SEND], totals->bytes[TRAFFIC_RECV],
          totals->calls[TRAFFIC_RECV]);
}

static void traffic_json_row(FILE *out, const trafficComm_t *comm, int direction) {
  const size_t first = (size_t)direction * (size_t)comm->nRanks;

  fprintf(out, ", \"%sBytes\": [", trafficSides[direction]);
  for (int32_t r = 0; r < comm->nRanks; r++)
    fprintf(out, "%s%" PRIu64, r > 0 ? ", " : "", traffic_cell_read(comm, first + (size_t)r).bytes);
  fprintf(out, "], \"%sCalls\": [", trafficSides[direction]);
  for (int32_t r = 0; r < comm->nRanks; r++)
    fprintf(out, "%s%" PRIu64, r > 0 ? ", " : "", traffic_cell_read(comm, first + (size_t)r).calls);
  fputs("]", out);
}

static void traffic_json_windows(FILE *out, const trafficGroup_t *group) {
  trafficSummary_t summary;
  int32_t nWindows = traffic_group_windows(group);

  fputs("     \"windows\": [", out);
  for (int w = 1; w <= nWindows; w++) {
    const trafficWindow_t *window =
        &trafficState.windows[(trafficState.nWindows - (uint64_t)w) % TRAFFIC_WINDOWS];

    traffic_group_summary(group, w, &summary);
    fprintf(out, "%s\n      {\"start\": ", w > 1 ? "," : "");
    traffic_print_fixed(out, window->start);
    fputs(", \"seconds\": ", out);
    traffic_print_fixed(out, window->seconds);
    fprintf(out, ", \"sendBytes\": %" PRIu64 ", \"recvBytes\": %" PRIu64 ", \"imbalance\": ",
            summary.bytes[TRAFFIC_SEND], summary.bytes[TRAFFIC_RECV]);
    traffic_print_fixed(out, summary.imbalance);
    fputs("}", out);
  }
  fputs("],\n", out);
}

static void traffic_json_group(FILE *out, const trafficGroup_t *group) {
  trafficSummary_t summary;

  traffic_group_summary(group, 0, &summary);
  /* The hash is text: readers with floating-point numbers would round it. */
  fprintf(out,
          "    {\"id\": %" PRIu64 ", \"hash\": \"0x%" PRIx64
          "\", \"nRanks\": %d, \"nKnownRanks\": %d, \"imbalance\": ",
          group->id, group->hash, group->nRanks, traffic_group_known(group));
  traffic_print_fixed(out, summary.imbalance);
  fprintf(out, ", \"hottestRank\": %d,\n     \"pairs\": [", summary.hottestRank);
  for (int32_t i = 0; i < summary.nPairs; i++) {
    const ultraepTrafficPair_t *pair = &summary.pairs[i];

    fprintf(out, "%s\n      {\"from\": %d, \"to\": %d, \"bytes\": %" PRId64 ", \"calls\": %" PRId64 "}",
            i > 0 ? "," : "", pair->from, pair->to, pair->bytes, pair->calls);
  }
  fputs("],\n", out);
  traffic_json_windows(out, group);
  fputs("     \"ranks\": [", out);
  for (const trafficComm_t *comm = group->records; comm; comm = comm->next) {
    fprintf(out, "%s\n      {\"rank\": %d, \"open\": %s", comm != group->records ? "," : "", comm->rank,
            comm->ended ? "false" : "true");
    traffic_json_row(out, comm, TRAFFIC_SEND);
    traffic_json_row(out, comm, TRAFFIC_RECV);
    fputs("}", out);
  }
  fputs("]}", out);
}

void traffic_json_print(FILE *out) {
  trafficTotals_t totals;
  char host[64];

  traffic_totals(&totals);
  traffic_host(host, sizeof(host));
  fprintf(out, "{\"version\": 1, \"host\": \"%s\", \"pid\": %ld, \"time\": ", host, (long)getpid());
  traffic_print_fixed(out, traffic_time());
  fprintf(out, ", \"recordsOpened\": %" PRIu64 ", \"recordsOpen\": %d,\n  \"totals\": {",
          trafficState.nOpened, trafficState.nOpen);
  traffic_json_totals(out, &totals);
  fputs("},\n  \"communicators\": [", out);
  for (const trafficGroup_t *group = trafficState.groups; group; group = group->next) {
    fputs(group != trafficState.groups ? ",\n" : "\n", out);
    traffic_json_group(out, group);
  }
  fputs("]}\n", out);
}

/* ---- Prometheus: the process's totals; and for the communicators with the most bytes their ranks and pairs
 * ---- */
enum { PROMETHEUS_GROUPS = 8, PROMETHEUS_RANKS = 8 };

typedef struct {
  const trafficGroup_t *groups[PROMETHEUS_GROUPS];
  trafficSummary_t summaries[PROMETHEUS_GROUPS];
  int count;
} trafficTop_t;

static uint64_t traffic_summary_bytes(const trafficSummary_t *summary) {
  return summary->bytes[TRAFFIC_SEND] + summary->bytes[TRAFFIC_RECV];
}

static bool traffic_group_is_open(const trafficGroup_t *group) {
  for (const trafficComm_t *comm = group->records; comm; comm = comm->next) {
    if (!comm->ended) return true;
  }
  return false;
}

static void traffic_top_insert(trafficTop_t *top, const trafficGroup_t *group,
                               const trafficSummary_t *summary) {
  int at = top->count;

  if (at == PROMETHEUS_GROUPS) {
    if (traffic_summary_bytes(&top->summaries[at - 1]) >= traffic_summary_bytes(summary)) return;
    at--;
  }
  for (; at > 0 && traffic_summary_bytes(&top->summaries[at - 1]) < traffic_summary_bytes(summary); at--) {
    top->groups[at] = top->groups[at - 1];
    top->summaries[at] = top->summaries[at - 1];
  }
  top->groups[at] = group;
  top->summaries[at] = *summary;
  if (top->count < PROMETHEUS_GROUPS) top->count++;
}

static void traffic_top_find(trafficTop_t *top) {
  trafficSummary_t summary;

  top->count = 0;
  for (const trafficGroup_t *group = trafficState.groups; group; group = group->next) {
    if (!traffic_group_is_open(group)) continue;
    traffic_group_summary(group, 0, &summary);
    traffic_top_insert(top, group, &summary);
  }
}

static void traffic_prometheus_head(FILE *out, const char *name, const char *type, const char *help) {
  fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void traffic_prometheus_totals(FILE *out) {
  trafficTotals_t totals;

  traffic_totals(&totals);
  traffic_prometheus_head(out, "ultraep_records_open", "gauge", "Ranks of communicators that are open here.");
  fprintf(out, "ultraep_records_open %d\n", trafficState.nOpen);
  traffic_prometheus_head(out, "ultraep_p2p_bytes_total", "counter",
                          "Bytes of sends and receives of the process.");
  for (int d = 0; d < TRAFFIC_DIRECTIONS; d++)
    fprintf(out, "ultraep_p2p_bytes_total{direction=\"%s\"} %" PRIu64 "\n", trafficSides[d], totals.bytes[d]);
  traffic_prometheus_head(out, "ultraep_p2p_calls_total", "counter", "Sends and receives of the process.");
  for (int d = 0; d < TRAFFIC_DIRECTIONS; d++)
    fprintf(out, "ultraep_p2p_calls_total{direction=\"%s\"} %" PRIu64 "\n", trafficSides[d], totals.calls[d]);
}

/* A hash, or where it is not known the number within the process: without one, names would collide. */
static void traffic_prometheus_comm(FILE *out, const trafficGroup_t *group) {
  if (group->hash != 0) {
    fprintf(out, "comm=\"0x%" PRIx64 "\"", group->hash);
  } else {
    fprintf(out, "comm=\"%" PRIu64 "\"", group->id);
  }
}

static void traffic_prometheus_ranks(FILE *out, const trafficTop_t *top) {
  traffic_prometheus_head(out, "ultraep_rank_p2p_bytes_total", "counter",
                          "Bytes of a rank of a communicator.");
  for (int i = 0; i < top->count; i++) {
    const trafficGroup_t *group = top->groups[i];
    int count = 0;

    for (const trafficComm_t *comm = group->records; comm && count < PROMETHEUS_RANKS; comm = comm->next) {
      trafficTotals_t totals = {0};

      if (comm->ended) continue;
      count++;
      traffic_totals_add(comm, &totals);
      for (int d = 0; d < TRAFFIC_DIRECTIONS; d++) {
        fputs("ultraep_rank_p2p_bytes_total{", out);
        traffic_prometheus_comm(out, group);
        fprintf(out, ",rank=\"%d\",direction=\"%s\"} %" PRIu64 "\n", comm->rank, trafficSides[d],
                totals.bytes[d]);
      }
    }
  }
}

static void traffic_prometheus_imbalance(FILE *out, const trafficTop_t *top) {
  traffic_prometheus_head(out, "ultraep_imbalance", "gauge",
                          "Max over mean by receiver of what the known ranks sent in the last window.");
  for (int i = 0; i < top->count; i++) {
    trafficSummary_t last = {0};

    if (traffic_group_windows(top->groups[i]) > 0) traffic_group_summary(top->groups[i], 1, &last);
    fputs("ultraep_imbalance{", out);
    traffic_prometheus_comm(out, top->groups[i]);
    fputs("} ", out);
    traffic_print_fixed(out, last.imbalance);
    fputs("\n", out);
  }
}

static void traffic_prometheus_pairs(FILE *out, const trafficTop_t *top) {
  int next[PROMETHEUS_GROUPS] = {0};

  traffic_prometheus_head(out, "ultraep_pair_p2p_bytes_total", "counter",
                          "Bytes of the hottest pairs of ranks.");
  /* The pairs of each communicator are in order: merge them. */
  for (int printed = 0; printed < TRAFFIC_PAIRS; printed++) {
    const ultraepTrafficPair_t *most = NULL;
    int from = 0;

    for (int i = 0; i < top->count; i++) {
      const ultraepTrafficPair_t *pair = &top->summaries[i].pairs[next[i]];

      if (next[i] == top->summaries[i].nPairs || (most && pair->bytes <= most->bytes)) continue;
      most = pair;
      from = i;
    }
    if (!most) return;
    next[from]++;
    fputs("ultraep_pair_p2p_bytes_total{", out);
    traffic_prometheus_comm(out, top->groups[from]);
    fprintf(out, ",from=\"%d\",to=\"%d\"} %" PRId64 "\n", most->from, most->to, most->bytes);
  }
}

void traffic_prometheus_print(FILE *out) {
  trafficTop_t top;

  traffic_top_find(&top);
  traffic_prometheus_totals(out);
  traffic_prometheus_ranks(out, &top);
  traffic_prometheus_imbalance(out, &top);
  traffic_prometheus_pairs(out, &top);
}

/* ---- the file for ultraep_top ---- */
static void traffic_shared_record(FILE *out, const trafficComm_t *comm) {
  trafficFileRecord_t record = {.hash = comm->group->hash,
                                .id = comm->group->id,
                                .rank = comm->rank,
                                .nRanks = comm->nRanks,
                                .open = !comm->ended,
                                .opened = comm->opened};

  fwrite(&record, sizeof(record), 1, out);
  for (size_t i = 0; i < TRAFFIC_DIRECTIONS * (size_t)comm->nRanks; i++) {
    trafficCount_t count = traffic_cell_read(comm, i);
    trafficFileCell_t cell = {.bytes = count.bytes, .calls = count.calls};

    fwrite(&cell, sizeof(cell), 1, out);
  }
}

void traffic_shared_print(FILE *out) {
  trafficFileHeader_t header = {.magic = TRAFFIC_FILE_MAGIC,
                                .version = TRAFFIC_FILE_VERSION,
                                .fileBytes = sizeof(header),
                                .pid = getpid(),
                                .time = traffic_time()};

  traffic_host(header.host, sizeof(header.host));
  for (const trafficGroup_t *group = trafficState.groups; group; group = group->next) {
    header.nRecords += (uint32_t)group->nRecords;
    header.fileBytes +=
        (uint64_t)group->nRecords * (sizeof(trafficFileRecord_t) +
                                     TRAFFIC_DIRECTIONS * (size_t)group->nRanks * sizeof(trafficFileCell_t));
  }
  fwrite(&header, sizeof(header), 1, out);
  for (const trafficGroup_t *group = trafficState.groups; group; group = group->next) {
    for (const trafficComm_t *comm = group->records; comm; comm = comm->next)
      traffic_shared_record(out, comm);
  }
}
