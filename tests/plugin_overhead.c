/* Calls for plugin_overhead.sh to count instructions of: KIND COUNT, through a client whose calls the library
 * takes over, or not, as the environment says. */
#include "takeover_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { RANKS = 8 };

static int call(const struct client *from, const char *kind, void *comm, int i) {
  if (strcmp(kind, "send") == 0) return from->send(NULL, 1000, FLOAT32, i % RANKS, comm, NULL);
  if (strcmp(kind, "alltoall") == 0) return from->allToAll(NULL, NULL, 1000, FLOAT32, comm, NULL);
  if (strcmp(kind, "group") == 0) return from->groupStart() | from->groupEnd();
  return -1;
}

int main(int argc, char **argv) {
  const struct client *from;
  void *comm;

  if (argc != 3) return 2;
  nccl_open();
  from = client_open("now");
  if (from->init(&comm, RANKS, commId, 1) != 0) return 1;
  for (int i = 0; i < atoi(argv[2]); i++) {
    if (call(from, argv[1], comm, i) != 0) return 1;
  }
  return from->destroy(comm);
}
