/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Making and unmaking a machine: descriptors, memory slots, vCPUs. */
#include "kvmvm.h"

#if defined(__x86_64__)
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm_private.h"

enum { MAX_CPUID = 256 };
#define TSS_ADDRESS 0xfffbd000UL

int mig_kvm_fail(struct mig_kvm *vm, const char *step)
{
    vm->step = step;
    return -errno;
}

const char *mig_kvm_step(const struct mig_kvm *vm) { return vm->step; }

static int64_t check_extension(int capability)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC), rc;

    if (fd < 0) {
        return -errno;
    }
    rc = ioctl(fd, KVM_CHECK_EXTENSION, capability);
    close(fd);
    return rc < 0 ? 0 : rc;
}

int64_t mig_kvm_max_ring(void) { return check_extension(KVM_CAP_DIRTY_LOG_RING); }

int64_t mig_kvm_manual_flags(void)
{
    return check_extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
}

struct mig_kvm *mig_kvm_new(void)
{
    struct mig_kvm *vm = calloc(1, sizeof(*vm));
    pthread_condattr_t attr;

    if (!vm) {
        return NULL;
    }
    vm->kvm_fd = vm->vm_fd = -1;
    vm->step = "";
    pthread_mutex_init(&vm->lock, NULL);
    pthread_mutex_init(&vm->log_lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&vm->changed, &attr);
    pthread_condattr_destroy(&attr);
    return vm;
}

static int enable(struct mig_kvm *vm, uint32_t cap, uint64_t arg, const char *step)
{
    struct kvm_enable_cap enable = {.cap = cap, .args = {arg}};

    return ioctl(vm->vm_fd, KVM_ENABLE_CAP, &enable) < 0 ? mig_kvm_fail(vm, step) : 0;
}

static int open_device(struct mig_kvm *vm)
{
    int version;

    vm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (vm->kvm_fd < 0) {
        return mig_kvm_fail(vm, "opening /dev/kvm");
    }
    version = ioctl(vm->kvm_fd, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION) {
        errno = version < 0 ? errno : EPROTO;
        return mig_kvm_fail(vm, "KVM_GET_API_VERSION is not 12");
    }
    vm->vm_fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, 0);
    return vm->vm_fd < 0 ? mig_kvm_fail(vm, "KVM_CREATE_VM") : 0;
}

static int has(const struct mig_kvm *vm, int capability)
{
    int rc = ioctl(vm->vm_fd, KVM_CHECK_EXTENSION, capability);

    return rc < 0 ? 0 : rc;
}

