#include "top.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* A process with 64 communicators of 4096 ranks needs 16 MiB. */
#define TOP_FILE_BYTES_MAX (1ll << 30)

static int top_file_read(topFile_t *file, const char *path, FILE *in, perfError_t *error) {
  struct stat status;

  if (fstat(fileno(in), &status) != 0 || !S_ISREG(status.st_mode))
    return perfErrorSet(error, "%s: not a regular file", path);
  if (status.st_size < (long)sizeof(trafficFileHeader_t) || status.st_size > TOP_FILE_BYTES_MAX)
    return perfErrorSet(error, "%s: %lld bytes are no traffic record", path, (long long)status.st_size);
  file->nBytes = (uint64_t)status.st_size;
  file->bytes = malloc(file->nBytes);
  if (file->bytes == NULL)
    return perfErrorSet(error, "%s: no memory for %lld bytes", path, (long long)status.st_size);
  if (fread(file->bytes, 1, file->nBytes, in) != file->nBytes)
    return perfErrorSet(error, "%s: the file is cut short", path);
  return 0;
}

/* 1: read; 0: there is no such file yet. */
static int top_file_open(topFile_t *file, const char *path, perfError_t *error) {
  FILE *in = fopen(path, "rb");
  int status;

  if (in == NULL && errno == ENOENT) return 0;
  if (in == NULL) return perfErrorSet(error, "%s: %s", path, strerror(errno));
  status = top_file_read(file, path, in, error);
  fclose(in);
  if (status == 0) return 1;
  free(file->bytes);
  *file = (topFile_t){0};
  return -1;
}

static int top_rank_add(topRead_t *read, const topRank_t *rank, perfError_t *error) {
  /* Doubled at each power of two. */
  if ((read->nRanks & (read->nRanks - 1)) == 0) {
    size_t room = read->nRanks == 0 ? 1 : 2 * read->nRanks;
    topRank_t *ranks = realloc(read->ranks, room * sizeof(ranks[0]));

    if (ranks == NULL) return perfErrorSet(error, "no memory for %zu ranks", room);
    read->ranks = ranks;
  }
  read->ranks[read->nRanks++] = *rank;
  return 0;
}

/* The record at *at; moves *at behind it. */
static int top_record_parse(topRead_t *read, const topFile_t *file, uint64_t *at, const char *path,
                            perfError_t *error) {
  const unsigned char *bytes = file->bytes;
  topRank_t rank = {.process = file->bytes};
  uint64_t row;

  if (file->nBytes - *at < sizeof(trafficFileRecord_t))
    return perfErrorSet(error, "%s: a record is cut short", path);
  rank.record = (const void *)(bytes + *at);
  if (rank.record->nRanks < 1 || rank.record->nRanks > TRAFFIC_FILE_RANKS_MAX || rank.record->rank < 0 ||
      rank.record->rank >= rank.record->nRanks)
    return perfErrorSet(error, "%s: rank %d of %d cannot be", path, rank.record->rank, rank.record->nRanks);
  *at += sizeof(trafficFileRecord_t);
  row = (uint64_t)rank.record->nRanks * sizeof(trafficFileCell_t);
  if (file->nBytes - *at < 2 * row) return perfErrorSet(error, "%s: a row is cut short", path);
  rank.sent = (const void *)(bytes + *at);
  rank.received = (const void *)(bytes + *at + row);
  *at += 2 * row;
  return top_rank_add(read, &rank, error);
}

static int top_file_parse(topRead_t *read, const topFile_t *file, const char *path, perfError_t *error) {
  const trafficFileHeader_t *header = file->bytes;
  uint64_t at = sizeof(*header);

  if (header->magic != TRAFFIC_FILE_MAGIC) return perfErrorSet(error, "%s: not a traffic record", path);
  if (header->version != TRAFFIC_FILE_VERSION)
    return perfErrorSet(error, "%s: version %u, this tool reads %d", path, header->version,
                        TRAFFIC_FILE_VERSION);
  if (header->fileBytes != file->nBytes || header->host[sizeof(header->host) - 1] != '\0')
    return perfErrorSet(error, "%s: the header does not fit the file", path);
  for (uint32_t i = 0; i < header->nRecords; i++) {
    if (top_record_parse(read, file, &at, path, error) != 0) return -1;
  }
  if (at != file->nBytes) return perfErrorSet(error, "%s: bytes behind the last record", path);
  if (header->time > read->time) read->time = header->time;
  return 0;
}

static int top_compare_processes(const trafficFileHeader_t *a, const trafficFileHeader_t *b) {
  int hosts = strcmp(a->host, b->host);

  return hosts != 0 ? hosts : (a->pid > b->pid) - (a->pid < b->pid);
}

static int top_compare_communicators(const topRank_t *a, const topRank_t *b) {
  const trafficFileRecord_t *x = a->record, *y = b->record;

  if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
  if (x->nRanks != y->nRanks) return x->nRanks < y->nRanks ? -1 : 1;
  if (x->hash != 0) return 0;
  int processes = top_compare_processes(a->process, b->process);
  return processes != 0 ? processes : (x->id > y->id) - (x->id < y->id);
}

static int top_compare_ranks(const void *a, const void *b) {
  const topRank_t *x = a, *y = b;
  int communicators = top_compare_communicators(x, y);

  return communicators != 0 ? communicators
                            : (x->record->rank > y->record->rank) - (x->record->rank < y->record->rank);
}

bool topRanksMatch(const topRank_t *a, const topRank_t *b) {
  return top_compare_communicators(a, b) == 0;
}

static int top_read_files(topRead_t *read, char *const *paths, int32_t nPaths, perfError_t *error) {
  for (int32_t i = 0; i < nPaths; i++) {
    topFile_t *file = &read->files[read->nFiles];
    int found = top_file_open(file, paths[i], error);

    if (found < 0) return -1;
    read->nMissing += found == 0;
    read->nFiles += found;
    if (found == 1 && top_file_parse(read, file, paths[i], error) != 0) return -1;
  }
  return 0;
}

int topReadOpen(topRead_t *read, char *const *paths, int32_t nPaths, perfError_t *error) {
  *read = (topRead_t){.files = calloc((size_t)nPaths, sizeof(topFile_t))};
  if (read->files == NULL) return perfErrorSet(error, "no memory for %d files", nPaths);
  if (top_read_files(read, paths, nPaths, error) != 0) {
    topReadClose(read);
    return -1;
  }
  if (read->nRanks > 0) qsort(read->ranks, read->nRanks, sizeof(read->ranks[0]), top_compare_ranks);
  return 0;
}

void topReadClose(topRead_t *read) {
  for (int32_t i = 0; i < read->nFiles; i++) free(read->files[i].bytes);
  free(read->files);
  free(read->ranks);
  *read = (topRead_t){0};
}
