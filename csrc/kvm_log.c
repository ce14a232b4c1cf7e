/* SPDX-License-Identifier: LGPL-2.1-or-later
 * KVM's dirty logs: bitmaps of memory slots, and rings of vCPUs. */
#include "kvmvm.h"

#if defined(__x86_64__)
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm_private.h"
#include "mig.h"

static int set_logging(struct mig_kvm *vm, bool on)
{
    for (size_t i = 0; i < vm->nslots; i++) {
        const struct mig_kvm_slot *slot = vm->slots + i;
        struct kvm_userspace_memory_region region = {
            .slot = (uint32_t)i,
            .flags = on ? KVM_MEM_LOG_DIRTY_PAGES : 0,
            .guest_phys_addr = slot->gpa,
            .memory_size = slot->npages * MIG_KVM_PAGE,
            .userspace_addr = (uint64_t)(uintptr_t)slot->hva,
        };

        if (ioctl(vm->vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0) {
            return mig_kvm_fail(vm, "KVM_SET_USER_MEMORY_REGION");
        }
    }
    vm->logging = on;
    return 0;
}

/* Under the log lock. A guest write becomes visible here when its entry is; the entry's page is
 * protected again, by the reset, before any sync can take its bit: so nobody reads the page while
 * a write to it could go unseen. */
static int64_t reap(struct mig_kvm *vm)
{
    int64_t found = 0;

    for (unsigned i = 0; i < vm->nvcpus; i++) {
        struct mig_kvm_vcpu *vcpu = vm->vcpus + i;

        for (;;) {
            struct kvm_dirty_gfn *entry = vcpu->ring + vcpu->ring_next % vm->ring_entries;
            uint32_t flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
            uint32_t slot = entry->slot & 0xffff;

            if (!(flags & KVM_DIRTY_GFN_F_DIRTY)) {
                break;
            }
            if (slot < vm->nslots && entry->offset < vm->slots[slot].npages) {
                mig_bitmap_put(vm->slots[slot].bits, entry->offset);
            }
            __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
            vcpu->ring_next++;
            vcpu->logged++;
            found++;
        }
    }
    if (found && ioctl(vm->vm_fd, KVM_RESET_DIRTY_RINGS, 0) < 0) {
        return mig_kvm_fail(vm, "KVM_RESET_DIRTY_RINGS");
    }
    return found;
}

int64_t mig_kvm_reap(struct mig_kvm *vm)
{
    int64_t found;

    pthread_mutex_lock(&vm->log_lock);
    found = vm->log == MIG_KVM_LOG_RING ? reap(vm) : 0;
    pthread_mutex_unlock(&vm->log_lock);
    return found;
}

int64_t mig_kvm_collect(struct mig_kvm *vm, uint64_t *logged)
{
    int64_t found;

    mig_kvm_kick(vm); /* the CPU may hold entries back until it leaves the guest */
    pthread_mutex_lock(&vm->log_lock);
    found = vm->log == MIG_KVM_LOG_RING ? reap(vm) : 0;
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        logged[i] = vm->vcpus[i].logged;
    }
    pthread_mutex_unlock(&vm->log_lock);
    return found;
}

static int begin_or_end(struct mig_kvm *vm, bool on)
{
    bool all = on && vm->manual_flags & KVM_DIRTY_LOG_INITIALLY_SET;
    int rc;

    pthread_mutex_lock(&vm->log_lock);
    rc = set_logging(vm, on);
    if (rc >= 0 && vm->log == MIG_KVM_LOG_RING) {
        int64_t found = reap(vm);

        rc = found < 0 ? (int)found : 0;
    }
    for (size_t i = 0; i < vm->nslots; i++) {
        struct mig_kvm_slot *slot = vm->slots + i;

        memset(slot->bits, 0, mig_bitmap_nwords(slot->npages) * sizeof(uint64_t));
        if (all) {
            mig_bitmap_set(slot->bits, 0, slot->npages);
        }
    }
    pthread_mutex_unlock(&vm->log_lock);
    return rc;
}

int mig_kvm_log_start(struct mig_kvm *vm) { return begin_or_end(vm, true); }

int mig_kvm_log_stop(struct mig_kvm *vm) { return begin_or_end(vm, false); }

static uint64_t put_word(uint64_t *dst, uint64_t word)
{
    uint64_t fresh = word & ~*dst;

    *dst |= word;
    return (uint64_t)__builtin_popcountll(fresh);
}

