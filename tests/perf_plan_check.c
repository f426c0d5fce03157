/* Checks the JSON lines of ultraep_plan against the load trace they were made from, with a reader and a
 * mapping of its own. Usage: perf_plan_check JSON TRACE RANKS SLOTS DOMAIN MOST_MEAN MOST_WORST TRACE may be
 * "-": then loads are not compared. MOST_MEAN and MOST_WORST bound the realised imbalance.
 */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 1024, MAX_EXPERTS = 4096 };

typedef struct {
  int nRanks, nSlots, nDomainRanks;
  FILE *trace; /* null: loads unknown */
  char *line;  /* the row that was read last, null at the end */
  size_t lineRoom;
  int nExperts;
  long long loads[MAX_EXPERTS]; /* of the record, summed over sources */
} check_t;

typedef struct {
  long records;
  double before, planned, realised, bound, worstRealised;
} sums_t;

static int fail(const char *what, long record) {
  fprintf(stderr, "perf_plan_check: record %ld: %s\n", record, what);
  return -1;
}

static void line_read(check_t *check) {
  if (getline(&check->line, &check->lineRoom, check->trace) > 0) return;
  free(check->line);
  check->line = NULL;
}

/* Sums the trace's next record into loads; label gets its first three cells. */
static int record_read(check_t *check, long long label[3]) {
  long long row[4];
  memset(check->loads, 0, sizeof(check->loads));
  for (int rows = 0; check->line != NULL; rows++) {
    char *at = check->line;
    for (int i = 0; i < 4; i++) row[i] = strtoll(at, &at, 10), at++;
    if (rows == 0) memcpy(label, row, 3 * sizeof(row[0]));
    if (memcmp(label, row, 3 * sizeof(row[0])) != 0) return 0;
    int expert = 0;
    for (; at[-1] == ',' && expert < MAX_EXPERTS; expert++)
      check->loads[expert] += strtoll(at, &at, 10), at++;
    check->nExperts = expert;
    line_read(check);
  }
  return 0;
}

static double number_of(json_t *object, const char *key) {
  json_t *value = json_object_get(object, key);
  return json_is_number(value) ? json_number_value(value) : NAN;
}

/* Instances against slots, domains, masters and loads; rank sums against the imbalances. */
static int instances_check(const check_t *check, json_t *object, long record) {
  static long long quotas[MAX_EXPERTS], ranks[MAX_RANKS], before[MAX_RANKS];
  static int slots[MAX_RANKS], fanout[MAX_EXPERTS];
  static unsigned char seen[MAX_EXPERTS][MAX_RANKS];
  json_t *instances = json_object_get(object, "instances"), *instance;
  size_t index;
  int replicas = 0, nExperts = 0, most = 0, mostFanout = 0;
  memset(quotas, 0, sizeof(quotas));
  memset(ranks, 0, sizeof(ranks));
  memset(before, 0, sizeof(before));
  memset(slots, 0, sizeof(slots));
  memset(fanout, 0, sizeof(fanout));
  memset(seen, 0, sizeof(seen));
  json_array_foreach(instances, index, instance) {
    long long expert = json_integer_value(json_array_get(instance, 0));
    if (json_array_size(instance) != 3 || expert < 0 || expert >= MAX_EXPERTS)
      return fail("bad instance", record);
    if (expert + 1 > nExperts) nExperts = (int)expert + 1;
  }
  if (nExperts == 0 || nExperts % check->nRanks != 0) return fail("number of experts", record);
  int perRank = nExperts / check->nRanks;
  json_array_foreach(instances, index, instance) {
    int expert = (int)json_integer_value(json_array_get(instance, 0));
    int rank = (int)json_integer_value(json_array_get(instance, 1)), master = expert / perRank;
    long long quota = json_integer_value(json_array_get(instance, 2));
    if (rank < 0 || rank >= check->nRanks || quota < 0) return fail("rank or quota", record);
    if (seen[expert][rank]++ != 0) return fail("two instances of an expert on one rank", record);
    if (rank / check->nDomainRanks != master / check->nDomainRanks)
      return fail("replica outside the domain", record);
    quotas[expert] += quota;
    ranks[rank] += quota;
    before[master] += quota;
    if (rank == master) continue;
    replicas++;
    if (++slots[rank] > check->nSlots) return fail("more replicas than slots", record);
    if (slots[rank] > most) most = slots[rank];
    if (++fanout[expert] > mostFanout) mostFanout = fanout[expert];
  }
  long long total = 0, maxBefore = 0, maxAfter = 0;
  for (int e = 0; e < nExperts; e++) {
    if (!seen[e][e / perRank]) return fail("an expert without its master", record);
    if (check->trace != NULL && quotas[e] != check->loads[e]) return fail("quotas are not the loads", record);
    total += quotas[e];
  }
  if (check->trace != NULL && nExperts != check->nExperts) return fail("experts missing", record);
  for (int r = 0; r < check->nRanks; r++) {
    if (ranks[r] > maxAfter) maxAfter = ranks[r];
    if (before[r] > maxBefore) maxBefore = before[r];
  }
  double mean = (double)total / check->nRanks;
  if (total > 0 && fabs(number_of(object, "planned") - (double)maxAfter / mean) > 1e-6)
    return fail("planned", record);
  if (total > 0 && fabs(number_of(object, "before") - (double)maxBefore / mean) > 1e-6)
    return fail("before", record);
  if (number_of(object, "replicas") != replicas || number_of(object, "rank_in") != most ||
      number_of(object, "fanout") != mostFanout) {
    return fail("replicas, rank_in or fanout", record);
  }
  return 0;
}

