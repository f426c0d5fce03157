#include "takeover_common.h"

#include <dlfcn.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

const fake_id commId = {"a unique id"};
struct fake_state *nccl;
const struct record_table *record;

void *library_open(const char *name, int flags) {
  char path[PATH_MAX];
  const char *folder = getenv("TAKEOVER_FOLDER");
  void *library;

  snprintf(path, sizeof(path), "%s/%s", folder ? folder : ".", name);
  library = dlopen(path, flags);
  if (!library) fail_msg("%s", dlerror());
  return library;
}

const struct client *client_of(void *library) {
  const struct client *found = dlsym(library, "client");

  assert_non_null(found);
  return found;
}

const struct client *client_open(const char *kind) {
  char name[64];

  snprintf(name, sizeof(name), "libtakeover_client_%s.so", kind);
  return client_of(library_open(name, RTLD_LAZY | RTLD_LOCAL));
}

void nccl_open(void) {
  struct fake_state *(*get)(void);

  get = (struct fake_state * (*)(void))
      dlsym(library_open("libtakeover_nccl.so", RTLD_NOW | RTLD_LOCAL), "fake_nccl_state");
  assert_non_null(get);
  nccl = get();
}

int group_setup_with(const char *library) {
  nccl_open();
  record = dlsym(library_open(library, RTLD_NOW | RTLD_LOCAL), "recordTable");
  assert_non_null(record);
  return 0;
}

int group_setup(void **state) {
  (void)state;
  return group_setup_with("libtakeover_recorder.so");
}

typedef void (*logger_fn)(int level, unsigned long subsystems, const char *where, int line,
                          const char *format, ...);

void start(void) {
  void *library = library_open("libtakeover_nccl.so", RTLD_NOW | RTLD_NOLOAD);

  record->start((logger_fn)dlsym(library, "fake_nccl_log"));
  assert_int_equal(dlclose(library), 0);
}

int test_setup(void **state) {
  (void)state;
  record->undo();
  record->clear();
  nccl->result = 0;
  nccl->lines = 0;
  return 0;
}
