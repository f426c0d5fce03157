/* Writes the files of the traffic record: a thread does it while the process lives, the library's end once
 * more.
 *
 * Each file is built in memory under the lock, written beside its place without the lock, and renamed into
 * it: a reader never sees half a file, a full disk or a slow one holds up no communicator, and nobody who
 * cuts a file short can hurt this process, as would be so with a mapping. What goes wrong is said once a
 * file. */
#include "traffic_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { WRITER_SHARED_SECONDS = 1, WRITER_STOP_SECONDS = 5, WRITER_STACK_BYTES = 256 << 10 };

typedef void (*trafficPrint_t)(FILE *out);

typedef struct {
  trafficPrint_t print;
  _Atomic bool warned;
} trafficOutput_t;

static trafficOutput_t trafficJson = {.print = traffic_json_print};
static trafficOutput_t trafficPrometheus = {.print = traffic_prometheus_print};
static trafficOutput_t trafficShared = {.print = traffic_shared_print};

/* ---- one file ---- */
static bool traffic_file_put(int file, const char *bytes, size_t count) {
  while (count > 0) {
    ssize_t written = write(file, bytes, count);

    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes += written;
    count -= (size_t)written;
  }
  return true;
}

/* False, and errno, where it could not be done; the old file is then still there. */
static bool traffic_file_replace(const char *path, const char *bytes, size_t count) {
  char beside[SETTINGS_PATH_BYTES + 300];
  struct stat status;
  int file, error;

  /* A device or a pipe must not be renamed over. */
  if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
    errno = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
    return false;
  }
  snprintf(beside, sizeof(beside), "%s.%ld.tmp", path, (long)getpid());
  file = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (file < 0) return false;
  if (!traffic_file_put(file, bytes, count)) goto close_file;
  if (close(file) != 0) goto remove_file;
  if (rename(beside, path) != 0) goto remove_file;
  return true;

close_file:
  error = errno;
  close(file);
  errno = error;
remove_file:
  error = errno;
  unlink(beside);
  errno = error;
  return false;
}

/* What `print` writes, under the lock; null where memory is short. */
static char *traffic_output_text(trafficPrint_t print, size_t *size) {
  char *text = NULL;
  FILE *out = open_memstream(&text, size);
  bool failed;

  if (!out) return NULL;
  traffic_lock();
  print(out);
  traffic_unlock();
  failed = ferror(out) != 0;
  if (fclose(out) == 0 && !failed) return text;
  free(text);
  return NULL;
}

static void traffic_output_write(trafficOutput_t *output, const char *setting, const char *name) {
  char path[SETTINGS_PATH_BYTES + 256];
  size_t size = 0;
  char *text;
  bool written;

  if (setting[0] == '\0') return;
  text = traffic_output_text(output->print, &size);
  if (!text) return;
  settings_path_expand(setting, path, sizeof(path));
  written = traffic_file_replace(path, text, size);
  if (!written && !atomic_exchange(&output->warned, true))
    settings_warn("%s=%s: the file cannot be written: %s; the traffic goes on without it", name, path,
                  strerror(errno));
  free(text);
}

static void traffic_writer_shared(const settings_t *settings) {
  traffic_output_write(&trafficShared, settings->trafficShared, "ULTRAEP_TRAFFIC_SHARED");
}

static void traffic_writer_reports(const settings_t *settings) {
  traffic_output_write(&trafficJson, settings->trafficJson, "ULTRAEP_TRAFFIC_JSON");
  traffic_output_write(&trafficPrometheus, settings->trafficPrometheus, "ULTRAEP_TRAFFIC_PROMETHEUS");
}

void traffic_writer_write(const settings_t *settings) {
  traffic_writer_shared(settings);
  traffic_writer_reports(settings);
}

