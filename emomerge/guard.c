/* A page of a mapped file that was truncated becomes a page of zeros, so that the process goes on and notices the change. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static struct sigaction before;
static long page_size;
static volatile sig_atomic_t replaced;

static void replace_page(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    if (info->si_code == BUS_ADRERR) {
        void *page = (void *)((uintptr_t)info->si_addr & ~(uintptr_t)(page_size - 1));
        if (mmap(page, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
            replaced = 1;
            return;
        }
    }
    sigaction(SIGBUS, &before, NULL); /* the fault happens again, and whoever handled it before handles it */
}

int guard_start(void)
{
    struct sigaction action = {0};
    page_size = sysconf(_SC_PAGESIZE);
    replaced = 0;
    action.sa_sigaction = replace_page;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &before);
}

int guard_stop(void)
{
    sigaction(SIGBUS, &before, NULL);
    return replaced;
}
