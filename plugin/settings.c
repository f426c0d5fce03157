#include "settings.h"

#include "config.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

typedef enum { SETTING_WORD, SETTING_INT, SETTING_SWITCH, SETTING_PATH } settingType_t;

enum { SETTINGS_WORDS = 4, SETTINGS_TEXT_BYTES = 96 };

typedef struct {
  const char *name;
  settingType_t type;
  size_t offset;                     /* of the field in settings_t */
  const char *byDefault;             /* as it would be written in the environment */
  const char *words[SETTINGS_WORDS]; /* SETTING_WORD: the field is the index */
  int32_t min, max;                  /* SETTING_INT */
  const char *help;
} setting_t;

static const setting_t settingsTable[] = {
    {.name = "ULTRAEP_P2P",
     .type = SETTING_WORD,
     .offset = offsetof(settings_t, p2p),
     .byDefault = "schedule",
     .words = {"off", "observe", "schedule"},
     .help =
         "what is done with NCCL's send, receive and all-to-all calls: nothing (the profiler role still "
         "counts what NCCL tells it); count them and pass them on; or count them and, on communicators "
         "whose ranks share one domain, move them by load with our own kernel (under NCCL before 2.29 only "
         "where this is set); alike on all ranks"},
    {.name = "ULTRAEP_P2P_CTAS",
     .type = SETTING_INT,
     .offset = offsetof(settings_t, p2pCtas),
     .byDefault = "0",
     .min = 0,
     .max = 128,
     .help = "thread blocks (SMs) that a scheduled group may use; 0: as many as NCCL_MAX_CTAS says, else 16"},
    {.name = "ULTRAEP_P2P_OVERLAP",
     .type = SETTING_SWITCH,
     .offset = offsetof(settings_t, p2pOverlap),
     .byDefault = "1",
     .help =
         "1: the kernel after a scheduled group's may begin while that one ends, if it was launched to do "
         "so (programmatic dependent launch): our own, and others, which must wait for it themselves as "
         "CUDA asks of them; 0: none does"},
    {.name = "ULTRAEP_P2P_STAGE_KB",
     .type = SETTING_INT,
     .offset = offsetof(settings_t, p2pStageKb),
     .byDefault = "0",
     .min = 0,
     .max = 65536,
     .help = "KiB of a stage, through which data goes to buffers that peers do not map: a power of two, or "
             "the next smaller one holds; 0: 512, or less where a rank's stages would take more than 64 MiB, "
             "64 at least; alike on all ranks"},
    {.name = "ULTRAEP_P2P_STAGES",
     .type = SETTING_INT,
     .offset = offsetof(settings_t, p2pStages),
     .byDefault = "8",
     .min = 1,
     .max = 64,
     .help = "stages for each peer, on every rank: a power of two, or the next smaller one holds; alike on "
             "all ranks"},
    {.name = "ULTRAEP_P2P_EAGER_KB",
     .type = SETTING_INT,
     .offset = offsetof(settings_t, p2pEagerKb),
     .byDefault = "32",
     .min = 0,
     .max = 65536,
     .help = "KiB up to which a send does not wait for its receive, one stage at most; alike on all ranks"},
    {.name = "ULTRAEP_P2P_TIMEOUT_MS",
     .type = SETTING_INT,
     .offset = offsetof(settings_t, p2pTimeoutMs),
     .byDefault = "86400000",
     .min = 0,
     .max = 2147483647,
     .help = "how long a scheduled send or receive waits for its peer, and a new communicator for all its "
             "ranks to agree (10 minutes at most where making it blocks); 0: for ever, as NCCL does"},
    {.name = "ULTRAEP_P2P_SHARE",
     .type = SETTING_WORD,
     .offset = offsetof(settings_t, p2pShare),
     .byDefault = "safe",
     .words = {"safe", "all", "off"},
     .help = "receive buffers that peers map and write directly: those in cuMem memory (ncclMemAlloc), which "
             "may be freed while mapped; cudaMalloc's, too; or none"},
    {.name = CONFIG_PEERS_VARIABLE,
     .type = SETTING_WORD,
     .offset = offsetof(settings_t, peers),
     .byDefault = "auto",
     .words = {CONFIG_PEERS_WORDS},
     .help =
         "how ranks reach each other's memory: by NCCL's windows (NCCL 2.29 or later), by CUDA IPC, or by "
         "windows where there are any; a group's config may say otherwise"},
    {.name = "ULTRAEP_TRAFFIC_JSON",
     .type = SETTING_PATH,
     .offset = offsetof(settings_t, trafficJson),
     .byDefault = "",
     .help = "file for the traffic record as JSON, written every window and at the end"},
    {.name = "ULTRAEP_TRAFFIC_PROMETHEUS",
     .type = SETTING_PATH,
     .offset = offsetof(settings_t, trafficPrometheus),
     .byDefault = "",
     .help = "file for its totals and hottest pairs in Prometheus's text format, written every window"},
    {.name = "ULTRAEP_TRAFFIC_SHARED",
     .type = SETTING_PATH,
     .offset = offsetof(settings_t, trafficShared),
     .byDefault = "",
     .help = "file that ultraep_top shows, written every second; best in /dev/shm"},
    {.name = "ULTRAEP_TRAFFIC_WINDOW_S",
     .type = SETTING_INT,
     .offset = offsetof(settings_t, windowSeconds),
     .byDefault = "10",
     .min = 1,
     .max = 86400,
     .help = "seconds in a window of the traffic record"},
    {.name = "ULTRAEP_PROFILER_FORWARD",
     .type = SETTING_PATH,
     .offset = offsetof(settings_t, profilerForward),
     .byDefault = "",
     .help = "another profiler library, a path or a name as in NCCL_PROFILER_PLUGIN, which gets every event "
             "where NCCL loads this one as its profiler"},
    {.name = "ULTRAEP_HELP",
     .type = SETTING_SWITCH,
     .offset = offsetof(settings_t, help),
     .byDefault = "0",
     .help = "1: print this table to stderr when the library is first used"},
};
enum { SETTINGS_COUNT = sizeof(settingsTable) / sizeof(settingsTable[0]) };

