/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Threads of mig's own: see thread.h. */
#include "thread.h"

#include <signal.h>

int mig_thread_start(pthread_t *thread, void *(*run)(void *), void *argument, const char *name)
{
    sigset_t all, before;
    int rc;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0) {
        pthread_setname_np(*thread, name);
    }
    return -rc;
}
