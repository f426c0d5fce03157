/* What ultraep_top reads and shows. */
#ifndef ULTRAEP_PERF_TOP_H_
#define ULTRAEP_PERF_TOP_H_

#include "options.h"
#include "traffic_file.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
  const trafficFileRecord_t *record;
  const trafficFileCell_t *sent, *received; /* [nRanks] by peer */
  const trafficFileHeader_t *process;
} topRank_t;

/* One file as it was at one moment. */
typedef struct {
  void *bytes; /* the pointers of the ranks lead in here */
  uint64_t nBytes;
} topFile_t;

/* Everything that was read at one time. */
typedef struct {
  topFile_t *files;
  int32_t nFiles, nMissing; /* of the paths given, those that were read, and those that are not there yet */
  topRank_t *ranks;         /* sorted by communicator, then by rank */
  size_t nRanks;
  double time; /* the newest file's, seconds since 1970 */
} topRead_t;

/* Reads the files; one that does not exist yet is only counted. On failure nothing is held. */
int topReadOpen(topRead_t *read, char *const *paths, int32_t nPaths, perfError_t *error);
void topReadClose(topRead_t *read);
/* Whether two ranks belong to one communicator: the hash says it, or where there is none, the process. */
bool topRanksMatch(const topRank_t *a, const topRank_t *b);

/* Shows `now`; `before`, or null, is what was read one refresh earlier, for the rates. */
void topShow(FILE *out, const topRead_t *now, const topRead_t *before, bool hasColour);

#endif
