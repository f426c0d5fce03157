/* The files of the traffic record: what they hold, who reads them, and paths that cannot be written. */
#include "top.h"
#include "traffic_internal.h"

#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/ultraep-traffic-XXXXXX";
static char jsonPath[128], prometheusPath[128], sharedPath[128];
static char keys[64];

static char *file_read(const char *path, size_t *size) {
  char *text = NULL;
  FILE *in = fopen(path, "rb"), *out = open_memstream(&text, size);

  if (!in) fail_msg("%s is not there", path);
  for (int c = getc(in); c != EOF; c = getc(in)) putc(c, out);
  fclose(in);
  fclose(out);
  return text;
}

static void file_write(const char *path, const char *bytes, size_t size) {
  FILE *out = fopen(path, "wb");

  assert_non_null(out);
  assert_int_equal(fwrite(bytes, 1, size, out), size);
  fclose(out);
}

static bool file_exists(const char *path) {
  return access(path, F_OK) == 0;
}

/* Ranks 0 and 1 of 3, and a communicator of its own. */
static int open_comms(void **state) {
  static trafficComm_t *comms[3];

  comms[0] = traffic_comm_open(&keys[0], 0xdeadbeefcafe, 0, 3);
  comms[1] = traffic_comm_open(&keys[1], 0xdeadbeefcafe, 1, 3);
  comms[2] = traffic_comm_open(&keys[2], 0, 1, 2);
  traffic_count(comms[0], TRAFFIC_SEND, 1, 4000);
  traffic_count(comms[0], TRAFFIC_SEND, 1, 2000);
  traffic_count(comms[1], TRAFFIC_RECV, 0, 6000);
  traffic_count(comms[1], TRAFFIC_SEND, 2, 3000);
  traffic_count(comms[2], TRAFFIC_RECV, 0, 1ULL << 60);
  *state = comms;
  return comms[0] && comms[1] && comms[2] ? 0 : -1;
}

static int close_comms(void **state) {
  trafficComm_t **comms = *state;

  for (int i = 0; i < 3; i++) traffic_comm_close(comms[i]);
  return 0;
}

static settings_t only(const char *json, const char *prometheus, const char *shared) {
  settings_t settings = {.windowSeconds = 10};

  snprintf(settings.trafficJson, sizeof(settings.trafficJson), "%s", json);
  snprintf(settings.trafficPrometheus, sizeof(settings.trafficPrometheus), "%s", prometheus);
  snprintf(settings.trafficShared, sizeof(settings.trafficShared), "%s", shared);
  return settings;
}

/* ---- JSON ---- */
static json_t *json_comm(json_t *root, const char *hash) {
  json_t *comms = json_object_get(root, "communicators"), *comm;
  size_t i;

  json_array_foreach(comms, i, comm) {
    if (strcmp(json_string_value(json_object_get(comm, "hash")), hash) == 0 &&
        json_is_true(json_object_get(json_array_get(json_object_get(comm, "ranks"), 0), "open")))
      return comm;
  }
  fail_msg("no communicator %s", hash);
  return NULL;
}

static void test_json(void **state) {
  settings_t settings = only(jsonPath, "", "");
  json_error_t error;
  json_t *root, *comm, *rank;

  (void)state;
  traffic_lock();
  trafficState.windowClock -= 11;
  traffic_roll();
  traffic_unlock();
  traffic_writer_write(&settings);
  root = json_load_file(jsonPath, JSON_REJECT_DUPLICATES, &error);
  if (!root) fail_msg("%s:%d: %s", jsonPath, error.line, error.text);
  assert_int_equal(json_integer_value(json_object_get(root, "pid")), getpid());
  assert_true(json_integer_value(json_object_get(json_object_get(root, "totals"), "recvBytes")) >= 1LL << 60);
  comm = json_comm(root, "0xdeadbeefcafe");
  assert_int_equal(json_integer_value(json_object_get(comm, "nRanks")), 3);
  assert_int_equal(json_integer_value(json_object_get(comm, "nKnownRanks")), 2);
  assert_true(json_real_value(json_object_get(comm, "imbalance")) == 2.0);
  assert_int_equal(json_integer_value(json_object_get(comm, "hottestRank")), 1);
  assert_int_equal(json_array_size(json_object_get(comm, "pairs")), 2);
  assert_int_equal(json_array_size(json_object_get(comm, "windows")), 1);
  rank = json_array_get(json_object_get(comm, "windows"), 0);
  assert_int_equal(json_integer_value(json_object_get(rank, "sendBytes")), 9000);
  assert_true(json_real_value(json_object_get(rank, "seconds")) >= 11);
  rank = json_array_get(json_object_get(comm, "ranks"), 1);
  assert_int_equal(json_integer_value(json_object_get(rank, "rank")), 0);
  assert_int_equal(json_array_size(json_object_get(rank, "sendBytes")), 3);
  assert_int_equal(json_integer_value(json_array_get(json_object_get(rank, "sendBytes"), 1)), 6000);
  assert_int_equal(json_integer_value(json_array_get(json_object_get(rank, "sendCalls"), 1)), 2);
  assert_int_equal(json_array_size(json_object_get(rank, "recvCalls")), 3);
  json_decref(root);
}

