/* Messages and file descriptors between processes: what arrives, what is dropped, and that nothing waits for
 * ever. */
#include "peer_socket.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define SOON_MS 5000 /* for what should come */

static int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int open_files(void) {
  int n = 0;
  for (int fd = 0; fd < 1024; fd++) n += fcntl(fd, F_GETFD) >= 0;
  return n;
}

static peerSocket_t opened(void) {
  peerSocket_t made;
  assert_int_equal(peer_socket_open(&made), ultraepSuccess);
  return made;
}

static void assert_silent(const peerSocket_t *self, int timeoutMs) {
  char text[PEER_SOCKET_BYTES];
  size_t bytes = 77;
  int fd = 77;
  assert_int_equal(peer_socket_receive(self, text, sizeof(text), &bytes, &fd, timeoutMs), ultraepTimeout);
  assert_true(bytes == 77 && fd == 77);
}

static void assert_comes(const peerSocket_t *self, const char *expected) {
  char text[PEER_SOCKET_BYTES] = "";
  size_t bytes = 0;
  int fd = 77;
  assert_int_equal(peer_socket_receive(self, text, sizeof(text), &bytes, &fd, SOON_MS), ultraepSuccess);
  assert_int_equal(bytes, strlen(expected) + 1);
  assert_string_equal(text, expected);
  assert_int_equal(fd, -1);
}

