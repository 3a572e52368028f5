/* Makes system calls fail, fall short or take long, by a seed. Loaded by LD_PRELOAD into both processes.
 *
 * The file named by SYSCALL_SHIM is mapped by all of them: whoever writes to it turns faults on and off. File
 * faults meet only regular files under the folders of SYSCALL_SHIM_UNDER (separated by colons), so that Python
 * itself can be read. Every call that is interfered with is counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { EIO_READ, SHORT_READ, SLOW_READ, EIO_WRITE, NO_SPACE, NO_DESCRIPTOR, NO_MEMORY, KINDS };

struct control {
    uint32_t is_on;
    uint32_t kinds;      /* bit by bit, of the enum above */
    uint32_t per_mille;  /* of the calls that could be interfered with */
    uint32_t slow_us;
    uint64_t seed;
    uint64_t num_calls;
    uint64_t num_faults[KINDS];
};

static struct control idle, *control = &idle;
static char watched[65536];
static const char *under;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("SYSCALL_SHIM");
    under = getenv("SYSCALL_SHIM_UNDER");
    if (!path) return;
    int fd = REAL(open)(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *found = REAL(mmap)(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) control = found;
    close(fd);
}

static uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int strikes(int kind) {
    if (!control->is_on || !(control->kinds >> kind & 1)) return 0;
    uint64_t call = __atomic_fetch_add(&control->num_calls, 1, __ATOMIC_RELAXED);
    if (mixed(control->seed ^ mixed(call)) % 1000 >= control->per_mille) return 0;
    __atomic_fetch_add(&control->num_faults[kind], 1, __ATOMIC_RELAXED);
    return 1;
}

static int is_under(const char *path) {
    for (const char *start = under; start && *start;) {
        size_t size = strcspn(start, ":");
        if (size && !strncmp(path, start, size)) return 1;
        start += size + (start[size] == ':');
    }
    return 0;
}

static int is_watched(int fd) {
    struct stat found;
    if (!control->is_on || fd < 0 || fd >= (int)sizeof watched || !watched[fd]) return 0;
    return !fstat(fd, &found) && S_ISREG(found.st_mode);
}

static int opened(int fd, const char *path) {
    if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = (char)is_under(path);
    return fd;
}

static int may_open(const char *path, int flags) {
    if (!is_under(path)) return 1;
    if (strikes(NO_DESCRIPTOR)) { errno = EMFILE; return 0; }
    if (strikes(EIO_READ)) { errno = EIO; return 0; }
    if (flags & O_CREAT && strikes(NO_SPACE)) { errno = ENOSPC; return 0; }
    return 1;
}

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                   \
        return may_open(path, flags) ? opened(REAL(name)(path, flags, mode), path) : -1; \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
    int name(int folder, const char *path, int flags, ...) {            \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                   \
        return may_open(path, flags) ? opened(REAL(name)(folder, path, flags, mode), path) : -1; \
    }
OPENAT(openat)
OPENAT(openat64)

/* Whether a read may begin. */
static int may_read(int fd) {
    if (!is_watched(fd)) return 1;
    if (strikes(SLOW_READ)) usleep(control->slow_us);
    if (!strikes(EIO_READ)) return 1;
    errno = EIO;
    return 0;
}

/* How much of what was read the caller is told of. */
static ssize_t told(int fd, ssize_t count) {
    if (count < 2 || !is_watched(fd) || !strikes(SHORT_READ)) return count;
    return 1 + (ssize_t)(mixed(control->num_calls) % (uint64_t)(count - 1));
}

static int may_write(int fd) {
    if (!is_watched(fd)) return 1;
    if (strikes(NO_SPACE)) { errno = ENOSPC; return 0; }
    if (strikes(EIO_WRITE)) { errno = EIO; return 0; }
    return 1;
}

ssize_t read(int fd, void *to, size_t size) {
    if (!may_read(fd)) return -1;
    ssize_t count = REAL(read)(fd, to, size), less = told(fd, count);
    if (less < count) lseek(fd, less - count, SEEK_CUR);
    return less;
}

#define PREAD(name, offset_type)                                        \
    ssize_t name(int fd, void *to, size_t size, offset_type at) {       \
        return may_read(fd) ? told(fd, REAL(name)(fd, to, size, at)) : -1; \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

#define PREADV(name, offset_type)                                       \
    ssize_t name(int fd, const struct iovec *to, int count, offset_type at) { \
        return may_read(fd) ? told(fd, REAL(name)(fd, to, count, at)) : -1; \
    }
PREADV(preadv, off_t)
PREADV(preadv64, off64_t)

/* Python's os.preadv: experts and saved blocks are read with it. */
#define PREADV2(name, offset_type)                                      \
    ssize_t name(int fd, const struct iovec *to, int count, offset_type at, int flags) { \
        return may_read(fd) ? told(fd, REAL(name)(fd, to, count, at, flags)) : -1; \
    }
PREADV2(preadv2, off_t)
PREADV2(preadv64v2, off64_t)

ssize_t write(int fd, const void *from, size_t size) {
    return may_write(fd) ? REAL(write)(fd, from, size) : -1;
}

ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) {
    return may_write(fd) ? REAL(pwrite64)(fd, from, size, at) : -1;
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    if (strikes(NO_DESCRIPTOR)) { errno = EMFILE; return -1; }
    return REAL(accept4)(fd, address, size, flags);
}

int socketpair(int domain, int type, int protocol, int pair[2]) {
    if (strikes(NO_DESCRIPTOR)) { errno = EMFILE; return -1; }
    return REAL(socketpair)(domain, type, protocol, pair);
}

#define MMAP(name, offset_type)                                         \
    void *name(void *where, size_t size, int protection, int flags, int fd, offset_type at) { \
        if (fd < 0 && size >= 1u << 20 && strikes(NO_MEMORY)) { errno = ENOMEM; return MAP_FAILED; } \
        return REAL(name)(where, size, protection, flags, fd, at);      \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)
