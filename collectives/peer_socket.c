#include "peer_socket.h"

#include "error.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SOCKET_MAGIC 0x75657073u
#define SOCKET_STRANGE_FDS 4 /* that a stranger may send and we then close; the kernel drops any more */
#define SOCKET_STRANGERS 64  /* messages dropped when there is no time left */
#define SOCKET_OPEN_TRIES 4

/* Goes before the caller's bytes. */
typedef struct {
  uint32_t magic, hasFd;
  uint64_t token;
} socketHeader_t;

/* Room for what the kernel says beside a message. */
typedef union {
  struct cmsghdr align;
  char bytes[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(SOCKET_STRANGE_FDS * sizeof(int))];
} socketControl_t;

static socklen_t socket_address(uint64_t name, struct sockaddr_un *address) {
  *address = (struct sockaddr_un){.sun_family = AF_UNIX};
  /* Abstract: the first byte is 0, and there is no file to leave behind. */
  int length = snprintf(address->sun_path + 1, sizeof(address->sun_path) - 1, "ultraep-%016llx",
                        (unsigned long long)name);
  return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

ultraepResult_t peer_socket_open(peerSocket_t *self) {
  static const int on = 1;
  peerSocket_t made = PEER_SOCKET_NONE;
  int error = 0;
  made.fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (made.fd < 0) return error_set(ultraepSystemError, "peers: no socket: %s", strerror(errno));
  /* Before anybody knows the name, so that no message comes without its sender's user. */
  if (setsockopt(made.fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) != 0) {
    error = errno;
    goto close_socket;
  }
  for (int i = 0; i < SOCKET_OPEN_TRIES; i++) {
    struct sockaddr_un address;
    if (getrandom(&made.address, sizeof(made.address), 0) != (ssize_t)sizeof(made.address)) {
      error = errno;
      goto close_socket;
    }
    socklen_t length = socket_address(made.address.name, &address);
    if (bind(made.fd, (const struct sockaddr *)&address, length) == 0) {
      *self = made;
      return ultraepSuccess;
    }
    error = errno;
    if (error != EADDRINUSE) break;
  }

close_socket:
  (void)close(made.fd);
  return error_set(ultraepSystemError, "peers: no socket: %s", strerror(error));
}

void peer_socket_close(peerSocket_t *self) {
  if (self->fd >= 0) (void)close(self->fd);
  *self = PEER_SOCKET_NONE;
}

static void socket_attach(struct msghdr *message, socketControl_t *control, int fd) {
  memset(control, 0, sizeof(*control));
  message->msg_control = control;
  message->msg_controllen = CMSG_SPACE(sizeof(fd));
  struct cmsghdr *part = CMSG_FIRSTHDR(message);
  part->cmsg_level = SOL_SOCKET;
  part->cmsg_type = SCM_RIGHTS;
  part->cmsg_len = CMSG_LEN(sizeof(fd));
  memcpy(CMSG_DATA(part), &fd, sizeof(fd));
}

ultraepResult_t peer_socket_send(const peerSocket_t *self, const peerAddress_t *to, const void *data,
                                 size_t bytes, int fd) {
  if (bytes == 0 || bytes > PEER_SOCKET_BYTES)
    return error_set(ultraepInternalError, "peers: a message of %zu bytes", bytes);
  socketHeader_t header = {SOCKET_MAGIC, fd >= 0, to->token};
  struct sockaddr_un address;
  struct iovec parts[] = {{&header, sizeof(header)}, {(void *)(uintptr_t)data, bytes}};
  struct msghdr message = {.msg_name = &address,
                           .msg_namelen = socket_address(to->name, &address),
                           .msg_iov = parts,
                           .msg_iovlen = 2};
  socketControl_t control;
  if (fd >= 0) socket_attach(&message, &control, fd);
  ssize_t sent;
  do {
    sent = sendmsg(self->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent >= 0) return ultraepSuccess; /* a datagram goes whole */
  /* The last two: descriptors in flight, or memory for one more, that the peers' reading gives back. */
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ETOOMANYREFS || errno == ENOBUFS)
    return ultraepInProgress;
  if (errno == ECONNREFUSED || errno == ENOENT)
    return error_set(ultraepRemoteError, "peers: the other rank's socket is not there (it must be on this "
                                         "machine, in this network namespace)");
  return error_set(ultraepSystemError, "peers: sending: %s", strerror(errno));
}

/* ---- receiving ---- */

static int64_t socket_now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Keeps one descriptor and closes the others; false if the sender is not known to be this user. */
static bool socket_take_apart(struct msghdr *message, int *fd, int *nFds) {
  bool isOurs = false;
  *fd = -1;
  *nFds = 0;
  for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
    if (part->cmsg_level != SOL_SOCKET) continue;
    size_t bytes = part->cmsg_len - CMSG_LEN(0);
    if (part->cmsg_type == SCM_CREDENTIALS && bytes >= sizeof(struct ucred)) {
      struct ucred sender;
      memcpy(&sender, CMSG_DATA(part), sizeof(sender));
      isOurs = sender.uid == getuid();
    }
    if (part->cmsg_type != SCM_RIGHTS) continue;
    for (size_t at = 0; at + sizeof(int) <= bytes; at += sizeof(int)) {
      int given;
      memcpy(&given, CMSG_DATA(part) + at, sizeof(given));
      if ((*nFds)++ == 0)
        *fd = given;
      else
        (void)close(given);
    }
  }
  return isOurs;
}

