/* The table of environment variables: every type, good values and bad ones. */
#include "settings.h"

#include "ultraep.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* One variable at a time, so that what is said is about it. */
static const char *variable, *value;

static const char *lookup(const char *name) {
  return variable && strcmp(name, variable) == 0 ? value : NULL;
}

/* Loads with one variable set; the messages, to be freed. */
static char *load(settings_t *settings, const char *name, const char *text) {
  char *messages = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&messages, &size);

  assert_non_null(out);
  variable = name;
  value = text;
  settings_load(settings, lookup, out);
  fclose(out);
  return messages;
}

static void load_good(settings_t *settings, const char *name, const char *text) {
  char *messages = load(settings, name, text);

  if (messages[0]) fail_msg("%s=%s: %s", name, text, messages);
  free(messages);
}

/* One line, which names the variable, its value and what it takes. */
static void load_bad(settings_t *settings, const char *name, const char *text, const char *wanted) {
  char *messages = load(settings, name, text);
  char start[300];

  snprintf(start, sizeof(start), "ultraep: %s=%.200s ", name, text);
  if (strncmp(messages, start, strlen(start)) != 0) fail_msg("%s=%s: '%s'", name, text, messages);
  assert_ptr_equal(strchr(messages, '\n'), messages + strlen(messages) - 1);
  if (!strstr(messages, wanted)) fail_msg("no '%s' in %s", wanted, messages);
  free(messages);
}

static void check_defaults(const settings_t *settings) {
  assert_int_equal(settings->p2p, SETTINGS_P2P_SCHEDULE);
  assert_int_equal(settings->peers, ULTRAEP_PEERS_AUTO);
  assert_int_equal(settings->windowSeconds, 10);
  assert_false(settings->help);
  assert_string_equal(settings->trafficJson, "");
  assert_string_equal(settings->trafficPrometheus, "");
  assert_string_equal(settings->trafficShared, "");
  assert_string_equal(settings->profilerForward, "");
}

static void test_defaults(void **state) {
  static const char *const names[] = {
      "ULTRAEP_P2P",  "ULTRAEP_TRAFFIC_JSON",     "ULTRAEP_TRAFFIC_SHARED",   "ULTRAEP_TRAFFIC_PROMETHEUS",
      "ULTRAEP_HELP", "ULTRAEP_TRAFFIC_WINDOW_S", "ULTRAEP_PROFILER_FORWARD", "ULTRAEP_PEERS"};
  settings_t settings;

  (void)state;
  load_good(&settings, "NOTHING", "1");
  check_defaults(&settings);
  for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
    load_good(&settings, names[i], "");
    check_defaults(&settings);
  }
}

static void test_words(void **state) {
  static const char *const bad[] = {"on", "OFF", "off ", " off", "0", "offs", "observe,schedule"};
  settings_t settings;

  (void)state;
  load_good(&settings, "ULTRAEP_P2P", "off");
  assert_int_equal(settings.p2p, SETTINGS_P2P_OFF);
  load_good(&settings, "ULTRAEP_P2P", "observe");
  assert_int_equal(settings.p2p, SETTINGS_P2P_OBSERVE);
  load_good(&settings, "ULTRAEP_P2P", "schedule");
  assert_int_equal(settings.p2p, SETTINGS_P2P_SCHEDULE);
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    load_bad(&settings, "ULTRAEP_P2P", bad[i], "off|observe|schedule); the default schedule is used");
    check_defaults(&settings);
  }
}

static void test_peers(void **state) {
  static const char *const bad[] = {"windows", "IPC", "ipc ", "0", "auto|ipc"};
  settings_t settings;

  (void)state;
  load_good(&settings, "ULTRAEP_PEERS", "window");
  assert_int_equal(settings.peers, ULTRAEP_PEERS_WINDOW);
  load_good(&settings, "ULTRAEP_PEERS", "ipc");
  assert_int_equal(settings.peers, ULTRAEP_PEERS_IPC);
  load_good(&settings, "ULTRAEP_PEERS", "auto");
  check_defaults(&settings);
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    load_bad(&settings, "ULTRAEP_PEERS", bad[i], "auto|window|ipc); the default auto is used");
    check_defaults(&settings);
  }
}