/* ---- what rows and copies cost ---- */

/* Copies that ranks send and receive, counted from the instances. */
typedef struct {
  int replicas, fanout; /* all, and the most of one expert */
  int out, in,
      own;        /* the most of one rank: replicas of its masters, in its slots, its experts that have any */
  int most;       /* of own + in: what a rank sends at most where replicas relay */
  long long load; /* of the busiest rank */
} copies_t;

static copies_t copies_count(const check_t *check, json_t *object) {
  static int out[MAX_RANKS], in[MAX_RANKS], own[MAX_RANKS], fanout[MAX_EXPERTS];
  static long long load[MAX_RANKS];
  copies_t n = {0};
  json_t *instances = json_object_get(object, "instances"), *instance;
  int nExperts = (int)json_array_size(instances) - (int)number_of(object, "replicas");
  int perRank = nExperts / check->nRanks;
  size_t index;
  memset(out, 0, sizeof(out)), memset(in, 0, sizeof(in)), memset(own, 0, sizeof(own));
  memset(fanout, 0, sizeof(fanout)), memset(load, 0, sizeof(load));
  json_array_foreach(instances, index, instance) {
    int expert = (int)json_integer_value(json_array_get(instance, 0));
    int rank = (int)json_integer_value(json_array_get(instance, 1));
    load[rank] += json_integer_value(json_array_get(instance, 2));
    if (rank == expert / perRank) continue;
    n.replicas++, out[expert / perRank]++, in[rank]++;
    if (fanout[expert]++ == 0) own[expert / perRank]++;
    if (fanout[expert] > n.fanout) n.fanout = fanout[expert];
  }
  for (int r = 0; r < check->nRanks; r++) {
    if (out[r] > n.out) n.out = out[r];
    if (in[r] > n.in) n.in = in[r];
    if (own[r] > n.own) n.own = own[r];
    if (own[r] + in[r] > n.most) n.most = own[r] + in[r];
    if (load[r] > n.load) n.load = load[r];
  }
  return n;
}

static int larger(int a, int b) {
  return a > b ? a : b;
}

static int is_near(double a, double b) {
  return fabs(a - b) <= 1e-6 * fabs(a) + 1e-5;
}

/* With tiles of one byte and no time between tiles, so that what is left is the links' own time. */
static int copies_check(const check_t *check, json_t *object, long record) {
  json_t *links = json_object_get(object, "copies"), *link;
  copies_t n = copies_count(check, object);
  size_t index;
  json_array_foreach(links, index, link) {
    json_t *direct = json_object_get(link, "direct"), *relay = json_object_get(link, "relay");
    double copy = number_of(link, "copy_us"), sends = number_of(relay, "sends");
    if (number_of(direct, "sends") != n.out || number_of(direct, "receives") != n.in ||
        !is_near(number_of(direct, "us"), larger(n.out, n.in) * copy))
      return fail("copies: direct", record);
    if (number_of(relay, "receives") != n.in || sends < n.own || sends > n.most)
      return fail("copies: what ranks send or receive in a relay", record);
    if (number_of(relay, "depth") != n.fanout ||
        !is_near(number_of(relay, "us"), number_of(relay, "floor_us")) ||
        !is_near(number_of(relay, "floor_us"), larger((int)sends, n.in) * copy))
      return fail("copies: relay", record);
  }
  return links != NULL && json_array_size(links) == 0 ? fail("copies: no links", record) : 0;
}

static double gate_cost(json_t *gate, const char *key) {
  json_t *cost = json_object_get(gate, key);
  return number_of(cost, "rows_us") + number_of(cost, "copies_us");
}