/* What the variable takes, in words. */
static void settings_range_text(const setting_t *setting, char *text, size_t size) {
  size_t length = 0;

  switch (setting->type) {
  case SETTING_WORD:
    text[0] = '\0';
    for (int i = 0; i < SETTINGS_WORDS && setting->words[i] && length < size; i++)
      length += (size_t)snprintf(text + length, size - length, "%s%s", i > 0 ? "|" : "", setting->words[i]);
    break;
  case SETTING_INT:
    snprintf(text, size, "integer %d..%d", setting->min, setting->max);
    break;
  case SETTING_SWITCH:
    snprintf(text, size, "0|1");
    break;
  case SETTING_PATH:
    snprintf(text, size, "path, %%h host, %%p process id, %%%% a %%; up to %d bytes",
             SETTINGS_PATH_BYTES - 1);
    break;
  }
}

static bool settings_read_int(const setting_t *setting, const char *text, int32_t *value) {
  char *end;
  long number;

  /* strtol would skip spaces and take a plus sign. */
  if (!((text[0] >= '0' && text[0] <= '9') || text[0] == '-')) return false;
  errno = 0;
  number = strtol(text, &end, 10);
  if (errno != 0 || *end != '\0' || number < setting->min || number > setting->max) return false;
  *value = (int32_t)number;
  return true;
}

static bool settings_read_path(const char *text, char *path) {
  size_t length = strlen(text);

  if (length >= SETTINGS_PATH_BYTES) return false;
  for (const char *at = strchr(text, '%'); at; at = strchr(at + 2, '%')) {
    if (at[1] == '\0' || !strchr("hp%", at[1])) return false;
  }
  memcpy(path, text, length + 1);
  return true;
}

/* Sets the setting's field, or leaves it where the text does not fit. */
static bool settings_read(const setting_t *setting, const char *text, settings_t *settings) {
  void *field = (char *)settings + setting->offset;

  switch (setting->type) {
  case SETTING_WORD:
    return config_read_word(setting->words, SETTINGS_WORDS, text, field);
  case SETTING_INT:
    return settings_read_int(setting, text, field);
  case SETTING_SWITCH:
    if (strcmp(text, "0") != 0 && strcmp(text, "1") != 0) return false;
    *(bool *)field = text[0] == '1';
    return true;
  case SETTING_PATH:
    return settings_read_path(text, field);
  }
  return false;
}

