/* Preloaded: counts the calls that change files below a folder, and at one of them kills or fails.
 *
 * Python steers it through a page that it shares with the processes it forks, see `State`. What the
 * page has is read at every call, so a process arms the shim by writing there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST = 1024, PATH = 512 };

/* What happens at a call. */
enum { NOTHING, KILL_BEFORE, KILL_HALF, KILL_AFTER, FAIL, SHORT };

typedef struct {
    char name[24]; /* of the function */
    char path[PATH];
    char other[PATH]; /* of a renaming, or of a link */
    long bytes;
    unsigned long inode; /* of an open file; 0 where there is none */
} Call;

typedef struct {
    int armed;
    int how;
    int at;      /* the number of the call, from 0 */
    int onwards; /* whether also at all later ones that take space */
    int error;   /* for FAIL */
    int hit;     /* how many calls were made to fail, or cut short */
    int count;
    char folder[PATH];
    Call calls[MOST];
} State;

static State *state;

/* The page, made at the first call and inherited by children. */
State *faults_state(void)
{
    if (state == NULL)
        state = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return state;
}

static int is_below(const char *path)
{
    size_t length = strlen(state->folder);
    return strncmp(path, state->folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* The path of an open file; false if it is not below the folder. */
static int of_file(int file, char *found)
{
    if (state == NULL || !state->armed)
        return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, found, PATH - 1);
    if (length < 0)
        return 0;
    found[length] = 0;
    return is_below(found);
}

/* The absolute path of what is named; false if it is not below the folder. */
static int of_name(int directory, const char *name, char *found)
{
    if (state == NULL || !state->armed || name == NULL)
        return 0;
    char base[PATH] = "";
    if (name[0] != '/') {
        if (directory == AT_FDCWD) {
            if (syscall(SYS_getcwd, base, PATH) < 0)
                return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
            ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, PATH - 1);
            if (length < 0)
                return 0;
            base[length] = 0;
        }
        strncat(base, "/", PATH - strlen(base) - 1);
    }
    snprintf(found, PATH, "%s%s", base, name);
    return is_below(found);
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Notes a call, and says what is to happen at it; kills before it if that is it. */
static int what(const char *name, const char *path, const char *other, long bytes, int takes_space,
                int file)
{
    struct stat about = {0};
    if (file >= 0)
        syscall(SYS_fstat, file, &about);
    int number = __sync_fetch_and_add(&state->count, 1);
    if (number < MOST) {
        Call *call = &state->calls[number];
        snprintf(call->name, sizeof call->name, "%s", name);
        snprintf(call->path, PATH, "%s", path);
        snprintf(call->other, PATH, "%s", other);
        call->bytes = bytes;
        call->inode = about.st_ino;
    }
    int is_it = number == state->at || (state->onwards && number > state->at && takes_space);
    if (!is_it)
        return NOTHING;
    if (state->how == KILL_BEFORE)
        die();
    if (state->how == FAIL || (state->how == SHORT && bytes > 1))
        __sync_fetch_and_add(&state->hit, 1);
    return state->how;
}

/* Half of the bytes where a call is cut short. */
static size_t part(int how, size_t bytes)
{
    return (how == KILL_HALF || how == SHORT) && bytes > 1 ? bytes / 2 : bytes;
}

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

#define AFTER(how)                                                                                 \
    do {                                                                                           \
        if ((how) == KILL_AFTER || (how) == KILL_HALF) {                                           \
            die();                                                                                 \
        }                                                                                          \
    } while (0)

/* A call without bytes: `call` is made unless it is to fail. */
#define PLAIN(name, is_watched, path, other, takes_space, call)                                    \
    PLAIN_OF(-1, name, is_watched, path, other, takes_space, call)

#define PLAIN_OF(file, name, is_watched, path, other, takes_space, call)                           \
    do {                                                                                           \
        if (!(is_watched))                                                                         \
            return call;                                                                           \
        int how = what(name, path, other, 0, takes_space, file);                                         \
        if (how == FAIL) {                                                                         \
            errno = state->error;                                                                  \
            return -1;                                                                             \
        }                                                                                          \
        __typeof__(call) result = call;                                                            \
        AFTER(how);                                                                                \
        return result;                                                                             \
    } while (0)

/* -- opening and closing */

static int opens(const char *name, int directory, const char *path, int flags, mode_t mode)
{
    char found[PATH];
    int is_written = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    is_written = is_written && of_name(directory, path, found);
#define OPEN syscall(SYS_openat, directory, path, flags, mode)
    PLAIN(name, is_written, found, "", (flags & (O_CREAT | O_TMPFILE)) != 0, (int)OPEN);
}

#define MODE(last)                                                                                 \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                         \
        va_list more;                                                                              \
        va_start(more, last);                                                                      \
        mode = va_arg(more, mode_t);                                                               \
        va_end(more);                                                                              \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags)
    return opens("open", AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE(flags)
    return opens("open", AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int directory, const char *path, int flags, ...)
{
    MODE(flags)
    return opens("openat", directory, path, flags, mode);
}

int openat64(int directory, const char *path, int flags, ...)
{
    MODE(flags)
    return opens("openat", directory, path, flags | O_LARGEFILE, mode);
}

int creat(const char *path, mode_t mode)
{
    return opens("creat", AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int creat64(const char *path, mode_t mode)
{
    return creat(path, mode);
}

/* Streams of C: their opening is seen; so are their writes if they are those of C++. */
static FILE *fopens(const char *symbol, const char *path, const char *mode)
{
    FILE *(*call)(const char *, const char *) = (FILE * (*)(const char *, const char *)) real(symbol);
    char found[PATH];
    int is_written = strpbrk(mode, "wa+") != NULL && of_name(AT_FDCWD, path, found);
    if (!is_written)
        return call(path, mode);
    int how = what("fopen", found, "", 0, 1, -1);
    if (how == FAIL) {
        errno = state->error;
        return NULL;
    }
    FILE *result = call(path, mode);
    AFTER(how);
    return result;
}

FILE *fopen(const char *path, const char *mode)
{
    return fopens("fopen", path, mode);
}

FILE *fopen64(const char *path, const char *mode)
{
    return fopens("fopen64", path, mode);
}

/* An error of close comes after the file was closed, as on network file systems. */
int close(int file)
{
    char found[PATH];
    int flags = state != NULL && state->armed ? fcntl(file, F_GETFL) : -1;
    int is_written = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && of_file(file, found);
    if (!is_written)
        return (int)syscall(SYS_close, file);
    int how = what("close", found, "", 0, 0, file);
    int result = (int)syscall(SYS_close, file);
    AFTER(how);
    if (how == FAIL && state->error != EINTR) {
        errno = state->error;
        return -1;
    }
    return result;
}

/* -- writing */

#define WRITING(name, file, bytes, call)                                                           \
    do {                                                                                           \
        char found[PATH];                                                                          \
        size_t now = bytes;                                                                        \
        if (!of_file(file, found))                                                                 \
            return call;                                                                           \
        int how = what(name, found, "", (long)(bytes), 1, file);                                         \
        if (how == FAIL) {                                                                         \
            errno = state->error;                                                                  \
            return -1;                                                                             \
        }                                                                                          \
        now = part(how, bytes);                                                                    \
        ssize_t result = call;                                                                     \
        AFTER(how);                                                                                \
        return result;                                                                             \
    } while (0)

ssize_t write(int file, const void *data, size_t bytes)
{
    WRITING("write", file, bytes, syscall(SYS_write, file, data, now));
}

ssize_t pwrite(int file, const void *data, size_t bytes, off_t offset)
{
    WRITING("pwrite", file, bytes, syscall(SYS_pwrite64, file, data, now, offset));
}

ssize_t pwrite64(int file, const void *data, size_t bytes, off64_t offset)
{
    WRITING("pwrite", file, bytes, syscall(SYS_pwrite64, file, data, now, offset));
}

/* Cut short, it writes half of its first part. */
ssize_t writev(int file, const struct iovec *parts, int count)
{
    char found[PATH];
    if (!of_file(file, found))
        return syscall(SYS_writev, file, parts, count);
    size_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += parts[i].iov_len;
    int how = what("writev", found, "", (long)bytes, 1, file);
    if (how == FAIL) {
        errno = state->error;
        return -1;
    }
    ssize_t result;
    if (part(how, bytes) < bytes)
        result = syscall(SYS_write, file, parts[0].iov_base, part(how, parts[0].iov_len));
    else
        result = syscall(SYS_writev, file, parts, count);
    AFTER(how);
    return result;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t bytes)
{
    WRITING("sendfile", out, bytes, syscall(SYS_sendfile, out, in, offset, now));
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t bytes)
{
    WRITING("sendfile", out, bytes, syscall(SYS_sendfile, out, in, offset, now));
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t bytes, unsigned flags)
{
    WRITING("copy_file_range", out, bytes, syscall(SYS_copy_file_range, in, from, out, to, now, flags));
}

ssize_t splice(int in, off64_t *from, int out, off64_t *to, size_t bytes, unsigned flags)
{
    WRITING("splice", out, bytes, syscall(SYS_splice, in, from, out, to, now, flags));
}

int ftruncate(int file, off_t length)
{
    char found[PATH];
    PLAIN_OF(file, "ftruncate", of_file(file, found), found, "", 1, (int)syscall(SYS_ftruncate, file, length));
}

int ftruncate64(int file, off64_t length)
{
    return ftruncate(file, length);
}

int truncate(const char *path, off_t length)
{
    char found[PATH];
    PLAIN("truncate", of_name(AT_FDCWD, path, found), found, "", 1,
          (int)syscall(SYS_truncate, path, length));
}

int truncate64(const char *path, off64_t length)
{
    return truncate(path, length);
}

int fallocate(int file, int mode, off_t offset, off_t length)
{
    char found[PATH];
    PLAIN_OF(file, "fallocate", of_file(file, found), found, "", 1,
          (int)syscall(SYS_fallocate, file, mode, offset, length));
}

/* Returns its error. */
int posix_fallocate(int file, off_t offset, off_t length)
{
    return fallocate(file, 0, offset, length) == 0 ? 0 : errno;
}

int posix_fallocate64(int file, off64_t offset, off64_t length)
{
    return posix_fallocate(file, offset, length);
}

int fsync(int file)
{
    char found[PATH];
    PLAIN_OF(file, "fsync", of_file(file, found), found, "", 0, (int)syscall(SYS_fsync, file));
}

int fdatasync(int file)
{
    char found[PATH];
    PLAIN_OF(file, "fdatasync", of_file(file, found), found, "", 0, (int)syscall(SYS_fdatasync, file));
}

/* Only its making is seen: what is then written to memory is no call. No writer may use it. */
void *mmap(void *address, size_t length, int protection, int flags, int file, off_t offset)
{
    char found[PATH];
    int is_written = (flags & (MAP_SHARED | MAP_SHARED_VALIDATE)) && (protection & PROT_WRITE);
    if (is_written && file >= 0 && of_file(file, found))
        what("mmap", found, "", 0, 0, file);
    return (void *)syscall(SYS_mmap, address, length, protection, flags, file, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int file, off64_t offset)
{
    return mmap(address, length, protection, flags, file, offset);
}

/* -- names */

static int renames(const char *name, int from, const char *old, int to, const char *new, unsigned flags)
{
    char first[PATH] = "", second[PATH] = "";
    int is_watched = of_name(from, old, first);
    is_watched = of_name(to, new, second) || is_watched;
    PLAIN(name, is_watched, first, second, 0,
          (int)syscall(SYS_renameat2, from, old, to, new, flags));
}

int rename(const char *old, const char *new)
{
    return renames("rename", AT_FDCWD, old, AT_FDCWD, new, 0);
}

int renameat(int from, const char *old, int to, const char *new)
{
    return renames("rename", from, old, to, new, 0);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    return renames("renameat2", from, old, to, new, flags);
}

static int links(int from, const char *old, int to, const char *new, int flags)
{
    char found[PATH];
    PLAIN("link", of_name(to, new, found), found, old, 1,
          (int)syscall(SYS_linkat, from, old, to, new, flags));
}

int link(const char *old, const char *new)
{
    return links(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    return links(from, old, to, new, flags);
}

int symlinkat(const char *old, int to, const char *new)
{
    char found[PATH];
    PLAIN("symlink", of_name(to, new, found), found, old, 1, (int)syscall(SYS_symlinkat, old, to, new));
}

int symlink(const char *old, const char *new)
{
    return symlinkat(old, AT_FDCWD, new);
}

int unlinkat(int directory, const char *path, int flags)
{
    char found[PATH];
    PLAIN(flags & AT_REMOVEDIR ? "rmdir" : "unlink", of_name(directory, path, found), found, "", 0,
          (int)syscall(SYS_unlinkat, directory, path, flags));
}

int unlink(const char *path)
{
    return unlinkat(AT_FDCWD, path, 0);
}

int rmdir(const char *path)
{
    return unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

int remove(const char *path)
{
    int result = unlink(path);
    return result != 0 && errno == EISDIR ? rmdir(path) : result;
}

int mkdirat(int directory, const char *path, mode_t mode)
{
    char found[PATH];
    PLAIN("mkdir", of_name(directory, path, found), found, "", 1,
          (int)syscall(SYS_mkdirat, directory, path, mode));
}

int mkdir(const char *path, mode_t mode)
{
    return mkdirat(AT_FDCWD, path, mode);
}

/* -- what is known of a file */

int fchmodat(int directory, const char *path, mode_t mode, int flags)
{
    char found[PATH];
    PLAIN("chmod", of_name(directory, path, found), found, "", 0,
          flags ? REAL(fchmodat)(directory, path, mode, flags)
                : (int)syscall(SYS_fchmodat, directory, path, mode));
}

int chmod(const char *path, mode_t mode)
{
    return fchmodat(AT_FDCWD, path, mode, 0);
}

int fchmod(int file, mode_t mode)
{
    char found[PATH];
    PLAIN_OF(file, "fchmod", of_file(file, found), found, "", 0, (int)syscall(SYS_fchmod, file, mode));
}

int fchownat(int directory, const char *path, uid_t owner, gid_t group, int flags)
{
    char found[PATH];
    PLAIN("chown", of_name(directory, path, found), found, "", 0,
          (int)syscall(SYS_fchownat, directory, path, owner, group, flags));
}

int chown(const char *path, uid_t owner, gid_t group)
{
    return fchownat(AT_FDCWD, path, owner, group, 0);
}

int lchown(const char *path, uid_t owner, gid_t group)
{
    return fchownat(AT_FDCWD, path, owner, group, AT_SYMLINK_NOFOLLOW);
}

static int utimens(int directory, const char *path, const struct timespec *times, int flags)
{
    char found[PATH];
    int is_watched = path == NULL ? of_file(directory, found) : of_name(directory, path, found);
    PLAIN("utimens", is_watched, found, "", 0,
          (int)syscall(SYS_utimensat, directory, path, times, flags));
}

int utimensat(int directory, const char *path, const struct timespec times[2], int flags)
{
    return utimens(directory, path, times, flags);
}

int futimens(int file, const struct timespec times[2])
{
    return utimens(file, NULL, times, 0);
}
