/* SPDX-License-Identifier: LGPL-2.1-or-later
 * State of a vCPU, as the kernel's structures. */
#include "kvmvm.h"

#if defined(__x86_64__)
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm_private.h"

struct part {
    size_t nbytes;
    unsigned long get, set;
    const char *get_name, *set_name;
};

#define PART(type, name) \
    {sizeof(type), KVM_GET_##name, KVM_SET_##name, "KVM_GET_" #name, "KVM_SET_" #name}

static const struct part PARTS[MIG_KVM_NPARTS] = {
    [MIG_KVM_REGS] = PART(struct kvm_regs, REGS),
    [MIG_KVM_SREGS] = PART(struct kvm_sregs, SREGS),
    [MIG_KVM_XSAVE] = PART(struct kvm_xsave, XSAVE),
    [MIG_KVM_XCRS] = PART(struct kvm_xcrs, XCRS),
    [MIG_KVM_LAPIC] = PART(struct kvm_lapic_state, LAPIC),
    [MIG_KVM_MP_STATE] = PART(struct kvm_mp_state, MP_STATE),
    [MIG_KVM_EVENTS] = PART(struct kvm_vcpu_events, VCPU_EVENTS),
    [MIG_KVM_DEBUGREGS] = PART(struct kvm_debugregs, DEBUGREGS),
};

union msr_buffer {
    struct kvm_msrs head;
    uint8_t room[sizeof(struct kvm_msrs) + MIG_KVM_MAX_MSRS * sizeof(struct kvm_msr_entry)];
};

int mig_kvm_find_msrs(struct mig_kvm *vm)
{
    union {
        struct kvm_msr_list head;
        uint8_t room[sizeof(struct kvm_msr_list) + MIG_KVM_MAX_MSRS * sizeof(uint32_t)];
    } list = {.head = {.nmsrs = MIG_KVM_MAX_MSRS}};
    union msr_buffer one = {.head = {.nmsrs = 1}};

    if (ioctl(vm->kvm_fd, KVM_GET_MSR_INDEX_LIST, &list) < 0) {
        return mig_kvm_fail(vm, "KVM_GET_MSR_INDEX_LIST");
    }
    for (uint32_t i = 0; i < list.head.nmsrs; i++) {
        one.head.entries[0] = (struct kvm_msr_entry){.index = list.head.indices[i]};
        if (ioctl(vm->vcpus[0].fd, KVM_GET_MSRS, &one) == 1
            && ioctl(vm->vcpus[0].fd, KVM_SET_MSRS, &one) == 1) {
            vm->msrs[vm->nmsrs++] = list.head.indices[i];
        }
    }
    return 0;
}

size_t mig_kvm_part_size(const struct mig_kvm *vm, enum mig_kvm_part part)
{
    switch (part) {
    case MIG_KVM_XSAVE:
        return vm->xsave_bytes;
    case MIG_KVM_MSRS:
        return vm->nmsrs * sizeof(struct kvm_msr_entry);
    case MIG_KVM_TSC_KHZ:
        return sizeof(uint32_t);
    case MIG_KVM_LAPIC:
        return vm->has_lapic ? PARTS[part].nbytes : 0;
    case MIG_KVM_XCRS:
        return vm->has_xcrs ? PARTS[part].nbytes : 0;
    case MIG_KVM_DEBUGREGS:
        return vm->has_debugregs ? PARTS[part].nbytes : 0;
    default:
        return PARTS[part].nbytes;
    }
}

static int get_msrs(struct mig_kvm *vm, int fd, void *buf)
{
    union msr_buffer msrs = {.head = {.nmsrs = (uint32_t)vm->nmsrs}};
    int rc;

    for (size_t i = 0; i < vm->nmsrs; i++) {
        msrs.head.entries[i].index = vm->msrs[i];
    }
    rc = ioctl(fd, KVM_GET_MSRS, &msrs);
    if (rc != (int)vm->nmsrs) {
        errno = rc < 0 ? errno : EIO;
        return mig_kvm_fail(vm, "KVM_GET_MSRS");
    }
    memcpy(buf, msrs.head.entries, vm->nmsrs * sizeof(msrs.head.entries[0]));
    return 0;
}

static int set_msrs(struct mig_kvm *vm, int fd, const void *buf, size_t nbytes)
{
    size_t n = nbytes / sizeof(struct kvm_msr_entry), done = 0;
    const struct kvm_msr_entry *entries = buf;
    union msr_buffer msrs;

    if (n > MIG_KVM_MAX_MSRS || nbytes % sizeof(*entries)) {
        errno = EINVAL;
        return mig_kvm_fail(vm, "KVM_SET_MSRS");
    }
    while (done < n) {
        int rc;

        msrs.head = (struct kvm_msrs){.nmsrs = (uint32_t)(n - done)};
        memcpy(msrs.head.entries, entries + done, (n - done) * sizeof(*entries));
        rc = ioctl(fd, KVM_SET_MSRS, &msrs);
        done += rc > 0 ? (size_t)rc : 0;
        if (rc < 0 || (done < n && entries[done].data)) {
            errno = rc < 0 ? errno : EINVAL;
            return mig_kvm_fail(vm, "KVM_SET_MSRS");
        }
        done += done < n;
    }
    return 0;
}

static int get_tsc_khz(struct mig_kvm *vm, int fd, void *buf)
{
    int khz = ioctl(fd, KVM_GET_TSC_KHZ, 0);
    uint32_t value = khz < 0 ? 0 : (uint32_t)khz;

    memcpy(buf, &value, sizeof(value));
    return khz < 0 ? mig_kvm_fail(vm, "KVM_GET_TSC_KHZ") : 0;
}

static int set_tsc_khz(struct mig_kvm *vm, int fd, const void *buf)
{
    int khz = ioctl(fd, KVM_GET_TSC_KHZ, 0);
    uint32_t value;

    memcpy(&value, buf, sizeof(value));
    if (khz == (int)value) {
        return 0;
    }
    return ioctl(fd, KVM_SET_TSC_KHZ, (unsigned long)value) < 0
               ? mig_kvm_fail(vm, "KVM_SET_TSC_KHZ")
               : 0;
}

static int check_stopped(struct mig_kvm *vm, unsigned index)
{
    if (!mig_kvm_is_parked(vm, index)) {
        errno = EBUSY; /* the ioctl would wait until the vCPU leaves the guest */
        return mig_kvm_fail(vm, "state of a vCPU that runs");
    }
    return 0;
}

int mig_kvm_get(struct mig_kvm *vm, unsigned index, enum mig_kvm_part part, void *buf)
{
    int fd = vm->vcpus[index].fd, rc = check_stopped(vm, index);
    unsigned long request = PARTS[part].get;

    if (rc < 0) {
        return rc;
    }
    if (part == MIG_KVM_MSRS) {
        return get_msrs(vm, fd, buf);
    }
    if (part == MIG_KVM_TSC_KHZ) {
        return get_tsc_khz(vm, fd, buf);
    }
    if (part == MIG_KVM_XSAVE && vm->xsave_bytes > sizeof(struct kvm_xsave)) {
        request = KVM_GET_XSAVE2;
    }
    memset(buf, 0, mig_kvm_part_size(vm, part));
    return ioctl(fd, request, buf) < 0 ? mig_kvm_fail(vm, PARTS[part].get_name) : 0;
}

int mig_kvm_set(struct mig_kvm *vm, unsigned index, enum mig_kvm_part part, const void *buf,
                size_t nbytes)
{
    int fd = vm->vcpus[index].fd, rc = check_stopped(vm, index);

    if (rc < 0) {
        return rc;
    }
    if (part == MIG_KVM_MSRS) {
        return set_msrs(vm, fd, buf, nbytes);
    }
    if (nbytes != mig_kvm_part_size(vm, part)) {
        errno = EINVAL;
        return mig_kvm_fail(vm, PARTS[part].set_name ? PARTS[part].set_name : "KVM_SET_TSC_KHZ");
    }
    if (part == MIG_KVM_TSC_KHZ) {
        return set_tsc_khz(vm, fd, buf);
    }
    if (ioctl(fd, PARTS[part].set, buf) < 0) {
        return mig_kvm_fail(vm, PARTS[part].set_name);
    }
    pthread_mutex_lock(&vm->lock);
    vm->vcpus[index].counters.failed = false; /* with other state it may run again */
    pthread_mutex_unlock(&vm->lock);
    return 0;
}
#endif