/* ---- Prometheus ---- */
/* Every line is a comment or NAME{LABELS} NUMBER, and its metric has been declared. Gives the number of
 * samples. */
static int prometheus_check(char *text) {
  char declared[2048] = " ", name[128], word[160], *end;
  int samples = 0;

  for (char *at = strtok(text, "\n"); at; at = strtok(NULL, "\n")) {
    if (sscanf(at, "# TYPE %100s", name) == 1) {
      snprintf(declared + strlen(declared), sizeof(declared) - strlen(declared), "%s ", name);
      continue;
    }
    if (strncmp(at, "# HELP ", 7) == 0) continue;
    assert_int_equal(sscanf(at, "%100[a-z0-9_]", name), 1);
    snprintf(word, sizeof(word), " %s ", name);
    if (!strstr(declared, word)) fail_msg("not declared: %s", at);
    at += strlen(name);
    if (*at == '{') at = strchr(at, '}') + 1;
    assert_int_equal(*at, ' ');
    strtod(at + 1, &end);
    assert_true(end > at + 1 && *end == '\0');
    samples++;
  }
  return samples;
}

static void test_prometheus(void **state) {
  settings_t settings = only("", prometheusPath, "");
  size_t size;
  char *text;

  (void)state;
  traffic_writer_write(&settings);
  text = file_read(prometheusPath, &size);
  assert_non_null(strstr(text, "\nultraep_p2p_bytes_total{direction=\"send\"} "));
  assert_non_null(strstr(
      text, "\nultraep_rank_p2p_bytes_total{comm=\"0xdeadbeefcafe\",rank=\"0\",direction=\"send\"} 6000\n"));
  assert_non_null(
      strstr(text, "\nultraep_pair_p2p_bytes_total{comm=\"0xdeadbeefcafe\",from=\"1\",to=\"2\"} 3000\n"));
  assert_non_null(strstr(text, "\nultraep_imbalance{comm=\"0xdeadbeefcafe\"} "));
  prometheus_check(text);
  free(text);
}

/* 60 communicators more: no more than 8 of them, 8 ranks each, and 10 pairs are named. */
static void test_prometheus_bounded(void **state) {
  settings_t settings = only("", prometheusPath, "");
  trafficComm_t *more[60];
  size_t size;
  char *text;

  (void)state;
  for (int i = 0; i < 60; i++) {
    more[i] = traffic_comm_open(&keys[3 + i], (uint64_t)(1000 + i / 20), i % 20, 20);
    assert_non_null(more[i]);
    for (int r = 0; r < 20; r++) traffic_count(more[i], TRAFFIC_SEND, r, 1000);
  }
  traffic_writer_write(&settings);
  text = file_read(prometheusPath, &size);
  assert_in_range(prometheus_check(text), 30, 1 + 4 + 8 * 8 * 2 + 8 + 10);
  free(text);
  for (int i = 0; i < 60; i++) traffic_comm_close(more[i]);
}

/* ---- the file of ultraep_top ---- */
static char *top_run(const char *arguments, int *status) {
  char command[512], *text = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&text, &size), *in;

  snprintf(command, sizeof(command), "'%s' --once %s 2>&1", ULTRAEP_TOP, arguments);
  in = popen(command, "r"); /* NOLINT(cert-env33-c): our own tool */
  assert_non_null(in);
  for (int c = getc(in); c != EOF; c = getc(in)) putc(c, out);
  *status = WEXITSTATUS(pclose(in));
  fclose(out);
  return text;
}