static void test_message(void **state) {
  (void)state;
  peerSocket_t a = opened(), b = opened();
  char most[PEER_SOCKET_BYTES + 1], got[PEER_SOCKET_BYTES];
  size_t bytes;
  int fd;
  assert_true(a.address.name != b.address.name && a.address.token != b.address.token);
  assert_int_equal(fcntl(a.fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  assert_int_equal(peer_socket_send(&a, &b.address, "one", 4, -1), ultraepSuccess);
  assert_int_equal(peer_socket_send(&b, &b.address, "two", 4, -1), ultraepSuccess); /* to itself */
  assert_comes(&b, "one");
  assert_comes(&b, "two");
  for (size_t i = 0; i < sizeof(most); i++) most[i] = (char)(i * 7 + 1);
  assert_int_equal(peer_socket_send(&a, &b.address, most, PEER_SOCKET_BYTES, -1), ultraepSuccess);
  assert_int_equal(peer_socket_receive(&b, got, sizeof(got), &bytes, &fd, SOON_MS), ultraepSuccess);
  assert_int_equal(bytes, PEER_SOCKET_BYTES);
  assert_memory_equal(got, most, PEER_SOCKET_BYTES);
  assert_int_equal(peer_socket_send(&a, &b.address, most, PEER_SOCKET_BYTES + 1, -1), ultraepInternalError);
  assert_int_equal(peer_socket_send(&a, &b.address, most, 0, -1), ultraepInternalError);
  /* Longer than expected: an error, and gone. */
  assert_int_equal(peer_socket_send(&a, &b.address, most, 9, -1), ultraepSuccess);
  assert_int_equal(peer_socket_receive(&b, got, 8, &bytes, &fd, SOON_MS), ultraepInternalError);
  assert_silent(&b, 0);
  peer_socket_close(&a);
  peer_socket_close(&b);
  peer_socket_close(&b);
}

/* Each way: the child gets a pipe's end and answers through it. */
static void test_descriptor_between_processes(void **state) {
  (void)state;
  peerSocket_t parent = opened(), child = opened();
  int ends[2], fd = -1;
  char text[PEER_SOCKET_BYTES];
  size_t bytes;
  assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
  int nOpen = open_files();
  pid_t pid = fork();
  assert_true(pid >= 0);
  if (pid == 0) {
    (void)close(ends[1]); /* only what is sent may be used */
    if (peer_socket_receive(&child, text, sizeof(text), &bytes, &fd, SOON_MS) != ultraepSuccess) _exit(1);
    if (fd < 0 || strcmp(text, "pipe") != 0 || !(fcntl(fd, F_GETFD) & FD_CLOEXEC)) _exit(2);
    if (write(fd, "hello", 6) != 6) _exit(3);
    if (peer_socket_send(&child, &parent.address, "done", 5, fd) != ultraepSuccess) _exit(4);
    _exit(0);
  }
  assert_int_equal(peer_socket_send(&parent, &child.address, "pipe", 5, ends[1]), ultraepSuccess);
  assert_int_equal(read(ends[0], text, sizeof(text)), 6);
  assert_string_equal(text, "hello");
  assert_int_equal(peer_socket_receive(&parent, text, sizeof(text), &bytes, &fd, SOON_MS), ultraepSuccess);
  assert_string_equal(text, "done");
  assert_true(fd >= 0 && fd != ends[1]);
  assert_int_equal(write(fd, "again", 6), 6);
  assert_int_equal(read(ends[0], text, sizeof(text)), 6);
  (void)close(fd);
  int status = -1;
  assert_int_equal(waitpid(pid, &status, 0), pid);
  assert_int_equal(status, 0);
  assert_int_equal(open_files(), nOpen);
  (void)close(ends[0]);
  (void)close(ends[1]);
  peer_socket_close(&parent);
  peer_socket_close(&child);
}

static void test_timeout(void **state) {
  (void)state;
  peerSocket_t self = opened();
  int64_t start = now_ms();
  assert_silent(&self, 0);
  assert_silent(&self, 120);
  int64_t took = now_ms() - start;
  assert_true(took >= 120 && took < SOON_MS);
  peer_socket_close(&self);
}

/* A peer that does not read: the sender learns it at once, and the queue drains whole. */
static void test_full_queue(void **state) {
  (void)state;
  peerSocket_t a = opened(), b = opened();
  ultraepResult_t result = ultraepSuccess;
  char text[16];
  int n = 0;
  int64_t start = now_ms();
  for (; n < 100000 && result == ultraepSuccess; n++) {
    snprintf(text, sizeof(text), "%d", n);
    result = peer_socket_send(&a, &b.address, text, sizeof(text), -1);
  }
  assert_int_equal(result, ultraepInProgress);
  assert_true(now_ms() - start < SOON_MS);
  for (int i = 0; i < n - 1; i++) {
    size_t bytes;
    int fd;
    assert_int_equal(peer_socket_receive(&b, text, sizeof(text), &bytes, &fd, SOON_MS), ultraepSuccess);
    assert_int_equal(atoi(text), i);
  }
  assert_silent(&b, 0);
  assert_int_equal(peer_socket_send(&a, &b.address, "last", 5, -1), ultraepSuccess);
  assert_comes(&b, "last");
  peer_socket_close(&a);
  peer_socket_close(&b);
}

static void test_nobody(void **state) {
  (void)state;
  peerSocket_t a = opened(), b = opened();
  peerAddress_t gone = b.address;
  peer_socket_close(&b);
  assert_int_equal(peer_socket_send(&a, &gone, "x", 2, -1), ultraepRemoteError); /* and no signal */
  peer_socket_close(&a);
}

/* Whatever others send to the name, with and without descriptors, in front of the real message. */
static void test_strangers(void **state) {
  (void)state;
  peerSocket_t a = opened(), b = opened();
  peerAddress_t guessed = b.address;
  guessed.token++;
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  int length = snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1, "ultraep-%016llx",
                        (unsigned long long)b.address.name);
  socklen_t bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
  int raw = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), nOpen = open_files();
  char junk[600] = {0};
  assert_true(raw >= 0);
  for (size_t size = 0; size < sizeof(junk); size += 199)
    assert_int_equal(sendto(raw, junk, size, 0, (struct sockaddr *)&address, bytes), size);
  assert_int_equal(peer_socket_send(&a, &guessed, "guess", 6, raw), ultraepSuccess);
  struct iovec part = {junk, 40};
  union {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(8 * sizeof(int))];
  } control = {.bytes = {0}};
  struct msghdr many = {.msg_name = &address,
                        .msg_namelen = bytes,
                        .msg_iov = &part,
                        .msg_iovlen = 1,
                        .msg_control = &control,
                        .msg_controllen = sizeof(control)};
  struct cmsghdr *rights = CMSG_FIRSTHDR(&many);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(8 * sizeof(int));
  for (int i = 0; i < 8; i++) memcpy(CMSG_DATA(rights) + (size_t)i * sizeof(raw), &raw, sizeof(raw));
  assert_int_equal(sendmsg(raw, &many, 0), 40);
  assert_int_equal(peer_socket_send(&a, &b.address, "real", 5, -1), ultraepSuccess);
  char text[PEER_SOCKET_BYTES];
  size_t got;
  int fd;
  /* Even without time. */
  assert_int_equal(peer_socket_receive(&b, text, sizeof(text), &got, &fd, 0), ultraepSuccess);
  assert_string_equal(text, "real");
  assert_int_equal(fd, -1);
  assert_int_equal(peer_socket_send(&a, &guessed, "guess", 6, raw), ultraepSuccess);
  assert_silent(&b, 50);
  assert_int_equal(open_files(), nOpen); /* what they sent is closed */
  (void)close(raw);
  peer_socket_close(&a);
  peer_socket_close(&b);
}