static int choose_capabilities(struct mig_kvm *vm, const struct mig_kvm_config *config)
{
    int rc;

    if (!has(vm, KVM_CAP_USER_MEMORY) || !has(vm, KVM_CAP_XSAVE) || !has(vm, KVM_CAP_VCPU_EVENTS)
        || !has(vm, KVM_CAP_MP_STATE)) {
        errno = ENOTSUP;
        return mig_kvm_fail(vm, "memory slots, xsave, vcpu_events or mp_state");
    }
    rc = has(vm, KVM_CAP_XSAVE2);
    vm->xsave_bytes = (size_t)rc > sizeof(struct kvm_xsave) ? (size_t)rc : sizeof(struct kvm_xsave);
    if (vm->xsave_bytes > MIG_KVM_MAX_XSAVE) {
        errno = E2BIG;
        return mig_kvm_fail(vm, "KVM_CAP_XSAVE2");
    }
    vm->has_xcrs = has(vm, KVM_CAP_XCRS);
    vm->has_debugregs = has(vm, KVM_CAP_DEBUGREGS);
    if (has(vm, KVM_CAP_SET_TSS_ADDR)
        && ioctl(vm->vm_fd, KVM_SET_TSS_ADDR, TSS_ADDRESS) < 0) {
        return mig_kvm_fail(vm, "KVM_SET_TSS_ADDR");
    }
    if (has(vm, KVM_CAP_SPLIT_IRQCHIP)) {
        /* local APICs alone in the kernel, 24 pins of an I/O APIC that nobody has */
        rc = enable(vm, KVM_CAP_SPLIT_IRQCHIP, 24, "KVM_CAP_SPLIT_IRQCHIP");
        if (rc < 0) {
            return rc;
        }
        vm->has_lapic = true;
    }
    vm->log = config->log;
    if (vm->log == MIG_KVM_LOG_RING) {
        vm->ring_entries = config->ring_entries;
        return enable(vm, KVM_CAP_DIRTY_LOG_RING,
                      (uint64_t)vm->ring_entries * sizeof(struct kvm_dirty_gfn),
                      "KVM_CAP_DIRTY_LOG_RING");
    }
    if (vm->log == MIG_KVM_LOG_MANUAL) {
        vm->manual_flags = (uint64_t)has(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) &
                           (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        errno = ENOTSUP;
        return vm->manual_flags ? enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, vm->manual_flags,
                                         "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
                                : mig_kvm_fail(vm, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
    }
    return 0;
}

static int add_slot(struct mig_kvm *vm, size_t block, uint64_t first, uint64_t npages, uint8_t *hva)
{
    uint64_t at = vm->npages * MIG_KVM_PAGE;
    struct mig_kvm_slot *slot = vm->slots + vm->nslots;
    struct kvm_userspace_memory_region region = {
        .slot = (uint32_t)vm->nslots,
        .guest_phys_addr = at < MIG_KVM_HOLE ? at : at - MIG_KVM_HOLE + MIG_KVM_HOLE_END,
        .memory_size = npages * MIG_KVM_PAGE,
        .userspace_addr = (uint64_t)(uintptr_t)(hva + first * MIG_KVM_PAGE),
    };

    *slot = (struct mig_kvm_slot){
        .block = block,
        .first = first,
        .npages = npages,
        .gpa = region.guest_phys_addr,
        .hva = hva + first * MIG_KVM_PAGE,
        .bits = calloc((size_t)(npages + 63) / 64, sizeof(uint64_t)),
    };
    vm->nslots++;
    vm->npages += npages;
    if (!slot->bits) {
        errno = ENOMEM;
        return mig_kvm_fail(vm, "memory for a bitmap");
    }
    return ioctl(vm->vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0
               ? mig_kvm_fail(vm, "KVM_SET_USER_MEMORY_REGION")
               : 0;
}

static int add_memory(struct mig_kvm *vm, const struct mig_kvm_config *config)
{
    uint64_t most = 0;

    /* the hole may cut one block in two */
    vm->slots = calloc(config->nblocks + 1, sizeof(*vm->slots));
    for (size_t i = 0; vm->slots && i < config->nblocks; i++) {
        const struct mig_kvm_block *block = config->blocks + i;
        uint64_t below = MIG_KVM_HOLE / MIG_KVM_PAGE, n = block->npages, first = 0;
        int rc = 0;

        if (vm->npages < below && n > below - vm->npages) {
            first = below - vm->npages;
            rc = add_slot(vm, i, 0, first, block->hva);
        }
        rc = rc < 0 ? rc : add_slot(vm, i, first, n - first, block->hva);
        if (rc < 0) {
            return rc;
        }
    }
    for (size_t i = 0; i < vm->nslots; i++) {
        most = vm->slots[i].npages > most ? vm->slots[i].npages : most;
    }
    vm->scratch = calloc((size_t)(most / 64 + 2), sizeof(uint64_t));
    if (!vm->slots || !vm->scratch) {
        errno = ENOMEM;
        return mig_kvm_fail(vm, "memory for bitmaps");
    }
    return 0;
}

static struct kvm_cpuid2 *supported_cpuid(struct mig_kvm *vm)
{
    struct kvm_cpuid2 *cpuid =
        calloc(1, sizeof(*cpuid) + MAX_CPUID * sizeof(struct kvm_cpuid_entry2));

    if (cpuid) {
        cpuid->nent = MAX_CPUID;
        if (ioctl(vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid) < 0) {
            free(cpuid);
            cpuid = NULL;
        }
    } else {
        errno = ENOMEM;
    }
    return cpuid;
}

static int add_vcpu(struct mig_kvm *vm, struct kvm_cpuid2 *cpuid, unsigned index)
{
    struct mig_kvm_vcpu *vcpu = vm->vcpus + index;

    vcpu->fd = ioctl(vm->vm_fd, KVM_CREATE_VCPU, (unsigned long)index);
    if (vcpu->fd < 0) {
        return mig_kvm_fail(vm, "KVM_CREATE_VCPU");
    }
    vcpu->run = mmap(NULL, vm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED) {
        vcpu->run = NULL;
        return mig_kvm_fail(vm, "mapping struct kvm_run");
    }
    if (vm->log == MIG_KVM_LOG_RING) {
        vcpu->ring = mmap(NULL, vm->ring_entries * sizeof(*vcpu->ring), PROT_READ | PROT_WRITE,
                          MAP_SHARED, vcpu->fd, (off_t)KVM_DIRTY_LOG_PAGE_OFFSET * MIG_KVM_PAGE);
        if (vcpu->ring == MAP_FAILED) {
            vcpu->ring = NULL;
            return mig_kvm_fail(vm, "mapping a dirty ring");
        }
    }
    for (uint32_t i = 0; i < cpuid->nent; i++) {
        if (cpuid->entries[i].function == 1) {
            cpuid->entries[i].ebx = (cpuid->entries[i].ebx & 0x00ffffff) | (uint32_t)index << 24;
        }
    }
    return ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0 ? mig_kvm_fail(vm, "KVM_SET_CPUID2") : 0;
}

static int add_vcpus(struct mig_kvm *vm, unsigned nvcpus)
{
    struct kvm_cpuid2 *cpuid;
    int rc = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);

    if (rc < (int)sizeof(struct kvm_run)) {
        return mig_kvm_fail(vm, "KVM_GET_VCPU_MMAP_SIZE");
    }
    vm->run_bytes = (size_t)rc;
    vm->vcpus = calloc(nvcpus, sizeof(*vm->vcpus));
    if (!vm->vcpus) {
        errno = ENOMEM;
        return mig_kvm_fail(vm, "memory for vCPUs");
    }
    cpuid = supported_cpuid(vm);
    if (!cpuid) {
        return mig_kvm_fail(vm, "KVM_GET_SUPPORTED_CPUID");
    }
    for (rc = 0; vm->nvcpus < nvcpus && rc >= 0;) {
        vm->vcpus[vm->nvcpus] =
            (struct mig_kvm_vcpu){.vm = vm, .index = vm->nvcpus, .fd = -1, .parked = true};
        rc = add_vcpu(vm, cpuid, vm->nvcpus++);
    }
    free(cpuid);
    return rc;
}

int mig_kvm_open(struct mig_kvm *vm, const struct mig_kvm_config *config)
{
    int rc = open_device(vm);

    rc = rc < 0 ? rc : choose_capabilities(vm, config);
    rc = rc < 0 ? rc : add_vcpus(vm, config->nvcpus);
    /* before there is memory that setting an MSR could write to */
    rc = rc < 0 ? rc : mig_kvm_find_msrs(vm);
    rc = rc < 0 ? rc : add_memory(vm, config);
    return rc < 0 ? rc : mig_kvm_start_threads(vm);
}

void mig_kvm_close(struct mig_kvm *vm)
{
    mig_kvm_end_threads(vm);
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        struct mig_kvm_vcpu *vcpu = vm->vcpus + i;

        if (vcpu->ring) {
            munmap(vcpu->ring, vm->ring_entries * sizeof(*vcpu->ring));
        }
        if (vcpu->run) {
            munmap(vcpu->run, vm->run_bytes);
        }
        if (vcpu->fd >= 0) {
            close(vcpu->fd);
        }
    }
    for (size_t i = 0; i < vm->nslots; i++) {
        free(vm->slots[i].bits);
    }
    if (vm->vm_fd >= 0) {
        close(vm->vm_fd);
    }
    if (vm->kvm_fd >= 0) {
        close(vm->kvm_fd);
    }
    pthread_cond_destroy(&vm->changed);
    pthread_mutex_destroy(&vm->lock);
    pthread_mutex_destroy(&vm->log_lock);
    free(vm->scratch);
    free(vm->slots);
    free(vm->vcpus);
    free(vm);
}
#endif
