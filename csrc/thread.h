/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Threads of mig's own. */
#ifndef MIG_THREAD_H
#define MIG_THREAD_H

#include <pthread.h>

/* Starts a thread that takes no signals: these are for the threads of the program. name: 15
 * characters at most. 0 or -errno. */
int mig_thread_start(pthread_t *thread, void *(*run)(void *), void *argument, const char *name);

#endif
