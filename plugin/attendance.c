#include "attendance.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct attendance {
  uint64_t id;
  int nRanks;
  int held, asking; /* sockets, -1: none. The second is there before any rank finds this one, which then can
                       ask, too */
};

static attendance_t attendanceAbsent = {.held = -1, .asking = -1};

/* Returns its length. */
static socklen_t attendance_name(uint64_t id, int rank, struct sockaddr_un *name) {
  int length;

  memset(name, 0, sizeof(*name));
  name->sun_family = AF_UNIX; /* the first byte of the path stays 0: no file */
  length = snprintf(name->sun_path + 1, sizeof(name->sun_path) - 1, "ultraep/%016llx/%d",
                    (unsigned long long)id, rank);
  return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

static int attendance_socket(void) {
  return socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
}

attendance_t *attendance_open(uint64_t id, int nRanks, int rank) {
  struct sockaddr_un name;
  const socklen_t length = attendance_name(id, rank, &name);
  attendance_t *attendance = nRanks > 0 ? malloc(sizeof(*attendance)) : NULL;

  if (!attendance) return &attendanceAbsent;
  *attendance =
      (attendance_t){.id = id, .nRanks = nRanks, .held = attendance_socket(), .asking = attendance_socket()};
  if (attendance->held >= 0 && attendance->asking >= 0 &&
      bind(attendance->held, (const struct sockaddr *)&name, length) == 0)
    return attendance;
  attendance_close(attendance);
  return &attendanceAbsent;
}

bool attendance_is_full(const attendance_t *attendance) {
  bool isFull = true;

  if (!attendance) return true;
  if (attendance->asking < 0) return false;
  for (int rank = 0; rank < attendance->nRanks && isFull; rank++) {
    struct sockaddr_un name;
    const socklen_t length = attendance_name(attendance->id, rank, &name);

    isFull = connect(attendance->asking, (const struct sockaddr *)&name, length) == 0;
  }
  return isFull;
}

void attendance_close(attendance_t *attendance) {
  if (!attendance || attendance == &attendanceAbsent) return;
  if (attendance->held >= 0) (void)close(attendance->held);
  if (attendance->asking >= 0) (void)close(attendance->asking);
  free(attendance);
}
