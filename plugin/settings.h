/* The library's environment variables: one table with type, range, default and help. A value that does not
 * fit is one line on stderr, and the default holds. Read once a process; later changes of the environment are
 * not seen. */
#ifndef ULTRAEP_SETTINGS_H_
#define ULTRAEP_SETTINGS_H_

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum { SETTINGS_PATH_BYTES = 1024 }; /* the closing 0 included */

enum {
  SETTINGS_P2P_OFF,     /* no call is taken over */
  SETTINGS_P2P_OBSERVE, /* calls are counted and passed on */
  SETTINGS_P2P_SCHEDULE /* and those of communicators in one domain go by our own kernel (schedule.h) */
};

enum { SETTINGS_SHARE_SAFE, SETTINGS_SHARE_ALL, SETTINGS_SHARE_OFF };

typedef struct {
  int32_t p2p;     /* SETTINGS_P2P_... */
  bool p2pIsAsked; /* the variable is set */
  bool p2pOverlap;
  int32_t p2pCtas; /* thread blocks of a scheduled group; 0: NCCL_MAX_CTAS, or 16 */
  int32_t p2pStageKb, p2pStages, p2pEagerKb;
  int32_t p2pTimeoutMs;  /* 0: none */
  int32_t p2pShare;      /* SETTINGS_SHARE_...: which receive buffers peers map */
  int32_t peers;         /* ultraepPeers_t */
  int32_t windowSeconds; /* of the traffic record */
  bool help;
  /* "": not written. %h, %p and %% stand for host, process id and %: settings_path_expand. */
  char trafficJson[SETTINGS_PATH_BYTES];
  char trafficPrometheus[SETTINGS_PATH_BYTES];
  char trafficShared[SETTINGS_PATH_BYTES];
  char profilerForward[SETTINGS_PATH_BYTES]; /* "": none */
} settings_t;

/* The process's settings. The first call reads them, warns, and prints the table if ULTRAEP_HELP asks for it.
 */
const settings_t *settings_get(void);

/* Reads every variable through `lookup` (null: not set) and writes the warnings to `messages`, a line each.
 */
void settings_load(settings_t *settings, const char *(*lookup)(const char *name), FILE *messages);
/* The table, with the values that hold. */
void settings_print(const settings_t *settings, FILE *out);

/* Writes the path with its %-words replaced to text[size], or "" where it does not fit. */
void settings_path_expand(const char *path, char *text, size_t size);

/* Whether NCCL's own log says much (NCCL_DEBUG=INFO or TRACE): then ours says that a communicator is
 * scheduled, and what came of it. */
bool settings_is_verbose(void);
/* Whether to say that one is not: also where scheduling was asked for. */
bool settings_tells_unscheduled(void);

/* One line on stderr. For what an operator must see: NCCL's log shows nothing unless asked to. */
void settings_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
