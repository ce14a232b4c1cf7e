/* SPDX-License-Identifier: LGPL-2.1-or-later
 * What the vCPUs run, and the tables that it runs in.
 *
 * It is 64-bit code at privilege level 3, whose task state segment permits every port: a KVM without
 * hardware support for virtual machines (page-table based ones, as in some nested ones) runs level 3
 * on the CPU itself, but emulates level 0, forgets the I/O privilege level, and knows few vector
 * instructions there. It needs no stack, no interrupts and no descriptor tables. */
#include "kvmvm.h"

#if defined(__x86_64__)
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm_private.h"

/* Each page holds one 8-byte value all over: pass * r15 ^ address ^ key, pass 0: anything. The key
 * is in xmm15 and nowhere else, so the check also notices lost vector registers.
 *
 *   rdi next page   rsi first page   rbx end   r8 bytes of a page   r12 pass   r13 pages written
 *   r14 pace   r15 multiplier */
__asm__(".pushsection .rodata\n"
        "mig_kvm_code:\n"
        ".Lnext_page:\n"
        "    test %r12, %r12\n"
        "    jz .Lwrite\n"
        "    mov %r12, %rax\n"
        "    imul %r15, %rax\n"
        "    xor %rdi, %rax\n"
        "    movq %rax, %xmm0\n"
        "    pxor %xmm15, %xmm0\n"
        "    punpcklqdq %xmm0, %xmm0\n"
        "    pcmpeqd %xmm1, %xmm1\n"
        "    mov %r8, %rcx\n"
        ".Lcheck:\n"
        "    movdqa -16(%rdi,%rcx), %xmm2\n"
        "    pcmpeqd %xmm0, %xmm2\n"
        "    pand %xmm2, %xmm1\n"
        "    sub $16, %rcx\n"
        "    jnz .Lcheck\n"
        "    pmovmskb %xmm1, %eax\n"
        "    cmp $0xffff, %eax\n"
        "    je .Lwrite\n"
        "    mov %rdi, %rax\n"
        "    shr $12, %rax\n"
        "    mov $0x11, %edx\n"
        "    out %eax, %dx\n"
        ".Lwrite:\n"
        "    lea 1(%r12), %rax\n"
        "    imul %r15, %rax\n"
        "    xor %rdi, %rax\n"
        "    movq %rax, %xmm0\n"
        "    pxor %xmm15, %xmm0\n"
        "    punpcklqdq %xmm0, %xmm0\n"
        "    mov %r8, %rcx\n"
        ".Lfill:\n"
        "    movdqa %xmm0, -16(%rdi,%rcx)\n"
        "    sub $16, %rcx\n"
        "    jnz .Lfill\n"
        "    inc %r13\n"
        "    add %r8, %rdi\n"
        "    cmp %rbx, %rdi\n"
        "    jb .Lpaced\n"
        "    mov %rsi, %rdi\n"
        "    inc %r12\n"
        "    mov $0x10, %edx\n"
        "    mov %r12d, %eax\n"
        "    out %eax, %dx\n"
        ".Lpaced:\n"
        "    mov %r14, %rcx\n"
        ".Lidle:\n"
        "    test %rcx, %rcx\n"
        "    jz .Lnext_page\n"
        "    dec %rcx\n"
        "    jmp .Lidle\n"
        "mig_kvm_code_end:\n"
        ".popsection\n");

extern const uint8_t mig_kvm_code[] __attribute__((visibility("hidden")));
extern const uint8_t mig_kvm_code_end[] __attribute__((visibility("hidden")));

#define MULTIPLIER UINT64_C(0x9E3779B97F4A7C15)
#define LARGE_PAGE UINT64_C(0x200000)
#define GIB UINT64_C(0x40000000)

enum {
    TSS_PAGE = MIG_KVM_CODE_PAGE + 1,
    PML4_PAGE,
    PDPT_PAGE,
    PT_PAGE,
    PD_PAGE,
    NENTRIES = 512,
    /* Entries are born accessed and dirty: then the CPU does not write to the tables. */
    TABLE = 0x27,
    READ_ONLY = 0x25,
    WRITABLE = 0x67,
    LARGE = 0xe7,
    CR0 = 0x80000033, /* paging, numeric errors, coprocessor, protection */
    CR4 = 0x620,      /* physical address extension, SSE and its exceptions */
    EFER = 0x500,     /* long mode */
    RFLAGS = 0x2,
    /* Offset and value of the TSS's word that says where the bits of the ports begin: zeros. */
    TSS_PORTS_WORD = 102,
    TSS_PORTS = 104,
    TSS_LIMIT = MIG_KVM_PAGE - 1,
};

static uint64_t ngib(uint64_t npages) { return (npages * MIG_KVM_PAGE + GIB - 1) / GIB; }

uint64_t mig_kvm_boot_pages(uint64_t npages) { return PD_PAGE + ngib(npages); }

static uint64_t physical(uint64_t linear)
{
    return linear < MIG_KVM_HOLE ? linear : linear - MIG_KVM_HOLE + MIG_KVM_HOLE_END;
}

