/* What the tests of communicators that are ready later share: the fake NCCL, a client, the plugin's code as a
 * plugin or preloaded, and the double of the set-up. */
#ifndef ULTRAEP_TESTS_PENDING_COMMON_H_
#define ULTRAEP_TESTS_PENDING_COMMON_H_

#include "schedule_double.h"
#include "takeover_common.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>

enum { RANKS = 4, NCCL_FOREVER = 1 << 30, TURNS = 100000 };

extern bool isPreload;
extern const struct client *from;
extern struct schedule_double *doubles;
extern struct fake_config later; /* that does not block */

fake_id next_id(void);
void turn(void);

/* Waits for what another thread does. */
#define WAIT_UNTIL(condition)                                                                                \
  do {                                                                                                       \
    for (int turns = 0; !(condition) && turns < TURNS; turns++) turn();                                      \
    assert_true(condition);                                                                                  \
  } while (0)

/* NCCL's state as the program sees it, once, and what becomes of it. */
int state_of(void *comm);
int outcome(void *comm);

/* cmocka's. */
int pending_setup(void **state);
int pending_teardown(void **state);
int pending_group_setup(void **state);

/* All ranks' handles of a communicator that does not block. */
void make_later(void **comms);
void all_ready(void **comms, int n);
void destroy_all(void **comms, int n);
int scheduled(void **comms, int n);

#endif