void settings_load(settings_t *settings, const char *(*lookup)(const char *name), FILE *messages) {
  char range[SETTINGS_TEXT_BYTES];
  const char *text;

  memset(settings, 0, sizeof(*settings));
  for (int i = 0; i < SETTINGS_COUNT; i++) {
    const setting_t *setting = &settingsTable[i];

    text = lookup(setting->name);
    settings_read(setting, setting->byDefault, settings);
    if (!text || text[0] == '\0' || settings_read(setting, text, settings)) continue;
    settings_range_text(setting, range, sizeof(range));
    /* Long values are cut: the variable's name says where to look. */
    fprintf(messages, "ultraep: %s=%.200s does not fit (%s); %s%s is used\n", setting->name, text, range,
            setting->byDefault[0] ? "the default " : "no file", setting->byDefault);
  }
  text = lookup("ULTRAEP_P2P");
  settings->p2pIsAsked = text && text[0] != '\0';
}

static void settings_value_text(const setting_t *setting, const settings_t *settings, char *text,
                                size_t size) {
  const void *field = (const char *)settings + setting->offset;

  switch (setting->type) {
  case SETTING_WORD:
    snprintf(text, size, "%s", setting->words[*(const int32_t *)field]);
    break;
  case SETTING_INT:
    snprintf(text, size, "%d", *(const int32_t *)field);
    break;
  case SETTING_SWITCH:
    snprintf(text, size, "%d", *(const bool *)field);
    break;
  case SETTING_PATH:
    snprintf(text, size, "%s", (const char *)field);
    break;
  }
}

void settings_print(const settings_t *settings, FILE *out) {
  char range[SETTINGS_TEXT_BYTES], value[SETTINGS_PATH_BYTES];

  fprintf(out, "ultraep: environment variables\n");
  for (int i = 0; i < SETTINGS_COUNT; i++) {
    const setting_t *setting = &settingsTable[i];

    settings_range_text(setting, range, sizeof(range));
    settings_value_text(setting, settings, value, sizeof(value));
    fprintf(out, "  %s=%s\n      %s\n      takes: %s; default: %s\n", setting->name, value, setting->help,
            range, setting->byDefault[0] ? setting->byDefault : "not set");
  }
}

void settings_path_expand(const char *path, char *text, size_t size) {
  char host[256] = "";
  size_t length = 0;

  if (gethostname(host, sizeof(host) - 1) != 0) host[0] = '\0';
  for (const char *at = path; *at && length < size; at++) {
    if (*at != '%' || at[1] == '\0') {
      length += (size_t)snprintf(text + length, size - length, "%c", *at);
      continue;
    }
    at++;
    if (*at == 'h') length += (size_t)snprintf(text + length, size - length, "%s", host);
    if (*at == 'p') length += (size_t)snprintf(text + length, size - length, "%ld", (long)getpid());
    if (*at == '%') length += (size_t)snprintf(text + length, size - length, "%%");
  }
  if (size > 0 && (length == 0 || length >= size)) text[0] = '\0';
}

bool settings_is_verbose(void) {
  const char *level = getenv("NCCL_DEBUG");

  return level && (strcasecmp(level, "INFO") == 0 || strcasecmp(level, "TRACE") == 0);
}

bool settings_tells_unscheduled(void) {
  return settings_get()->p2pIsAsked || settings_is_verbose();
}

void settings_warn(const char *format, ...) {
  char text[SETTINGS_PATH_BYTES + 256];
  va_list arguments;

  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  /* One call, so that lines of several threads do not mix. */
  fprintf(stderr, "ultraep: %s\n", text);
}

static settings_t settingsOfProcess;
static pthread_once_t settingsOnce = PTHREAD_ONCE_INIT;

static const char *settings_lookup(const char *name) {
  return getenv(name);
}

static void settings_load_process(void) {
  settings_load(&settingsOfProcess, settings_lookup, stderr);
  if (settingsOfProcess.help) settings_print(&settingsOfProcess, stderr);
}

const settings_t *settings_get(void) {
  pthread_once(&settingsOnce, settings_load_process);
  return &settingsOfProcess;
}
