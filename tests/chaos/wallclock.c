/*
 * Preloaded into a process, shifts its wall clock by the seconds that stand in the file
 * named by WALLCLOCK_OFFSET (eight bytes, a double), while the process runs. All other
 * clocks stay. libfaketime 0.9.10 would do the same, but with it Python's time.sleep()
 * fails: it rewrites the absolute monotonic deadline of clock_nanosleep().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile double *offset;

__attribute__((constructor)) static void open_offset(void) {
    const char *path = getenv("WALLCLOCK_OFFSET");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *seen = mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, fd, 0);
    if (seen != MAP_FAILED) offset = seen;
    close(fd);
}

static void shift(struct timespec *at) {
    double by = offset ? *offset : 0.0, whole = floor(by);
    at->tv_sec += (time_t)whole;
    at->tv_nsec += (long)((by - whole) * 1e9);
    if (at->tv_nsec >= 1000000000L) { at->tv_sec++; at->tv_nsec -= 1000000000L; }
}

int clock_gettime(clockid_t which, struct timespec *at) {
    int failed = (int)syscall(SYS_clock_gettime, which, at);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) shift(at);
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
