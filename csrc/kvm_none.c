/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Where kvm_*.c is not built there is no machine: it cannot be opened, and nothing else is called
 * for one that is not open. */
#include "kvmvm.h"

#if !defined(__x86_64__)
#include <errno.h>
#include <stdlib.h>

struct mig_kvm *mig_kvm_new(void) { return malloc(1); }
void mig_kvm_close(struct mig_kvm *vm) { free(vm); }
int64_t mig_kvm_max_ring(void) { return 0; }
int64_t mig_kvm_manual_flags(void) { return 0; }
uint64_t mig_kvm_boot_pages(uint64_t npages) { return npages; }
void mig_kvm_stop(struct mig_kvm *vm) { (void)vm; }
void mig_kvm_resume(struct mig_kvm *vm) { (void)vm; }
void mig_kvm_kick(struct mig_kvm *vm) { (void)vm; }

const char *mig_kvm_step(const struct mig_kvm *vm)
{
    (void)vm;
    return "mig's KVM guest is for x86-64";
}

int mig_kvm_open(struct mig_kvm *vm, const struct mig_kvm_config *config)
{
    (void)vm, (void)config;
    return -ENOSYS;
}

void mig_kvm_throttle(struct mig_kvm *vm, unsigned percent) { (void)vm, (void)percent; }

void mig_kvm_limit(struct mig_kvm *vm, unsigned index, unsigned share)
{
    (void)vm, (void)index, (void)share;
}

bool mig_kvm_wait(struct mig_kvm *vm, unsigned index, uint64_t count, int64_t timeout_ns)
{
    (void)vm, (void)index, (void)count, (void)timeout_ns;
    return false;
}

void mig_kvm_counters(struct mig_kvm *vm, unsigned index, struct mig_kvm_counters *counters)
{
    (void)vm, (void)index;
    *counters = (struct mig_kvm_counters){0};
}

int mig_kvm_boot(struct mig_kvm *vm, uint64_t first, uint64_t npages, uint64_t key, uint64_t pace)
{
    (void)vm, (void)first, (void)npages, (void)key, (void)pace;
    return -ENOSYS;
}

size_t mig_kvm_part_size(const struct mig_kvm *vm, enum mig_kvm_part part)
{
    (void)vm, (void)part;
    return 0;
}

int mig_kvm_get(struct mig_kvm *vm, unsigned index, enum mig_kvm_part part, void *buf)
{
    (void)vm, (void)index, (void)part, (void)buf;
    return -ENOSYS;
}

int mig_kvm_set(struct mig_kvm *vm, unsigned index, enum mig_kvm_part part, const void *buf,
                size_t nbytes)
{
    (void)vm, (void)index, (void)part, (void)buf, (void)nbytes;
    return -ENOSYS;
}

int mig_kvm_log_start(struct mig_kvm *vm)
{
    (void)vm;
    return -ENOSYS;
}

int mig_kvm_log_stop(struct mig_kvm *vm)
{
    (void)vm;
    return -ENOSYS;
}

int64_t mig_kvm_sync(struct mig_kvm *vm, size_t block, uint64_t *dirty)
{
    (void)vm, (void)block, (void)dirty;
    return -ENOSYS;
}

int mig_kvm_clear(struct mig_kvm *vm, size_t block, uint64_t first, uint64_t npages)
{
    (void)vm, (void)block, (void)first, (void)npages;
    return -ENOSYS;
}

int64_t mig_kvm_reap(struct mig_kvm *vm)
{
    (void)vm;
    return -ENOSYS;
}

int64_t mig_kvm_collect(struct mig_kvm *vm, uint64_t *logged)
{
    (void)vm, (void)logged;
    return -ENOSYS;
}
#endif
