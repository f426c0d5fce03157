/* What the files of the traffic record share. Except for the cells and the state, everything is under the
 * lock. */
#ifndef ULTRAEP_TRAFFIC_INTERNAL_H_
#define ULTRAEP_TRAFFIC_INTERNAL_H_

#include "settings.h"
#include "traffic.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>

enum {
  TRAFFIC_DIRECTIONS = 2,
  TRAFFIC_TAKEN = 0, /* source: calls taken over */
  TRAFFIC_TOLD = 1,  /* the profiler's events */
  TRAFFIC_SOURCES = 2,
  TRAFFIC_RANKS_MAX = 1 << 20,
  TRAFFIC_WINDOWS = ULTRAEP_TRAFFIC_WINDOWS,
  TRAFFIC_PAIRS = ULTRAEP_TRAFFIC_PAIRS,
  TRAFFIC_ENDED_KEPT = 32 /* ended records that stay for the outputs, those with the most bytes */
};
#define TRAFFIC_CLOSED (1ULL << 63) /* of the state */

typedef struct {
  _Atomic uint64_t bytes, calls;
} trafficCell_t;

typedef struct trafficGroup trafficGroup_t;

/* Headers are never given back to the system: a thread that found one just before it was closed still reads
 * its state. The rows are, once the state says that nobody is in them. */
struct trafficComm {
  _Atomic uint64_t state; /* TRAFFIC_CLOSED, and the number of traffic_count in progress */
  trafficCell_t *cells;   /* [source][direction][nRanks], since the record was opened */
  /* Of calls taken over, those with every peer: they are in no cell, and count in each of their direction. So
   * they cost the same for any number of ranks. */
  trafficCell_t all[TRAFFIC_DIRECTIONS];
  int32_t rank, nRanks;
  const void *key;
  trafficGroup_t *group;
  uint64_t *base;        /* [direction][nRanks] bytes at the start of this window */
  uint64_t *windows;     /* [TRAFFIC_WINDOWS][direction][nRanks] bytes, a ring like trafficState.windows */
  double opened;         /* seconds since 1970 */
  uint64_t openedWindow; /* trafficState.nWindows then */
  bool ended;
  trafficComm_t *next; /* in the group, or among the free */
};

/* The ranks of one communicator that this process has, or has had. */
struct trafficGroup {
  uint64_t hash; /* 0: not known, then it has one record */
  uint64_t id;   /* counted up; never 0 */
  int32_t nRanks;
  int32_t nRecords;
  trafficComm_t *records;
  int32_t *recordsOf; /* [nRanks] records of that rank */
  uint64_t *columns;  /* [nRanks] scratch of the summary */
  trafficGroup_t *next, *previous;
};

typedef struct {
  double start;   /* seconds since 1970 */
  double seconds; /* its true length */
} trafficWindow_t;

typedef struct {
  uint64_t bytes[TRAFFIC_DIRECTIONS], calls[TRAFFIC_DIRECTIONS];
} trafficTotals_t;

typedef struct {
  trafficGroup_t *groups;
  uint64_t nOpened;
  int32_t nOpen, nEnded;
  trafficTotals_t dropped; /* of ended records that are no longer kept */
  trafficWindow_t windows[TRAFFIC_WINDOWS];
  uint64_t nWindows;  /* finished so far; the last is windows[(nWindows - 1) % TRAFFIC_WINDOWS] */
  double windowClock; /* monotonic seconds at the start of this window */
  double windowStart; /* the same in seconds since 1970 */
  bool finished;      /* the library is being unloaded, or the process ends */
  bool inherited;     /* a child of fork: the files are the parent's */
} trafficState_t;

extern trafficState_t trafficState;

void traffic_lock(void);
void traffic_unlock(void);

typedef struct {
  uint64_t bytes, calls;
} trafficCount_t;

/* Cell `at` of [direction][nRanks], by one source. */
trafficCount_t traffic_source_read(const trafficComm_t *comm, int source, size_t at);
/* By the source that saw more. Both only grow, and so does the larger of them. */
trafficCount_t traffic_cell_read(const trafficComm_t *comm, size_t at);

/* Under the lock: */
/* Ends the window if its time has come. */
void traffic_roll(void);
void traffic_totals_add(const trafficComm_t *comm, trafficTotals_t *totals);
/* All records of the process, ended ones included. */
void traffic_totals(trafficTotals_t *totals);
/* Frees the records that have ended. */
void traffic_ended_drop(void);

/* What a group's records say together. A pair counts once, where its sender is known by its sender's count.
 */
typedef struct {
  uint64_t bytes[TRAFFIC_DIRECTIONS]; /* sent and received by the known ranks */
  double imbalance;    /* max / mean over all ranks of what the known ranks sent them; 0: they sent nothing */
  int32_t hottestRank; /* the max's, -1 if none */
  int32_t nPairs;
  ultraepTrafficPair_t pairs[TRAFFIC_PAIRS]; /* most bytes first */
} trafficSummary_t;
/* window: 0 for all time, 1 for the last finished window, 2 for the one before ... */
void traffic_group_summary(const trafficGroup_t *group, int window, trafficSummary_t *summary);
int32_t traffic_group_windows(const trafficGroup_t *group);
int32_t traffic_group_known(const trafficGroup_t *group);

/* The record's line in NCCL's log. */
void traffic_comm_text(const trafficComm_t *comm, char *text, size_t size);

/* The outputs as text, under the lock. */
void traffic_json_print(FILE *out);
void traffic_prometheus_print(FILE *out);
void traffic_shared_print(FILE *out);
/* A number with four places, whatever the locale's decimal point. */
void traffic_print_fixed(FILE *out, double number);

double traffic_clock(void); /* monotonic seconds */
double traffic_time(void);  /* seconds since 1970 */

/* Starts the thread that writes the files, where a file is asked for and it does not run. Under the lock. */
void traffic_writer_start(void);
/* Writes the files as they are asked for; not under the lock. */
void traffic_writer_write(const settings_t *settings);

#endif
