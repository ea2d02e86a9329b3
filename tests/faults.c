/* Preloaded by LD_PRELOAD: lets the n-th call that concerns files below one folder fail, as a dying disk does. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t length;
static long seen, nth, last;
static int error;
static char failed[64 + PATH_MAX];

/* Calls `from` to `to`, counted from 1, fail with `errno_`; 0: none, they are counted alone. */
void faults_arm(const char *below, long from, long to, int errno_) {
    length = strlen(below);
    memcpy(folder, below, length + 1);
    seen = 0, nth = from, last = to, error = errno_, failed[0] = 0;
}

long faults_seen(void) { return seen; }

/* The name of the last call that failed, and its path. */
const char *faults_failed(void) { return failed; }

static int fails_at(const char *call, const char *path) {
    if (!length || strncmp(path, folder, length)) return 0;
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (!nth || number < nth || number > last) return 0;
    snprintf(failed, sizeof failed, "%s %s", call, path);
    errno = error;
    return 1;
}

static int fails_on(const char *call, int file) {
    char link[64], path[PATH_MAX];
    if (!length) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return fails_at(call, path);
}

static int fails_below(const char *call, int place, const char *path) {
    return place == AT_FDCWD || path[0] == '/' ? fails_at(call, path) : fails_on(call, place);
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

#define ON_FILE(kind, name, arguments, names, call)                                                                    \
    kind name arguments {                                                                                              \
        if (fails_on(call, file)) return -1;                                                                           \
        return REAL(name) names;                                                                                       \
    }
#define ON_PATH(name, arguments, names, call)                                                                          \
    int name arguments {                                                                                               \
        if (fails_at(call, path)) return -1;                                                                           \
        return REAL(name) names;                                                                                       \
    }
#define ON_PLACE(name, arguments, names, call)                                                                         \
    int name arguments {                                                                                               \
        if (fails_below(call, place, path)) return -1;                                                                 \
        return REAL(name) names;                                                                                       \
    }
#define OPENS(name)                                                                                                    \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        if (fails_at("open", path)) return -1;                                                                         \
        return REAL(name)(path, flags, mode);                                                                          \
    }
#define OPENS_AT(name)                                                                                                 \
    int name(int place, const char *path, int flags, ...) {                                                            \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        if (fails_below("open", place, path)) return -1;                                                               \
        return REAL(name)(place, path, flags, mode);                                                                   \
    }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
ON_FILE(ssize_t, read, (int file, void *into, size_t size), (file, into, size), "read")
ON_FILE(ssize_t, pread, (int file, void *into, size_t size, off_t at), (file, into, size, at), "read")
ON_FILE(ssize_t, pread64, (int file, void *into, size_t size, off64_t at), (file, into, size, at), "read")
ON_FILE(ssize_t, write, (int file, const void *from, size_t size), (file, from, size), "write")
ON_FILE(ssize_t, pwrite, (int file, const void *from, size_t size, off_t at), (file, from, size, at), "write")
ON_FILE(ssize_t, pwrite64, (int file, const void *from, size_t size, off64_t at), (file, from, size, at), "write")
ON_FILE(int, fsync, (int file), (file), "fsync")
ON_FILE(int, ftruncate, (int file, off_t size), (file, size), "truncate")
ON_FILE(int, ftruncate64, (int file, off64_t size), (file, size), "truncate")
ON_FILE(int, flock, (int file, int how), (file, how), "flock")
ON_FILE(int, fchmod, (int file, mode_t mode), (file, mode), "chmod")
ON_PATH(chmod, (const char *path, mode_t mode), (path, mode), "chmod")
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), "mkdir")
ON_PATH(rmdir, (const char *path), (path), "rmdir")
ON_PATH(unlink, (const char *path), (path), "unlink")
ON_PATH(rename, (const char *path, const char *to), (path, to), "rename")
ON_PLACE(unlinkat, (int place, const char *path, int flags), (place, path, flags), "unlink")
ON_PLACE(mkdirat, (int place, const char *path, mode_t mode), (place, path, mode), "mkdir")
ON_PLACE(fchmodat, (int place, const char *path, mode_t mode, int flags), (place, path, mode, flags), "chmod")
ON_PLACE(renameat, (int place, const char *path, int there, const char *to), (place, path, there, to), "rename")
ON_PLACE(renameat2, (int place, const char *path, int there, const char *to, unsigned flags),
         (place, path, there, to, flags), "exchange")

DIR *opendir(const char *path) {
    if (fails_at("opendir", path)) return NULL;
    return REAL(opendir)(path);
}

DIR *fdopendir(int file) {
    if (fails_on("opendir", file)) return NULL;
    return REAL(fdopendir)(file);
}