static void test_top(void **state) {
  settings_t settings = only("", "", sharedPath);
  char arguments[300], *text;
  int status;

  (void)state;
  traffic_writer_write(&settings);
  text = top_run(sharedPath, &status);
  if (status != 0) fail_msg("ultraep_top: %d: %s", status, text);
  assert_non_null(
      strstr(text, "communicator 0xdeadbeefcafe: 2 of 3 ranks seen, sent 9.0KB, received 6.0KB, "));
  assert_non_null(strstr(text, "imbalance 2.00\n"));
  assert_non_null(strstr(text, "hottest     0 -> 1       6.0KB  2 calls\n"));
  assert_null(strchr(text, '\033'));
  free(text);
  snprintf(arguments, sizeof(arguments), "%s/absent", folder);
  text = top_run(arguments, &status);
  assert_int_equal(status, 0);
  assert_non_null(strstr(text, "files 0 (1 not there yet)"));
  free(text);
  text = top_run(folder, &status);
  assert_int_equal(status, 1);
  assert_non_null(strstr(text, "not a regular file"));
  free(text);
  text = top_run("", &status);
  assert_int_equal(status, 2);
  free(text);
}

/* Two processes' files: ranks of one communicator come together. */
static void test_top_merges(void **state) {
  char other[160], *paths[2] = {sharedPath, other}, *bytes;
  settings_t settings = only("", "", sharedPath);
  trafficFileHeader_t *header;
  perfError_t error;
  topRead_t read;
  size_t size;
  int nMatches = 0;

  (void)state;
  snprintf(other, sizeof(other), "%s/other", folder);
  traffic_writer_write(&settings);
  bytes = file_read(sharedPath, &size);
  header = (void *)bytes;
  header->pid++;
  file_write(other, bytes, size);
  assert_int_equal(topReadOpen(&read, paths, 2, &error), 0);
  for (size_t i = 0; i + 1 < read.nRanks; i++) nMatches += topRanksMatch(&read.ranks[i], &read.ranks[i + 1]);
  assert_true(nMatches >= 3); /* four ranks with the hash; those without stay alone */
  for (size_t i = 0; i + 1 < read.nRanks; i++)
    assert_true(read.ranks[i].record->hash != 0 || !topRanksMatch(&read.ranks[i], &read.ranks[i + 1]));
  topReadClose(&read);
  free(bytes);
}

static void damaged(const char *path, const char *bytes, size_t size) {
  char *paths[1] = {(char *)(uintptr_t)path};
  perfError_t error = {""};
  topRead_t read;

  file_write(path, bytes, size);
  assert_int_equal(topReadOpen(&read, paths, 1, &error), -1);
  assert_non_null(strstr(error.text, path));
}

static void test_top_damaged(void **state) {
  settings_t settings = only("", "", sharedPath);
  trafficFileHeader_t *header;
  trafficFileRecord_t *record;
  char path[160], *bytes;
  size_t size;

  (void)state;
  snprintf(path, sizeof(path), "%s/damaged", folder);
  traffic_writer_write(&settings);
  bytes = file_read(sharedPath, &size);
  header = (void *)bytes;
  record = (void *)(bytes + sizeof(*header));
  for (size_t n = 0; n < size; n += n < 300 ? 1 : 97) {
    damaged(path, bytes, n);
    if (n < sizeof(*header)) continue;
    /* A header that fits the length must not be believed either. */
    header->fileBytes = n;
    damaged(path, bytes, n);
    header->fileBytes = size;
  }
  record->nRanks = 0x7fffffff;
  damaged(path, bytes, size);
  record->nRanks = -1;
  damaged(path, bytes, size);
  record->nRanks = 1;
  record->rank = 1;
  damaged(path, bytes, size);
  header->magic++;
  damaged(path, bytes, size);
  free(bytes);
}

