/* Records of communicators: the table that finds them, counting, opening and closing, windows. */
#include "traffic_internal.h"

#include <pthread.h>
#include <stdalign.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

trafficState_t trafficState;

static pthread_mutex_t trafficMutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t trafficOnce = PTHREAD_ONCE_INIT;

/* ---- clocks, lock ---- */
static double traffic_clock_read(clockid_t clock) {
  struct timespec now;

  clock_gettime(clock, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

double traffic_clock(void) {
  return traffic_clock_read(CLOCK_MONOTONIC);
}

double traffic_time(void) {
  return traffic_clock_read(CLOCK_REALTIME);
}

void traffic_lock(void) {
  pthread_mutex_lock(&trafficMutex);
}

void traffic_unlock(void) {
  pthread_mutex_unlock(&trafficMutex);
}

/* A child has the parent's records but not its thread, and must not write over the parent's files. */
static void traffic_fork_child(void) {
  trafficState.inherited = true;
  traffic_unlock();
}

static void traffic_once(void) {
  pthread_atfork(traffic_lock, traffic_unlock, traffic_fork_child);
  trafficState.windowClock = traffic_clock();
  trafficState.windowStart = traffic_time();
}

/* ---- the table: buckets of eight places ----
 * A key lies anywhere in its bucket, so finding looks at eight places, one cache line, and taking a key out
 * is one store: no chain of others runs through it. A full bucket doubles the table; readers may still be in
 * the smaller one, which therefore stays, and all that have stayed are together smaller than the one in use.
 */
enum { TABLE_PLACES = 8, TABLE_BITS_FIRST = 6, TABLE_BITS_MAX = 20 };

typedef struct {
  alignas(64) _Atomic(const void *) keys[TABLE_PLACES];
  _Atomic(trafficComm_t *) records[TABLE_PLACES];
} trafficBucket_t;

typedef struct trafficTable {
  int bits; /* 2^bits buckets */
  trafficBucket_t *buckets;
  struct trafficTable *smaller; /* keeps it reachable */
} trafficTable_t;

static trafficBucket_t trafficBucketsFirst[1 << TABLE_BITS_FIRST];
static trafficTable_t trafficTableFirst = {.bits = TABLE_BITS_FIRST, .buckets = trafficBucketsFirst};
static _Atomic(trafficTable_t *) trafficTable = &trafficTableFirst;

static trafficBucket_t *traffic_table_bucket(const trafficTable_t *table, const void *key) {
  return &table->buckets[((uint64_t)(uintptr_t)key * 0x9e3779b97f4a7c15u) >> (64 - table->bits)];
}

static bool traffic_table_put(const trafficTable_t *table, const void *key, trafficComm_t *record) {
  trafficBucket_t *bucket = traffic_table_bucket(table, key);

  for (int i = 0; i < TABLE_PLACES; i++) {
    if (atomic_load_explicit(&bucket->keys[i], memory_order_relaxed)) continue;
    atomic_store_explicit(&bucket->records[i], record, memory_order_release);
    atomic_store_explicit(&bucket->keys[i], key, memory_order_release);
    return true;
  }
  return false;
}

static void traffic_table_remove(const void *key) {
  trafficBucket_t *bucket = traffic_table_bucket(atomic_load(&trafficTable), key);

  for (int i = 0; i < TABLE_PLACES; i++) {
    if (atomic_load_explicit(&bucket->keys[i], memory_order_relaxed) == key)
      atomic_store_explicit(&bucket->keys[i], NULL, memory_order_release);
  }
}

static bool traffic_table_copy(const trafficTable_t *from, const trafficTable_t *to) {
  for (size_t i = 0; i < (size_t)TABLE_PLACES << from->bits; i++) {
    trafficBucket_t *bucket = &from->buckets[i / TABLE_PLACES];
    const void *key = atomic_load(&bucket->keys[i % TABLE_PLACES]);

    if (key && !traffic_table_put(to, key, atomic_load(&bucket->records[i % TABLE_PLACES]))) return false;
  }
  return true;
}

static trafficTable_t *traffic_table_make(int bits) {
  trafficTable_t *table = calloc(1, sizeof(*table));
  size_t bytes = sizeof(trafficBucket_t) << bits;

  if (!table) return NULL;
  table->bits = bits;
  table->buckets = aligned_alloc(alignof(trafficBucket_t), bytes);
  if (!table->buckets) {
    free(table);
    return NULL;
  }
  memset(table->buckets, 0, bytes);
  return table;
}

static bool traffic_table_insert(const void *key, trafficComm_t *record) {
  trafficTable_t *table = atomic_load(&trafficTable);

  if (traffic_table_put(table, key, record)) return true;
  for (int bits = table->bits + 1; bits <= TABLE_BITS_MAX; bits++) {
    trafficTable_t *larger = traffic_table_make(bits);

    if (!larger) return false;
    larger->smaller = table;
    if (traffic_table_copy(table, larger) && traffic_table_put(larger, key, record)) {
      atomic_store(&trafficTable, larger);
      return true;
    }
    free(larger->buckets);
    free(larger);
  }
  return false;
}

trafficComm_t *traffic_comm_find(const void *comm) {
  trafficBucket_t *bucket =
      traffic_table_bucket(atomic_load_explicit(&trafficTable, memory_order_acquire), comm);

  if (!comm) return NULL;
  for (int i = 0; i < TABLE_PLACES; i++) {
    if (atomic_load_explicit(&bucket->keys[i], memory_order_acquire) != comm) continue;
    trafficComm_t *record = atomic_load_explicit(&bucket->records[i], memory_order_acquire);
    /* Were the place another's by now, its key would have gone before the record came. */
    if (atomic_load_explicit(&bucket->keys[i], memory_order_relaxed) == comm) return record;
  }
  return NULL;
}

/* ---- counting ---- */
/* Whoever closes looks at the number of those inside, and frees rows only at 0. */
static bool traffic_comm_enter(trafficComm_t *comm) {
  return !(atomic_fetch_add_explicit(&comm->state, 1, memory_order_acquire) & TRAFFIC_CLOSED);
}

static void traffic_comm_leave(trafficComm_t *comm) {
  atomic_fetch_sub_explicit(&comm->state, 1, memory_order_release);
}

static void traffic_cell_add(trafficCell_t *cell, uint64_t bytes) {
  atomic_fetch_add_explicit(&cell->bytes, bytes, memory_order_relaxed);
  atomic_fetch_add_explicit(&cell->calls, 1, memory_order_relaxed);
}

/* row: of [source][direction]. */
static void traffic_count_in(trafficComm_t *comm, size_t row, int peer, uint64_t bytes) {
  if (!comm) return;
  if (traffic_comm_enter(comm) && (unsigned)peer < (unsigned)comm->nRanks)
    traffic_cell_add(&comm->cells[row * (size_t)comm->nRanks + (size_t)peer], bytes);
  traffic_comm_leave(comm);
}

void traffic_count(trafficComm_t *comm, trafficDirection_t direction, int peer, uint64_t bytes) {
  traffic_count_in(comm, direction == TRAFFIC_RECV, peer, bytes);
}

void traffic_count_event(trafficComm_t *comm, trafficDirection_t direction, int peer, uint64_t bytes) {
  traffic_count_in(comm, TRAFFIC_DIRECTIONS + (direction == TRAFFIC_RECV), peer, bytes);
}

void traffic_count_all(trafficComm_t *comm, trafficDirection_t direction, uint64_t bytes) {
  if (!comm) return;
  if (traffic_comm_enter(comm)) traffic_cell_add(&comm->all[direction], bytes);
  traffic_comm_leave(comm);
}

void traffic_count_all_to_all(trafficComm_t *comm, uint64_t bytes) {
  if (!comm) return;
  if (traffic_comm_enter(comm)) {
    traffic_cell_add(&comm->all[TRAFFIC_SEND], bytes);
    traffic_cell_add(&comm->all[TRAFFIC_RECV], bytes);
  }
  traffic_comm_leave(comm);
}

int traffic_comm_rank(const trafficComm_t *comm) {
  return comm ? comm->rank : -1;
}

trafficCount_t traffic_source_read(const trafficComm_t *comm, int source, size_t at) {
  const size_t row = (size_t)comm->nRanks;
  const trafficCell_t *cell = &comm->cells[(size_t)source * TRAFFIC_DIRECTIONS * row + at];
  const trafficCell_t *all = &comm->all[at / row];
  trafficCount_t count = {.bytes = atomic_load_explicit(&cell->bytes, memory_order_relaxed),
                          .calls = atomic_load_explicit(&cell->calls, memory_order_relaxed)};

  if (source != TRAFFIC_TAKEN) return count;
  count.bytes += atomic_load_explicit(&all->bytes, memory_order_relaxed);
  count.calls += atomic_load_explicit(&all->calls, memory_order_relaxed);
  return count;
}

trafficCount_t traffic_cell_read(const trafficComm_t *comm, size_t at) {
  const trafficCount_t taken = traffic_source_read(comm, TRAFFIC_TAKEN, at);
  const trafficCount_t told = traffic_source_read(comm, TRAFFIC_TOLD, at);

  return (trafficCount_t){.bytes = taken.bytes > told.bytes ? taken.bytes : told.bytes,
                          .calls = taken.calls > told.calls ? taken.calls : told.calls};
}

/* ---- totals and windows ---- */
void traffic_totals_add(const trafficComm_t *comm, trafficTotals_t *totals) {
  for (size_t i = 0; i < TRAFFIC_DIRECTIONS * (size_t)comm->nRanks; i++) {
    size_t direction = i / (size_t)comm->nRanks;
    trafficCount_t count = traffic_cell_read(comm, i);

    totals->bytes[direction] += count.bytes;
    totals->calls[direction] += count.calls;
  }
}

void traffic_totals(trafficTotals_t *totals) {
  *totals = trafficState.dropped;
  for (const trafficGroup_t *group = trafficState.groups; group; group = group->next) {
    for (const trafficComm_t *comm = group->records; comm; comm = comm->next)
      traffic_totals_add(comm, totals);
  }
}

static void traffic_comm_roll(trafficComm_t *comm, size_t slot) {
  size_t nCells = TRAFFIC_DIRECTIONS * (size_t)comm->nRanks;
  uint64_t *window = comm->windows + slot * nCells;

  for (size_t i = 0; i < nCells; i++) {
    uint64_t bytes = traffic_cell_read(comm, i).bytes;

    window[i] = bytes - comm->base[i];
    comm->base[i] = bytes;
  }
}

void traffic_roll(void) {
  size_t slot = trafficState.nWindows % TRAFFIC_WINDOWS;
  double now = traffic_clock(), seconds = now - trafficState.windowClock;

  if (seconds < settings_get()->windowSeconds) return;
  for (trafficGroup_t *group = trafficState.groups; group; group = group->next) {
    for (trafficComm_t *comm = group->records; comm; comm = comm->next) traffic_comm_roll(comm, slot);
  }
  trafficState.windows[slot] = (trafficWindow_t){.start = trafficState.windowStart, .seconds = seconds};
  trafficState.nWindows++;
  trafficState.windowClock = now;
  trafficState.windowStart = traffic_time();
}

/* ---- groups ---- */
static trafficGroup_t *traffic_group_find(uint64_t hash, int nRanks) {
  trafficGroup_t *group = hash == 0 ? NULL : trafficState.groups;

  while (group && (group->hash != hash || group->nRanks != nRanks)) group = group->next;
  return group;
}

static trafficGroup_t *traffic_group_make(uint64_t hash, int nRanks) {
  static uint64_t id;
  trafficGroup_t *group = calloc(1, sizeof(*group));

  if (!group) return NULL;
  group->recordsOf = calloc((size_t)nRanks, sizeof(group->recordsOf[0]));
  group->columns = calloc((size_t)nRanks, sizeof(group->columns[0]));
  if (!group->recordsOf || !group->columns) goto free_group;
  group->hash = hash;
  group->id = ++id;
  group->nRanks = nRanks;
  group->next = trafficState.groups;
  if (group->next) group->next->previous = group;
  trafficState.groups = group;
  return group;

free_group:
  free(group->recordsOf);
  free(group->columns);
  free(group);
  return NULL;
}

static void traffic_group_free(trafficGroup_t *group) {
  if (group->previous) group->previous->next = group->next;
  if (!group->previous) trafficState.groups = group->next;
  if (group->next) group->next->previous = group->previous;
  free(group->recordsOf);
  free(group->columns);
  free(group);
}

static void traffic_group_add(trafficGroup_t *group, trafficComm_t *comm) {
  comm->group = group;
  comm->next = group->records;
  group->records = comm;
  group->nRecords++;
  group->recordsOf[comm->rank]++;
}

static void traffic_group_remove(trafficGroup_t *group, trafficComm_t *comm) {
  trafficComm_t **at = &group->records;

  while (*at != comm) at = &(*at)->next;
  *at = comm->next;
  group->nRecords--;
  group->recordsOf[comm->rank]--;
  if (group->nRecords == 0) traffic_group_free(group);
}

/* ---- headers: taken from the front of the queue of free ones, put back at its end ----
 * A header waits until HEADERS_WAITING others are free, too, before it serves again: a thread that holds one
 * from before its close must not count into the next communicator. */
enum { HEADERS_FIRST = 128, HEADERS_WAITING = 64 };

static struct {
  trafficComm_t first[HEADERS_FIRST];
  int nUsed; /* of first */
  trafficComm_t *front, *back;
  int nFree;
} trafficHeaders;

static trafficComm_t *traffic_header_take(void) {
  trafficComm_t *comm = trafficHeaders.front;

  if (trafficHeaders.nFree > HEADERS_WAITING) {
    trafficHeaders.front = comm->next;
    trafficHeaders.nFree--;
    return comm;
  }
  if (trafficHeaders.nUsed < HEADERS_FIRST) {
    comm = &trafficHeaders.first[trafficHeaders.nUsed++];
  } else {
    comm = calloc(1, sizeof(*comm));
  }
  if (comm) atomic_store(&comm->state, TRAFFIC_CLOSED);
  return comm;
}

static void traffic_header_put(trafficComm_t *comm) {
  comm->next = NULL;
  if (trafficHeaders.nFree == 0) trafficHeaders.front = comm;
  if (trafficHeaders.nFree > 0) trafficHeaders.back->next = comm;
  trafficHeaders.back = comm;
  trafficHeaders.nFree++;
}

/* ---- ending ---- */
/* Rows may be freed: the record has ended, and nobody counts in it any more. */
static bool traffic_comm_is_left(const trafficComm_t *comm) {
  return comm->ended && atomic_load_explicit(&comm->state, memory_order_acquire) == TRAFFIC_CLOSED;
}

static void traffic_comm_drop(trafficComm_t *comm) {
  traffic_totals_add(comm, &trafficState.dropped);
  traffic_group_remove(comm->group, comm);
  free(comm->cells);
  comm->cells = NULL;
  trafficState.nEnded--;
  traffic_header_put(comm);
}

static uint64_t traffic_comm_bytes(const trafficComm_t *comm) {
  trafficTotals_t totals = {0};

  traffic_totals_add(comm, &totals);
  return totals.bytes[TRAFFIC_SEND] + totals.bytes[TRAFFIC_RECV];
}

/* The ended record with the fewest bytes, of those that may go; null if none may. */
static trafficComm_t *traffic_comm_least(void) {
  trafficComm_t *least = NULL;
  uint64_t leastBytes = 0;

  for (trafficGroup_t *group = trafficState.groups; group; group = group->next) {
    for (trafficComm_t *comm = group->records; comm; comm = comm->next) {
      uint64_t bytes;

      if (!traffic_comm_is_left(comm)) continue;
      bytes = traffic_comm_bytes(comm);
      if (least && bytes >= leastBytes) continue;
      least = comm;
      leastBytes = bytes;
    }
  }
  return least;
}

void traffic_ended_drop(void) {
  for (trafficComm_t *least = traffic_comm_least(); least; least = traffic_comm_least())
    traffic_comm_drop(least);
}

static void traffic_comm_end(trafficComm_t *comm) {
  traffic_table_remove(comm->key);
  atomic_fetch_or_explicit(&comm->state, TRAFFIC_CLOSED, memory_order_acq_rel);
  comm->ended = true;
  trafficState.nOpen--;
  trafficState.nEnded++;
  while (trafficState.nEnded > TRAFFIC_ENDED_KEPT) {
    trafficComm_t *least = traffic_comm_least();

    if (!least) break;
    traffic_comm_drop(least);
  }
}

/* ---- the line in NCCL's log ---- */
static _Atomic(nccl_abi_logger_t) trafficLogger;

void traffic_logger_set(nccl_abi_logger_t logger) {
  atomic_store(&trafficLogger, logger);
}

/* Ends the record and writes its line to `text`; false, and no line, where it has ended already. */
static bool traffic_comm_close_locked(trafficComm_t *comm, char *text, size_t size) {
  if (atomic_load(&comm->state) & TRAFFIC_CLOSED) return false;
  traffic_roll();
  traffic_comm_text(comm, text, size);
  traffic_comm_end(comm);
  return true;
}

void traffic_comm_close(trafficComm_t *comm) {
  nccl_abi_logger_t logger = atomic_load(&trafficLogger);
  char text[512];
  bool closed;

  if (!comm) return;
  traffic_lock();
  closed = traffic_comm_close_locked(comm, text, sizeof(text));
  traffic_unlock();
  if (closed && logger)
    logger(NCCL_ABI_LOG_INFO, NCCL_ABI_SUBSYS_INIT | NCCL_ABI_SUBSYS_TUNING, __func__, __LINE__, "%s", text);
}

/* ---- opening ---- */
/* Cells, base and windows in one piece: 176 bytes a rank of the communicator. */
static bool traffic_comm_rows(trafficComm_t *comm, int nRanks) {
  size_t nCells = TRAFFIC_DIRECTIONS * (size_t)nRanks;
  size_t cellBytes = TRAFFIC_SOURCES * sizeof(trafficCell_t) + (1 + TRAFFIC_WINDOWS) * sizeof(uint64_t);
  trafficCell_t *cells = calloc(nCells, cellBytes);

  if (!cells) return false;
  comm->cells = cells;
  memset(comm->all, 0, sizeof(comm->all));
  comm->base = (uint64_t *)(void *)(cells + TRAFFIC_SOURCES * nCells);
  comm->windows = comm->base + nCells;
  return true;
}

static trafficComm_t *traffic_comm_make(const void *key, uint64_t hash, int rank, int nRanks) {
  trafficGroup_t *group = traffic_group_find(hash, nRanks);
  trafficComm_t *comm = traffic_header_take();

  if (!comm) return NULL;
  if (!traffic_comm_rows(comm, nRanks)) goto put_header;
  if (!group) group = traffic_group_make(hash, nRanks);
  if (!group) goto free_rows;
  comm->key = key;
  comm->rank = rank;
  comm->nRanks = nRanks;
  comm->opened = traffic_time();
  comm->openedWindow = trafficState.nWindows;
  comm->ended = false;
  traffic_group_add(group, comm);
  /* Not a store: a late traffic_count may be about to take back its 1. */
  atomic_fetch_and_explicit(&comm->state, ~TRAFFIC_CLOSED, memory_order_release);
  trafficState.nOpened++;
  trafficState.nOpen++;
  if (traffic_table_insert(key, comm)) return comm;
  traffic_comm_end(comm);
  return NULL;

free_rows:
  free(comm->cells);
  comm->cells = NULL;
put_header:
  traffic_header_put(comm);
  return NULL;
}

/* Rows of the longer record start with those of the shorter one, whose operations with every peer were with
 * these. */
static void traffic_comm_copy(const trafficComm_t *from, trafficComm_t *to) {
  const size_t fromRow = (size_t)from->nRanks, toRow = (size_t)to->nRanks;

  for (int source = 0; source < TRAFFIC_SOURCES; source++) {
    for (size_t at = 0; at < TRAFFIC_DIRECTIONS * fromRow; at++) {
      size_t row = (size_t)source * TRAFFIC_DIRECTIONS + at / fromRow;
      trafficCell_t *cell = &to->cells[row * toRow + at % fromRow];
      trafficCount_t count = traffic_source_read(from, source, at);

      atomic_store(&cell->bytes, count.bytes);
      atomic_store(&cell->calls, count.calls);
    }
  }
  for (size_t row = 0; row < TRAFFIC_DIRECTIONS; row++)
    memcpy(to->base + row * (size_t)to->nRanks, from->base + row * (size_t)from->nRanks,
           (size_t)from->nRanks * sizeof(to->base[0]));
  for (size_t row = 0; row < (size_t)TRAFFIC_WINDOWS * TRAFFIC_DIRECTIONS; row++)
    memcpy(to->windows + row * (size_t)to->nRanks, from->windows + row * (size_t)from->nRanks,
           (size_t)from->nRanks * sizeof(to->windows[0]));
  to->opened = from->opened;
  to->openedWindow = from->openedWindow;
}

/* Takes a record out that another one stands for now. */
static void traffic_comm_discard(trafficComm_t *comm) {
  atomic_fetch_or_explicit(&comm->state, TRAFFIC_CLOSED, memory_order_acq_rel);
  traffic_group_remove(comm->group, comm);
  free(comm->cells);
  comm->cells = NULL;
  trafficState.nOpen--;
  trafficState.nOpened--;
  traffic_header_put(comm);
}

trafficComm_t *traffic_comm_grow(trafficComm_t *comm, int nRanks) {
  trafficComm_t *grown = NULL;

  if (!comm || nRanks <= comm->nRanks || nRanks > TRAFFIC_RANKS_MAX) return comm;
  traffic_lock();
  if (!(atomic_load(&comm->state) & TRAFFIC_CLOSED)) {
    traffic_table_remove(comm->key);
    grown = traffic_comm_make(comm->key, comm->group->hash, comm->rank, nRanks);
    if (grown) {
      traffic_comm_copy(comm, grown);
      traffic_comm_discard(comm);
    } else {
      traffic_table_insert(comm->key, comm); /* its place is still free */
    }
  }
  traffic_unlock();
  return grown ? grown : comm;
}

trafficComm_t *traffic_comm_open(const void *comm, uint64_t hash, int rank, int nRanks) {
  trafficComm_t *record;

  if (!comm || nRanks < 1 || nRanks > TRAFFIC_RANKS_MAX || rank < 0 || rank >= nRanks) return NULL;
  pthread_once(&trafficOnce, traffic_once);
  settings_get();
  traffic_lock();
  record = traffic_comm_find(comm);
  if (trafficState.finished) {
    record = NULL;
  } else if (!record || record->rank != rank || record->nRanks != nRanks ||
             (hash != 0 && record->group->hash != 0 && hash != record->group->hash)) {
    traffic_roll();
    if (record) traffic_comm_end(record);
    record = traffic_comm_make(comm, hash, rank, nRanks);
    traffic_writer_start();
  }
  traffic_unlock();
  return record;
}
