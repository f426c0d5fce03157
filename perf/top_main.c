/* Shows the traffic of running processes, from the files that ULTRAEP_TRAFFIC_SHARED names. */
#include "top.h"

#include "ultraep.h"

#include <argp.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define TOP_TEXT(x) TOP_TEXT_(x)
#define TOP_TEXT_(x) #x

typedef struct {
  bool once;
  double seconds; /* between refreshes */
  char **paths;
  int32_t nPaths;
} topOptions_t;

static const char topDoc[] =
    "Shows which ranks exchange how much, live, from the files that processes write where "
    "ULTRAEP_TRAFFIC_SHARED "
    "names one, e.g. ULTRAEP_TRAFFIC_SHARED=/dev/shm/ultraep-%p. Several files are put together: ranks of "
    "one "
    "communicator find each other by its hash.\v"
    "Imbalance is max over mean by receiver of what the ranks seen have sent. Ends with Ctrl-C.";

static const struct argp_option topArguments[] = {
    {.name = "once", .key = 'o', .doc = "Show once, without colours, and end"},
    {.name = "delay", .key = 'd', .arg = "SECONDS", .doc = "Time between refreshes, 0.1 to 3600 (1)"},
    {0},
};

static error_t top_argument_parse(int key, char *text, struct argp_state *state) {
  topOptions_t *options = state->input;
  perfError_t error;

  switch (key) {
  case 'o':
    options->once = true;
    return 0;
  case 'd':
    if (optionDouble("--delay", text, 0.1, 3600, &options->seconds, &error) != 0)
      argp_error(state, "%s", error.text);
    return 0;
  case ARGP_KEY_ARGS:
    options->paths = state->argv + state->next;
    options->nPaths = state->argc - state->next;
    return 0;
  case ARGP_KEY_NO_ARGS:
    argp_error(state, "which files?");
    return 0;
  default:
    return ARGP_ERR_UNKNOWN;
  }
}

static void top_sleep(double seconds) {
  struct timespec time = {.tv_sec = (time_t)seconds};

  time.tv_nsec = (long)(1e9 * (seconds - (double)time.tv_sec));
  nanosleep(&time, NULL);
}

static int top_show_once(const topOptions_t *options, perfError_t *error) {
  topRead_t now;

  if (topReadOpen(&now, options->paths, options->nPaths, error) != 0) return -1;
  topShow(stdout, &now, NULL, false);
  topReadClose(&now);
  return 0;
}

/* Until the reader of the output goes. A file that cannot be read for a while is said, and tried again. */
static int top_show_live(const topOptions_t *options, perfError_t *error) {
  bool isTerminal = isatty(STDOUT_FILENO);
  topRead_t before = {0};

  while (!ferror(stdout)) {
    topRead_t now;
    int status = topReadOpen(&now, options->paths, options->nPaths, error);

    if (isTerminal) fputs("\033[H\033[2J", stdout);
    if (status == 0) {
      topShow(stdout, &now, &before, isTerminal);
      topReadClose(&before);
      before = now;
    } else {
      printf("ultraep_top: %s\n", error->text);
    }
    fflush(stdout);
    top_sleep(options->seconds);
  }
  topReadClose(&before);
  return perfErrorSet(error, "the output cannot be written");
}

int main(int argc, char **argv) {
  const struct argp argp = {
      .options = topArguments, .parser = top_argument_parse, .args_doc = "FILE...", .doc = topDoc};
  topOptions_t options = {.seconds = 1};
  perfError_t error = {""};
  int status;

  argp_program_version = "ultraep_top " TOP_TEXT(ULTRAEP_VERSION_MAJOR) "." TOP_TEXT(
      ULTRAEP_VERSION_MINOR) "." TOP_TEXT(ULTRAEP_VERSION_PATCH);
  argp_err_exit_status = PERF_EXIT_USAGE;
  argp_parse(&argp, argc, argv, 0, NULL, &options);
  status = options.once ? top_show_once(&options, &error) : top_show_live(&options, &error);
  if (status == 0) return PERF_EXIT_OK;
  fprintf(stderr, "ultraep_top: %s\n", error.text);
  return PERF_EXIT_FAILED;
}
