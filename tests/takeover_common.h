/* What the tests with the fake NCCL and its clients share. TAKEOVER_FOLDER, which ctest sets, holds these
 * libraries; the programs themselves are linked to none. */
#ifndef ULTRAEP_TESTS_TAKEOVER_COMMON_H_
#define ULTRAEP_TESTS_TAKEOVER_COMMON_H_

#include "fake_nccl.h"
#include "takeover_client.h"
#include "takeover_record.h"

enum { SEND, RECV };
enum { FLOAT32 = 7 };

extern const fake_id commId;
extern struct fake_state *nccl;
extern const struct record_table *record;

void *library_open(const char *name, int flags);
const struct client *client_of(void *library);
const struct client *client_open(const char *kind);
/* The fake NCCL alone. */
void nccl_open(void);
/* cmocka's: the fake NCCL and the plugin's code with a record in place of the traffic record. */
int group_setup(void **state);
/* The same with another library of such code. */
int group_setup_with(const char *library);
int test_setup(void **state);
/* Takes the calls over, as a plugin's first init does. */
void start(void);

#endif
