/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Other processes that map the same memory, and wait for it at userfaultfds of their own: see
 * uffd.h.
 *
 * A page that is placed here is in the page cache, and so there for everybody, but only who waits
 * at this process's userfaultfd is woken by that. The others are woken by theirs, and try again. */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "uffd.h"

static bool is_userfaultfd(int fd)
{
    static const char name[] = "anon_inode:[userfaultfd]";
    char path[64], target[sizeof(name)];
    ssize_t n;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    n = readlink(path, target, sizeof(target));
    return n == (ssize_t)sizeof(name) - 1 && memcmp(target, name, (size_t)n) == 0;
}

int mig_uffd_client_open(struct mig_uffd_client *client, int fd)
{
    int flags;

    client->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (client->fd < 0) {
        return -errno;
    }
    /* one that blocks cannot be waited for together with others: it polls as broken */
    flags = fcntl(client->fd, F_GETFL);
    if (!is_userfaultfd(client->fd) || flags < 0 ||
        fcntl(client->fd, F_SETFL, flags | O_NONBLOCK) < 0) {
        close(client->fd);
        client->fd = -1;
        return -EINVAL;
    }
    return 0;
}

static size_t unit_of(const struct mig_uffd *u, const struct mig_uffd_mapping *mapping)
{
    return u->blocks[mapping->block].unit;
}

void mig_uffd_client_close(struct mig_uffd_client *client)
{
    if (client->fd < 0) {
        return;
    }
    for (size_t i = 0; i < client->nmappings; i++) {
        const struct mig_uffd_mapping *mapping = client->mappings + i;
        struct uffdio_range range = {.start = mapping->address, .len = mapping->nbytes};

        /* nobody serves it any more, and pages of zeros are not there. A process that has ended,
         * or has unmapped it, waits for nothing. */
        if (ioctl(client->fd, UFFDIO_UNREGISTER, &range) < 0) {
            ioctl(client->fd, UFFDIO_WAKE, &range);
        }
    }
    close(client->fd);
    client->fd = -1;
}

int mig_uffd_add_client(struct mig_uffd *u, struct mig_uffd_client *client)
{
    int rc = -ENOSPC;

    pthread_mutex_lock(&u->lock);
    if (u->nclients < MIG_UFFD_CLIENTS) {
        u->clients[u->nclients++] = client;
        rc = 0;
    }
    pthread_mutex_unlock(&u->lock);
    eventfd_write(u->news_fd, 1);
    return rc;
}

void mig_uffd_remove_client(struct mig_uffd *u, struct mig_uffd_client *client)
{
    pthread_mutex_lock(&u->lock);
    for (size_t i = 0; i < u->nclients; i++) {
        if (u->clients[i] == client) {
            u->clients[i] = u->clients[--u->nclients];
            break;
        }
    }
    pthread_mutex_unlock(&u->lock);
    eventfd_write(u->news_fd, 1);
}

bool mig_uffd_has_client(const struct mig_uffd *u, const struct mig_uffd_client *client)
{
    for (size_t i = 0; i < u->nclients; i++) {
        if (u->clients[i] == client) {
            return true;
        }
    }
    return false;
}

bool mig_uffd_client_find(const struct mig_uffd *u, const struct mig_uffd_client *client,
                          uint64_t address, size_t *block, uint64_t *unit)
{
    for (size_t i = 0; i < client->nmappings; i++) {
        const struct mig_uffd_mapping *mapping = client->mappings + i;

        if (address >= mapping->address && address - mapping->address < mapping->nbytes) {
            *block = mapping->block;
            *unit = (mapping->offset + (address - mapping->address)) / unit_of(u, mapping);
            return true;
        }
    }
    return false;
}

static void wake_client(const struct mig_uffd *u, const struct mig_uffd_client *client,
                        size_t block, uint64_t unit)
{
    for (size_t i = 0; i < client->nmappings; i++) {
        const struct mig_uffd_mapping *mapping = client->mappings + i;
        uint64_t start = unit * u->blocks[block].unit;
        struct uffdio_range range = {.len = u->blocks[block].unit};

        if (mapping->block == block && start >= mapping->offset &&
            start - mapping->offset < mapping->nbytes) {
            range.start = mapping->address + (start - mapping->offset);
            ioctl(client->fd, UFFDIO_WAKE, &range);
        }
    }
}

void mig_uffd_wake_clients(const struct mig_uffd *u, size_t block, uint64_t unit)
{
    for (size_t i = 0; i < u->nclients; i++) {
        wake_client(u, u->clients[i], block, unit);
    }
}