static int gate_check(const check_t *check, json_t *object, long record) {
  json_t *gate = json_object_get(object, "gate"), *gated = json_object_get(gate, "gated");
  if (gate == NULL) return 0;
  copies_t n = copies_count(check, object);
  int copies = larger(json_is_true(json_object_get(gate, "relay")) ? n.own : n.out, n.in);
  if (number_of(gate, "kept") != n.replicas || number_of(gated, "copies") != copies)
    return fail("gate: kept or copies", record);
  if (!is_near(number_of(gated, "rows_us"), (double)n.load * number_of(gate, "row_ns") / 1e3) ||
      !is_near(number_of(gated, "copies_us"), copies * number_of(gate, "copy_us")))
    return fail("gate: cost of what it kept", record);
  if (!(gate_cost(gate, "gated") <= gate_cost(gate, "full") + 1e-6) ||
      !(gate_cost(gate, "gated") <= number_of(gate, "none_rows_us") + 1e-6))
    return fail("gate: something costs less", record);
  return 0;
}

static int record_check(check_t *check, json_t *object, sums_t *sums) {
  long record = sums->records;
  if (check->trace != NULL) {
    long long label[3] = {-1, -1, -1};
    if (record_read(check, label) != 0) return -1;
    if (number_of(object, "step") != (double)label[0] || number_of(object, "layer") != (double)label[1] ||
        number_of(object, "microbatch") != (double)label[2]) {
      return fail("step, layer or microbatch", record);
    }
  }
  if (instances_check(check, object, record) != 0 || copies_check(check, object, record) != 0 ||
      gate_check(check, object, record) != 0)
    return -1;
  double planned = number_of(object, "planned"), realised = number_of(object, "realised");
  if (!(realised == planned)) return fail("realised is not planned", record);
  if (!(number_of(object, "bound") <= planned)) return fail("planned is below the bound", record);
  if (!(number_of(object, "plan_us") >= 0)) return fail("plan_us", record);
  sums->records++;
  sums->before += number_of(object, "before");
  sums->planned += planned;
  sums->realised += realised;
  sums->bound += number_of(object, "bound");
  if (realised > sums->worstRealised) sums->worstRealised = realised;
  return 0;
}

static int summary_check(const check_t *check, json_t *summary, const sums_t *sums, double mostMean,
                         double mostWorst) {
  json_t *mean = json_object_get(summary, "mean"), *worst = json_object_get(summary, "worst");
  double count = (double)sums->records;
  if (number_of(summary, "records") != count || count < 1) return fail("summary: records", sums->records);
  if (!(fabs(number_of(mean, "before") - sums->before / count) < 1e-6) ||
      !(fabs(number_of(mean, "planned") - sums->planned / count) < 1e-6) ||
      !(fabs(number_of(mean, "realised") - sums->realised / count) < 1e-6) ||
      !(fabs(number_of(mean, "bound") - sums->bound / count) < 1e-6) ||
      !(fabs(number_of(worst, "realised") - sums->worstRealised) < 1e-6)) {
    return fail("summary: means or worst", sums->records);
  }
  if (check->trace != NULL && check->line != NULL) return fail("the trace has more records", sums->records);
  printf("%ld records: mean realised %.6f, worst %.6f\n", sums->records, sums->realised / count,
         sums->worstRealised);
  if (sums->realised / count > mostMean) return fail("mean realised imbalance is too large", sums->records);
  if (sums->worstRealised > mostWorst) return fail("worst realised imbalance is too large", sums->records);
  return 0;
}

static int lines_check(check_t *check, FILE *file, double mostMean, double mostWorst) {
  sums_t sums = {0};
  char *line = NULL;
  size_t room = 0;
  int status = 0, ended = 0;
  while (status == 0 && getline(&line, &room, file) > 0) {
    json_error_t error;
    json_t *object = json_loads(line, 0, &error), *summary = json_object_get(object, "summary");
    if (object == NULL || ended) {
      status = fail(ended ? "a line after the summary" : error.text, sums.records);
    } else if (summary != NULL) {
      ended = 1;
      status = summary_check(check, summary, &sums, mostMean, mostWorst);
    } else {
      status = record_check(check, object, &sums);
    }
    json_decref(object);
  }
  free(line);
  return status == 0 && !ended ? fail("no summary", sums.records) : status;
}

int main(int argc, char **argv) {
  if (argc != 8) {
    fprintf(stderr, "usage: %s JSON TRACE RANKS SLOTS DOMAIN MOST_MEAN MOST_WORST\n", argv[0]);
    return 2;
  }
  static check_t check;
  check.nRanks = atoi(argv[3]);
  check.nSlots = atoi(argv[4]);
  check.nDomainRanks = atoi(argv[5]);
  FILE *file = fopen(argv[1], "r");
  if (strcmp(argv[2], "-") != 0) {
    check.trace = fopen(argv[2], "r");
    if (check.trace != NULL) line_read(&check), line_read(&check); /* the header, the first row */
  }
  if (file == NULL || (strcmp(argv[2], "-") != 0 && check.trace == NULL)) {
    perror("perf_plan_check");
    return 1;
  }
  int status = lines_check(&check, file, atof(argv[6]), atof(argv[7]));
  free(check.line);
  if (check.trace != NULL) fclose(check.trace);
  fclose(file);
  return status == 0 ? 0 : 1;
}