static void test_integers(void **state) {
  static const char *const bad[] = {"0",
                                    "86401",
                                    "-1",
                                    "-",
                                    "1s",
                                    "1.5",
                                    " 1",
                                    "+1",
                                    "1 ",
                                    "0x",
                                    "ten",
                                    "--1",
                                    "9223372036854775808",
                                    "4294967297"};
  settings_t settings;

  (void)state;
  load_good(&settings, "ULTRAEP_TRAFFIC_WINDOW_S", "1");
  assert_int_equal(settings.windowSeconds, 1);
  load_good(&settings, "ULTRAEP_TRAFFIC_WINDOW_S", "86400");
  assert_int_equal(settings.windowSeconds, 86400);
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    load_bad(&settings, "ULTRAEP_TRAFFIC_WINDOW_S", bad[i], "integer 1..86400); the default 10 is used");
    check_defaults(&settings);
  }
}

static void test_switches(void **state) {
  static const char *const bad[] = {"2", "yes", "true", "01", "1 "};
  settings_t settings;

  (void)state;
  load_good(&settings, "ULTRAEP_HELP", "1");
  assert_true(settings.help);
  load_good(&settings, "ULTRAEP_HELP", "0");
  assert_false(settings.help);
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    load_bad(&settings, "ULTRAEP_HELP", bad[i], "0|1); the default 0 is used");
    check_defaults(&settings);
  }
}

static void test_paths(void **state) {
  char longest[SETTINGS_PATH_BYTES + 1];
  settings_t settings;

  (void)state;
  load_good(&settings, "ULTRAEP_TRAFFIC_JSON", "a/b.json");
  assert_string_equal(settings.trafficJson, "a/b.json");
  load_good(&settings, "ULTRAEP_TRAFFIC_PROMETHEUS", "/x y/%h-%p.prom");
  assert_string_equal(settings.trafficPrometheus, "/x y/%h-%p.prom");
  load_good(&settings, "ULTRAEP_TRAFFIC_SHARED", "100%%");
  assert_string_equal(settings.trafficShared, "100%%");
  load_bad(&settings, "ULTRAEP_TRAFFIC_SHARED", "a%", "no file is used");
  load_bad(&settings, "ULTRAEP_TRAFFIC_SHARED", "a%d", "%h host, %p process id");
  load_bad(&settings, "ULTRAEP_TRAFFIC_SHARED", "%%%", "no file is used");
  check_defaults(&settings);
  memset(longest, 'x', sizeof(longest));
  longest[SETTINGS_PATH_BYTES] = '\0';
  load_bad(&settings, "ULTRAEP_TRAFFIC_JSON", longest, "up to 1023 bytes");
  check_defaults(&settings);
  longest[SETTINGS_PATH_BYTES - 1] = '\0';
  load_good(&settings, "ULTRAEP_TRAFFIC_JSON", longest);
  assert_string_equal(settings.trafficJson, longest);
}

static void test_expand(void **state) {
  char text[512], wanted[512], host[256] = "";

  (void)state;
  assert_int_equal(gethostname(host, sizeof(host) - 1), 0);
  settings_path_expand("/a/%h-%p-%%-%%p", text, sizeof(text));
  snprintf(wanted, sizeof(wanted), "/a/%s-%ld-%%-%%p", host, (long)getpid());
  assert_string_equal(text, wanted);
  settings_path_expand("12345678", text, 9);
  assert_string_equal(text, "12345678");
  settings_path_expand("123456789", text, 9);
  assert_string_equal(text, "");
}

static void test_print(void **state) {
  settings_t settings;
  char *table = NULL;
  size_t size = 0;
  FILE *out = open_memstream(&table, &size);

  (void)state;
  assert_non_null(out);
  load_good(&settings, "ULTRAEP_TRAFFIC_JSON", "out.json");
  settings_print(&settings, out);
  fclose(out);
  assert_non_null(strstr(table, "  ULTRAEP_P2P=schedule\n"));
  assert_non_null(strstr(table, "takes: off|observe|schedule; default: schedule\n"));
  assert_non_null(strstr(table, "  ULTRAEP_TRAFFIC_JSON=out.json\n"));
  assert_non_null(strstr(table, "takes: integer 1..86400; default: 10\n"));
  assert_non_null(strstr(table, "  ULTRAEP_HELP=0\n"));
  free(table);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_defaults), cmocka_unit_test(test_words),    cmocka_unit_test(test_integers),
      cmocka_unit_test(test_peers),    cmocka_unit_test(test_switches), cmocka_unit_test(test_paths),
      cmocka_unit_test(test_expand),   cmocka_unit_test(test_print),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