/* Another user who knows even the token. Needs a user to change to. */
static void test_other_user(void **state) {
  (void)state;
  if (geteuid() != 0) skip();
  peerSocket_t a = opened(), b = opened();
  pid_t pid = fork();
  assert_true(pid >= 0);
  if (pid == 0) {
    if (setresuid(65534, 65534, 65534) != 0) _exit(77);
    _exit(peer_socket_send(&a, &b.address, "evil", 5, a.fd) == ultraepSuccess ? 0 : 1);
  }
  int status = -1;
  assert_int_equal(waitpid(pid, &status, 0), pid);
  assert_true(WIFEXITED(status) && WEXITSTATUS(status) != 1);
  assert_silent(&b, 0);
  peer_socket_close(&a);
  peer_socket_close(&b);
  if (WEXITSTATUS(status) == 77) skip();
}

/* A message must not seem whole without its descriptor. */
static void test_too_many_files(void **state) {
  (void)state;
  peerSocket_t a = opened(), b = opened();
  char text[PEER_SOCKET_BYTES];
  size_t bytes;
  int fd = 77;
  struct rlimit before, tight;
  assert_int_equal(peer_socket_send(&a, &b.address, "pipe", 5, a.fd), ultraepSuccess);
  assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
  tight = before;
  tight.rlim_cur = (rlim_t)b.fd; /* every number below is in use */
  for (int i = 0; i < b.fd; i++)
    if (fcntl(i, F_GETFD) < 0) tight.rlim_cur = (rlim_t)i < tight.rlim_cur ? (rlim_t)i : tight.rlim_cur;
  assert_int_equal(setrlimit(RLIMIT_NOFILE, &tight), 0);
  ultraepResult_t result = peer_socket_receive(&b, text, sizeof(text), &bytes, &fd, SOON_MS);
  assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
  assert_int_equal(result, ultraepSystemError);
  assert_non_null(strstr(ultraepGetLastError(), "file"));
  assert_int_equal(fd, 77);
  assert_silent(&b, 0);
  peer_socket_close(&a);
  peer_socket_close(&b);
}

static void test_host_id(void **state) {
  (void)state;
  uint64_t id = peer_host_id();
  assert_true(id != 0);
  assert_true(peer_host_id() == id);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_message),    cmocka_unit_test(test_descriptor_between_processes),
      cmocka_unit_test(test_timeout),    cmocka_unit_test(test_full_queue),
      cmocka_unit_test(test_nobody),     cmocka_unit_test(test_strangers),
      cmocka_unit_test(test_other_user), cmocka_unit_test(test_too_many_files),
      cmocka_unit_test(test_host_id),
  };
  return cmocka_run_group_tests_name("host_peer_socket", tests, NULL, NULL);
}
