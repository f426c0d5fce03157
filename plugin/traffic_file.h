/* The file of ULTRAEP_TRAFFIC_SHARED: what a process's traffic record held at one moment. A new file takes
 * the old one's place by rename, so a reader that has opened one sees a whole. Host byte order, everything
 * aligned to 8:
 *
 *   trafficFileHeader_t
 *   nRecords times:
 *     trafficFileRecord_t
 *     trafficFileCell_t sent[nRanks], received[nRanks]    by peer
 */
#ifndef ULTRAEP_TRAFFIC_FILE_H_
#define ULTRAEP_TRAFFIC_FILE_H_

#include <assert.h>
#include <stdint.h>

#define TRAFFIC_FILE_MAGIC 0x6369666661727475u /* "utraffic" */

enum { TRAFFIC_FILE_VERSION = 1, TRAFFIC_FILE_RANKS_MAX = 1 << 20 };

typedef struct {
  uint64_t magic;
  uint32_t version;
  uint32_t nRecords;
  uint64_t fileBytes;
  int64_t pid;
  double time; /* seconds since 1970 */
  char host[64];
} trafficFileHeader_t;

typedef struct {
  uint64_t hash; /* 0: not known */
  uint64_t id;   /* of the communicator within this process */
  int32_t rank, nRanks;
  int32_t open; /* 0: it has ended */
  int32_t reserved;
  double opened; /* seconds since 1970 */
} trafficFileRecord_t;

typedef struct {
  uint64_t bytes, calls;
} trafficFileCell_t;

static_assert(sizeof(trafficFileHeader_t) == 104, "the same for every reader");
static_assert(sizeof(trafficFileRecord_t) == 40, "the same for every reader");
static_assert(sizeof(trafficFileCell_t) == 16, "the same for every reader");

#endif
