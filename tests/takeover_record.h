/* What stands in for the traffic record in the tests of taking calls over, and opens that code to them. */
#ifndef ULTRAEP_TESTS_TAKEOVER_RECORD_H_
#define ULTRAEP_TESTS_TAKEOVER_RECORD_H_

#include <stddef.h>
#include <stdint.h>

enum { RECORD_PEERS = 16 };

struct record_sums {
  long opened, closed;
  int rank, nRanks; /* of the record opened last */
  uint64_t hash;
  long calls[2][RECORD_PEERS];
  uint64_t bytes[2][RECORD_PEERS];
};

struct record_table {
  void (*start)(void (*logger)(int, unsigned long, const char *, int, const char *, ...));
  void (*undo)(void);
  size_t (*slots)(void);
  size_t (*type_bytes)(int type);
  struct record_sums (*sums)(void);
  void (*clear)(void);
};
extern const struct record_table recordTable;

#endif