/* ---- paths that cannot be written: one line each, and nothing else ---- */
static void test_bad_paths(void **state) {
  char absent[160], errors[160], *text;
  settings_t settings;
  size_t size;
  int saved, file, count = 0;
  struct stat status;

  (void)state;
  snprintf(absent, sizeof(absent), "%s/absent/file.json", folder);
  snprintf(errors, sizeof(errors), "%s/errors", folder);
  settings = only(absent, "/dev/null", folder);
  fflush(stderr);
  saved = dup(STDERR_FILENO);
  file = open(errors, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  dup2(file, STDERR_FILENO);
  for (int i = 0; i < 3; i++) traffic_writer_write(&settings);
  dup2(saved, STDERR_FILENO);
  close(saved);
  close(file);
  text = file_read(errors, &size);
  for (size_t i = 0; i < size; i++) count += text[i] == '\n';
  if (count != 3) fail_msg("%d lines: %s", count, text);
  assert_non_null(strstr(text, "ultraep: ULTRAEP_TRAFFIC_JSON="));
  assert_non_null(strstr(text, "No such file or directory"));
  assert_non_null(strstr(text, "ultraep: ULTRAEP_TRAFFIC_PROMETHEUS=/dev/null: the file cannot be written"));
  assert_non_null(strstr(text, "ultraep: ULTRAEP_TRAFFIC_SHARED="));
  free(text);
  assert_int_equal(stat("/dev/null", &status), 0);
  assert_true(S_ISCHR(status.st_mode));
}

/* ---- the thread, and the end of a process: in children that start afresh ---- */
static int child_main(const char *what) {
  const char *shared = getenv("ULTRAEP_TRAFFIC_SHARED");
  trafficComm_t *comm = traffic_comm_open(&keys[0], 9, 0, 2);

  if (!comm || !shared) return 10;
  traffic_count(comm, TRAFFIC_SEND, 1, 123);
  if (strcmp(what, "fork") == 0) {
    pid_t pid = fork();
    int status = 1;

    if (pid == 0) {
      traffic_count(comm, TRAFFIC_SEND, 1, 1);
      traffic_comm_close(comm);
      exit(0);
    }
    if (waitpid(pid, &status, 0) != pid || status != 0) return 11;
  }
  /* The thread writes while the communicator lives; the wait is bounded by 30 s. */
  for (int i = 0; i < 3000 && !file_exists(shared); i++) usleep(10000);
  if (!file_exists(shared)) return 12;
  traffic_count(comm, TRAFFIC_SEND, 1, 77);
  if (strcmp(what, "close") == 0) traffic_comm_close(comm);
  return 0;
}

static void child_run(const char *what) {
  /* In the child of a fork the address sanitizer's search for leaks waits for ever, where another thread had
   * its allocator at the time of the fork. */
  const char *options = strcmp(what, "fork") == 0 ? "ASAN_OPTIONS=\"$ASAN_OPTIONS:detect_leaks=0\"" : "";
  char command[PATH_MAX + 700], self[PATH_MAX] = "";
  json_t *root, *totals;
  json_error_t error;

  assert_true(readlink("/proc/self/exe", self, sizeof(self) - 1) > 0);
  unlink(sharedPath);
  unlink(jsonPath);
  snprintf(command, sizeof(command), "ULTRAEP_TRAFFIC_SHARED='%s' ULTRAEP_TRAFFIC_JSON='%s' %s '%s' %s",
           sharedPath, jsonPath, options, self, what);
  assert_int_equal(system(command), 0); /* NOLINT(cert-env33-c): this program */
  root = json_load_file(jsonPath, 0, &error);
  if (!root) fail_msg("%s: %s:%d: %s", what, jsonPath, error.line, error.text);
  totals = json_object_get(root, "totals");
  assert_int_equal(json_integer_value(json_object_get(totals, "sendBytes")), 200);
  assert_int_equal(json_integer_value(json_object_get(root, "recordsOpen")),
                   strcmp(what, "close") == 0 ? 0 : 1);
  json_decref(root);
}

static void test_process_end(void **state) {
  (void)state;
  child_run("close");
  child_run("leave");
  child_run("fork");
}

static void test_no_files_left(void **state) {
  char command[300];

  (void)state;
  snprintf(command, sizeof(command), "ls -A '%s' | grep -c 'tmp$' > /dev/null", folder);
  assert_int_not_equal(system(command), 0); /* NOLINT(cert-env33-c): no file of half a write */
}

static int folder_make(void **state) {
  (void)state;
  if (!mkdtemp(folder)) return -1;
  snprintf(jsonPath, sizeof(jsonPath), "%s/traffic.json", folder);
  snprintf(prometheusPath, sizeof(prometheusPath), "%s/traffic.prom", folder);
  snprintf(sharedPath, sizeof(sharedPath), "%s/traffic", folder);
  return 0;
}

static int folder_remove(void **state) {
  char command[200];

  (void)state;
  snprintf(command, sizeof(command), "rm -r '%s'", folder);
  return system(command); /* NOLINT(cert-env33-c) */
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_json, open_comms, close_comms),
      cmocka_unit_test_setup_teardown(test_prometheus, open_comms, close_comms),
      cmocka_unit_test_setup_teardown(test_prometheus_bounded, open_comms, close_comms),
      cmocka_unit_test_setup_teardown(test_top, open_comms, close_comms),
      cmocka_unit_test_setup_teardown(test_top_merges, open_comms, close_comms),
      cmocka_unit_test_setup_teardown(test_top_damaged, open_comms, close_comms),
      cmocka_unit_test_setup_teardown(test_bad_paths, open_comms, close_comms),
      cmocka_unit_test(test_process_end),
      cmocka_unit_test(test_no_files_left),
  };

  if (argc > 1) return child_main(argv[1]);
  return cmocka_run_group_tests(tests, folder_make, folder_remove);
}