/* dst |= src << at; a slot need not begin at a word of its block. Returns newly set bits. */
static uint64_t merge_at(uint64_t *dst, uint64_t at, const uint64_t *src, uint64_t nbits)
{
    unsigned shift = (unsigned)(at % 64);
    uint64_t fresh = 0;

    for (uint64_t w = 0; w < mig_bitmap_nwords(nbits); w++) {
        uint64_t word = src[w];

        if (w == nbits / 64) {
            word &= (UINT64_C(1) << nbits % 64) - 1;
        }
        if (word) {
            fresh += put_word(dst + at / 64 + w, word << shift);
            if (shift && word >> (64 - shift)) {
                fresh += put_word(dst + at / 64 + w + 1, word >> (64 - shift));
            }
        }
    }
    return fresh;
}

static int64_t sync_slot(struct mig_kvm *vm, struct mig_kvm_slot *slot, uint64_t *dirty)
{
    size_t nwords = mig_bitmap_nwords(slot->npages);
    struct kvm_dirty_log log = {.slot = (uint32_t)(slot - vm->slots),
                                .dirty_bitmap = vm->scratch};
    uint64_t fresh;

    if (vm->log == MIG_KVM_LOG_RING) {
        fresh = merge_at(dirty, slot->first, slot->bits, slot->npages);
        memset(slot->bits, 0, nwords * sizeof(uint64_t));
        return (int64_t)fresh;
    }
    if (ioctl(vm->vm_fd, KVM_GET_DIRTY_LOG, &log) < 0) {
        return mig_kvm_fail(vm, "KVM_GET_DIRTY_LOG");
    }
    if (vm->log == MIG_KVM_LOG_MANUAL) {
        for (size_t w = 0; w < nwords; w++) {
            slot->bits[w] |= vm->scratch[w];
        }
    }
    return (int64_t)merge_at(dirty, slot->first, vm->scratch, slot->npages);
}

int64_t mig_kvm_sync(struct mig_kvm *vm, size_t block, uint64_t *dirty)
{
    int64_t fresh = 0, rc = 0;

    if (vm->log == MIG_KVM_LOG_RING) {
        mig_kvm_kick(vm); /* the CPU may hold entries back until it leaves the guest */
    }
    pthread_mutex_lock(&vm->log_lock);
    rc = vm->log == MIG_KVM_LOG_RING ? reap(vm) : 0;
    for (size_t i = 0; i < vm->nslots && rc >= 0; i++) {
        if (vm->slots[i].block == block) {
            rc = sync_slot(vm, vm->slots + i, dirty);
            fresh += rc > 0 ? rc : 0;
        }
    }
    pthread_mutex_unlock(&vm->log_lock);
    return rc < 0 ? rc : fresh;
}

/* Clears what was reported of pages first..end of the slot, and nothing that was written since. */
static int clear_slot(struct mig_kvm *vm, struct mig_kvm_slot *slot, uint64_t first, uint64_t end)
{
    uint64_t from = first / 64 * 64, until = (end + 63) / 64 * 64;
    struct kvm_clear_dirty_log clear;

    until = until < slot->npages ? until : slot->npages;
    if (mig_bitmap_next_set(slot->bits, end, first) == end) {
        return 0;
    }
    memcpy(vm->scratch, slot->bits + from / 64, mig_bitmap_nwords(until - from) * sizeof(uint64_t));
    mig_bitmap_clear(vm->scratch, 0, first - from);
    mig_bitmap_clear(vm->scratch, end - from, until - end);
    clear = (struct kvm_clear_dirty_log){.slot = (uint32_t)(slot - vm->slots),
                                         .num_pages = (uint32_t)(until - from),
                                         .first_page = from,
                                         .dirty_bitmap = vm->scratch};
    if (ioctl(vm->vm_fd, KVM_CLEAR_DIRTY_LOG, &clear) < 0) {
        return mig_kvm_fail(vm, "KVM_CLEAR_DIRTY_LOG");
    }
    mig_bitmap_clear(slot->bits, first, end - first);
    return 0;
}

int mig_kvm_clear(struct mig_kvm *vm, size_t block, uint64_t first, uint64_t npages)
{
    int rc = 0;

    pthread_mutex_lock(&vm->log_lock);
    for (size_t i = 0; i < vm->nslots && rc >= 0 && vm->log == MIG_KVM_LOG_MANUAL; i++) {
        struct mig_kvm_slot *slot = vm->slots + i;
        uint64_t from = first > slot->first ? first : slot->first, end = first + npages;

        end = end < slot->first + slot->npages ? end : slot->first + slot->npages;
        if (slot->block == block && from < end) {
            rc = clear_slot(vm, slot, from - slot->first, end - slot->first);
        }
    }
    pthread_mutex_unlock(&vm->log_lock);
    return rc;
}
#endif