static void write_tables(uint8_t *memory, uint64_t npages)
{
    uint64_t *table = (uint64_t *)(void *)memory;
    uint64_t *pt = table + PT_PAGE * NENTRIES, *pd = table + PD_PAGE * NENTRIES;

    memset(memory, 0, mig_kvm_boot_pages(npages) * MIG_KVM_PAGE);
    memcpy(memory + MIG_KVM_CODE_PAGE * MIG_KVM_PAGE, mig_kvm_code,
           (size_t)(mig_kvm_code_end - mig_kvm_code));
    memory[TSS_PAGE * MIG_KVM_PAGE + TSS_PORTS_WORD] = TSS_PORTS;
    table[PML4_PAGE * NENTRIES] = PDPT_PAGE * MIG_KVM_PAGE | TABLE;
    for (uint64_t i = 0; i < ngib(npages); i++) {
        table[PDPT_PAGE * NENTRIES + i] = (PD_PAGE + i) * MIG_KVM_PAGE | TABLE;
    }
    for (uint64_t i = 0; i * LARGE_PAGE < npages * MIG_KVM_PAGE; i++) {
        pd[i] = physical(i * LARGE_PAGE) | LARGE;
    }
    /* The program must not be writable: a KVM that shadows page tables calls a page dirty once it
     * is mapped so. */
    pd[0] = PT_PAGE * MIG_KVM_PAGE | TABLE;
    for (uint64_t i = 1; i < NENTRIES; i++) {
        pt[i] = i * MIG_KVM_PAGE | WRITABLE;
    }
    pt[MIG_KVM_CODE_PAGE] = MIG_KVM_CODE_PAGE * MIG_KVM_PAGE | READ_ONLY;
    pt[TSS_PAGE] = TSS_PAGE * MIG_KVM_PAGE | READ_ONLY;
}

static int set_system_registers(struct mig_kvm *vm, unsigned index)
{
    struct kvm_segment code = {.limit = 0xffffffff, .selector = 0x0b, .type = 11, .present = 1,
                               .dpl = 3, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {.limit = 0xffffffff, .selector = 0x13, .type = 3, .present = 1,
                               .dpl = 3, .s = 1, .db = 1, .g = 1};
    struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
    struct kvm_sregs sregs;
    int rc = mig_kvm_get(vm, index, MIG_KVM_SREGS, &sregs);

    if (rc < 0) {
        return rc;
    }
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.tr.base = TSS_PAGE * MIG_KVM_PAGE;
    sregs.tr.limit = TSS_LIMIT;
    sregs.cr0 = CR0;
    sregs.cr3 = PML4_PAGE * MIG_KVM_PAGE;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    rc = mig_kvm_set(vm, index, MIG_KVM_SREGS, &sregs, sizeof(sregs));
    return rc < 0 ? rc : mig_kvm_set(vm, index, MIG_KVM_MP_STATE, &runnable, sizeof(runnable));
}

static int set_registers(struct mig_kvm *vm, unsigned index, uint64_t first, uint64_t end,
                         uint64_t key, uint64_t pace)
{
    struct kvm_regs regs = {
        .rip = MIG_KVM_CODE_PAGE * MIG_KVM_PAGE,
        .rflags = RFLAGS,
        .rdi = first * MIG_KVM_PAGE,
        .rsi = first * MIG_KVM_PAGE,
        .rbx = end * MIG_KVM_PAGE,
        .r8 = MIG_KVM_PAGE,
        .r14 = pace,
        .r15 = MULTIPLIER,
    };
    struct kvm_fpu fpu = {.fcw = 0x37f, .mxcsr = 0x1f80};

    memcpy(fpu.xmm[15], &key, sizeof(key));
    if (ioctl(vm->vcpus[index].fd, KVM_SET_FPU, &fpu) < 0) {
        return mig_kvm_fail(vm, "KVM_SET_FPU");
    }
    return mig_kvm_set(vm, index, MIG_KVM_REGS, &regs, sizeof(regs));
}

int mig_kvm_boot(struct mig_kvm *vm, uint64_t first, uint64_t npages, uint64_t key, uint64_t pace)
{
    int rc = 0;

    if (first < mig_kvm_boot_pages(vm->npages) || first > vm->npages || npages > vm->npages - first
        || npages < vm->nvcpus || mig_kvm_boot_pages(vm->npages) > vm->slots[0].npages
        || ngib(vm->npages) > NENTRIES || mig_kvm_boot_pages(vm->npages) > NENTRIES) {
        errno = EINVAL;
        return mig_kvm_fail(vm, "memory of this size");
    }
    write_tables(vm->slots[0].hva, vm->npages);
    for (unsigned i = 0; i < vm->nvcpus && rc >= 0; i++) {
        rc = set_system_registers(vm, i);
        rc = rc < 0 ? rc
                    : set_registers(vm, i, first + npages * i / vm->nvcpus,
                                    first + npages * (i + 1) / vm->nvcpus, key, pace);
    }
    return rc;
}
#endif