/* ---- the thread ---- */
static struct {
  pthread_t thread;
  bool isRunning; /* under the record's lock */
  pthread_mutex_t lock;
  pthread_cond_t wake;
  bool stop; /* under lock */
} trafficWriter = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Waits; false once the thread shall end. */
static bool traffic_writer_wait(double until) {
  struct timespec deadline = {.tv_sec = (time_t)until};
  int result = 0;
  bool goOn;

  deadline.tv_nsec = (long)(1e9 * (until - (double)deadline.tv_sec));
  pthread_mutex_lock(&trafficWriter.lock);
  while (!trafficWriter.stop && result == 0)
    result = pthread_cond_timedwait(&trafficWriter.wake, &trafficWriter.lock, &deadline);
  goOn = !trafficWriter.stop;
  pthread_mutex_unlock(&trafficWriter.lock);
  return goOn;
}

/* When to look again: at the window's end, and for ultraep_top every second. */
static double traffic_writer_next(const settings_t *settings) {
  double next, soon = traffic_clock() + WRITER_SHARED_SECONDS;

  traffic_lock();
  next = trafficState.windowClock + settings->windowSeconds;
  traffic_unlock();
  return settings->trafficShared[0] && soon < next ? soon : next;
}

static void *traffic_writer_run(void *unused) {
  const settings_t *settings = settings_get();
  uint64_t reported = UINT64_MAX; /* so that a path that cannot be written is found at once */

  (void)unused;
  do {
    uint64_t nWindows;

    traffic_lock();
    traffic_roll();
    nWindows = trafficState.nWindows;
    traffic_unlock();
    traffic_writer_shared(settings);
    if (nWindows != reported) traffic_writer_reports(settings);
    reported = nWindows;
  } while (traffic_writer_wait(traffic_writer_next(settings)));
  return NULL;
}

static bool traffic_writer_create(void) {
  pthread_condattr_t condition;
  pthread_attr_t attributes;
  sigset_t all, before;
  int result;

  if (pthread_condattr_init(&condition) != 0) return false;
  pthread_condattr_setclock(&condition, CLOCK_MONOTONIC);
  result = pthread_cond_init(&trafficWriter.wake, &condition);
  pthread_condattr_destroy(&condition);
  if (result != 0) return false;
  if (pthread_attr_init(&attributes) != 0) return false;
  pthread_attr_setstacksize(&attributes, WRITER_STACK_BYTES);
  /* The program's signals are for the program's threads. */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  result = pthread_create(&trafficWriter.thread, &attributes, traffic_writer_run, NULL);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return result == 0;
}

static bool traffic_writer_is_wanted(const settings_t *settings) {
  return settings->trafficJson[0] || settings->trafficPrometheus[0] || settings->trafficShared[0];
}

void traffic_writer_start(void) {
  static bool tried;

  if (tried || trafficState.inherited || !traffic_writer_is_wanted(settings_get())) return;
  tried = true;
  trafficWriter.isRunning = traffic_writer_create();
  if (!trafficWriter.isRunning)
    settings_warn("no thread to write the traffic record while it grows: its files come at the end alone");
}

/* The wait is bounded: the file system may hang. */
static void traffic_writer_stop(void) {
  struct timespec deadline;

  pthread_mutex_lock(&trafficWriter.lock);
  trafficWriter.stop = true;
  pthread_cond_signal(&trafficWriter.wake);
  pthread_mutex_unlock(&trafficWriter.lock);
  clock_gettime(CLOCK_REALTIME, &deadline);
  deadline.tv_sec += WRITER_STOP_SECONDS;
  pthread_timedjoin_np(trafficWriter.thread, NULL, &deadline);
}

/* The library goes, or the process ends: the last state of every file, and no more thread. In a child of
 * fork, whose files are the parent's, nothing. */
__attribute__((destructor)) static void traffic_writer_finish(void) {
  bool isRunning, wasUsed;

  if (trafficState.inherited) return;
  traffic_lock();
  trafficState.finished = true;
  isRunning = trafficWriter.isRunning;
  wasUsed = trafficState.nOpened > 0;
  traffic_unlock();
  if (isRunning) traffic_writer_stop();
  if (!wasUsed) return;
  if (traffic_writer_is_wanted(settings_get())) traffic_writer_write(settings_get());
  traffic_lock();
  traffic_ended_drop();
  traffic_unlock();
}