typedef enum { SOCKET_NOTHING, SOCKET_STRANGER, SOCKET_MESSAGE, SOCKET_FAILED } socketTaken_t;

static socketTaken_t socket_take(const peerSocket_t *self, void *data, size_t capacity, size_t *bytes,
                                 int *fd, ultraepResult_t *result) {
  socketHeader_t header = {0};
  socketControl_t control;
  int given, nFds;
  struct iovec parts[] = {{&header, sizeof(header)}, {data, capacity}};
  struct msghdr message = {
      .msg_iov = parts, .msg_iovlen = 2, .msg_control = &control, .msg_controllen = sizeof(control)};
  ssize_t size = recvmsg(self->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (size < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return SOCKET_NOTHING;
    *result = error_set(ultraepSystemError, "peers: receiving: %s", strerror(errno));
    return SOCKET_FAILED;
  }
  bool isOurs = socket_take_apart(&message, &given, &nFds);
  socketTaken_t taken = SOCKET_MESSAGE;
  if (!isOurs || (size_t)size <= sizeof(header) || header.magic != SOCKET_MAGIC ||
      header.token != self->address.token) {
    taken = SOCKET_STRANGER;
  } else if (message.msg_flags & MSG_TRUNC) {
    taken = SOCKET_FAILED;
    *result =
        error_set(ultraepInternalError, "peers: a message is longer than the %zu bytes expected", capacity);
  } else if (nFds != (int)header.hasFd) {
    taken = SOCKET_FAILED;
    *result = error_set(ultraepSystemError,
                        "peers: a message came with %d of %u file descriptors (are too many "
                        "files open?)",
                        nFds, header.hasFd);
  }
  if (taken == SOCKET_MESSAGE) {
    *bytes = (size_t)size - sizeof(header);
    *fd = given;
  } else if (given >= 0) {
    (void)close(given);
  }
  return taken;
}

ultraepResult_t peer_socket_receive(const peerSocket_t *self, void *data, size_t capacity, size_t *bytes,
                                    int *fd, int timeoutMs) {
  int64_t deadline = socket_now_ms() + timeoutMs;
  int nStrangers = 0;
  for (;;) {
    ultraepResult_t result = ultraepSuccess;
    socketTaken_t taken = socket_take(self, data, capacity, bytes, fd, &result);
    if (taken == SOCKET_MESSAGE || taken == SOCKET_FAILED) return result;
    /* A few strangers do not hide the message behind them; many use time up like silence does. */
    int64_t left = deadline - socket_now_ms();
    if (taken == SOCKET_STRANGER && (left > 0 || nStrangers++ < SOCKET_STRANGERS)) continue;
    if (left <= 0) return ultraepTimeout;
    struct pollfd wait = {.fd = self->fd, .events = POLLIN};
    if (poll(&wait, 1, (int)left) < 0 && errno != EINTR)
      return error_set(ultraepSystemError, "peers: waiting: %s", strerror(errno));
  }
}

/* ---- the machine ---- */

static uint64_t hostId;
static pthread_once_t hostOnce = PTHREAD_ONCE_INIT;

static uint64_t host_hash(uint64_t hash, const char *text, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ (unsigned char)text[i]) * UINT64_C(0x100000001b3);
  return hash;
}

static void host_find(void) {
  uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
  char text[256] = "";
  if (gethostname(text, sizeof(text) - 1) == 0) hash = host_hash(hash, text, strlen(text) + 1);
  int boot = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  ssize_t length = boot >= 0 ? read(boot, text, sizeof(text)) : -1;
  if (boot >= 0) (void)close(boot);
  if (length > 0) hash = host_hash(hash, text, (size_t)length);
  length = readlink("/proc/self/ns/pid", text, sizeof(text));
  if (length > 0) hash = host_hash(hash, text, (size_t)length);
  hostId = hash;
}

uint64_t peer_host_id(void) {
  (void)pthread_once(&hostOnce, host_find);
  return hostId;
}
