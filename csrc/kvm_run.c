/* SPDX-License-Identifier: LGPL-2.1-or-later
 * Threads of vCPUs. All signals are blocked in them; KVM_RUN alone lets the kick through, so one
 * that comes early is still there when the guest is entered, and nobody has to install a handler.
 * Kicks carry the vCPU's address: what the program sends to itself by the same number is its own. */
#include "kvmvm.h"

#if defined(__x86_64__)
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kvm_private.h"

enum {
    SLICE_NS = 10 * 1000 * 1000,
    /* slice and nap of a limited vCPU together, where that makes the slice shorter: so that a second
     * has many of them, and its rate can be measured */
    CYCLE_NS = 100 * 1000 * 1000,
    KERNEL_SIGSET_BYTES = 8,
};

/* glibc before 2.39 names the member only by this */
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static struct timespec timespec_of(int64_t ns)
{
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

/* Under the lock. One that is parked looks at what there is to do before it runs, and one kick is
 * enough until it has: more would only pile up. */
static void kick(struct mig_kvm_vcpu *vcpu)
{
    union sigval mark = {.sival_ptr = vcpu};

    if (vcpu->parked || vcpu->kicked) {
        return;
    }
    vcpu->kicked = true;
    /* out of room for signals (RLIMIT_SIGPENDING): a kick must not be lost */
    while (pthread_sigqueue(vcpu->thread, vcpu->vm->kick_signal, mark) == EAGAIN) {
        sched_yield();
    }
}

/* ---- the thread -------------------------------------------------------------------------------- */

static bool is_kick(const struct mig_kvm_vcpu *vcpu, const siginfo_t *info)
{
    return (info->si_code == SI_QUEUE || info->si_code == SI_TIMER)
           && info->si_value.sival_ptr == vcpu;
}

/* A thread's own signals come before those of the process: once one of those has come, no kick is
 * left. It goes back, for the thread that it is for. */
static void drop_kicks(const struct mig_kvm_vcpu *vcpu)
{
    struct timespec now = {0};
    siginfo_t info;
    sigset_t set;
    int signal;

    sigemptyset(&set);
    sigaddset(&set, vcpu->vm->kick_signal);
    while ((signal = sigtimedwait(&set, &info, &now)) > 0) {
        if (!is_kick(vcpu, &info)) {
            if (syscall(SYS_rt_sigqueueinfo, getpid(), signal, &info) < 0) {
                kill(getpid(), signal);
            }
            sched_yield();
            return;
        }
    }
}

static void set_up_thread(struct mig_kvm_vcpu *vcpu)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID,
                             .sigev_signo = vcpu->vm->kick_signal,
                             .sigev_value = {.sival_ptr = vcpu}};

    event.sigev_notify_thread_id = (int)syscall(SYS_gettid);
    vcpu->has_timer = timer_create(CLOCK_MONOTONIC, &event, &vcpu->timer) == 0;
}

static void note_failure(struct mig_kvm_vcpu *vcpu, int error)
{
    const struct kvm_run *run = vcpu->run;
    struct mig_kvm_counters *c = &vcpu->counters;

    c->failed = true;
    c->error = error;
    c->exit_reason = run->exit_reason;
    c->exit_detail = run->exit_reason == KVM_EXIT_INTERNAL_ERROR ? run->internal.suberror
                     : run->exit_reason == KVM_EXIT_FAIL_ENTRY
                         ? (uint32_t)run->fail_entry.hardware_entry_failure_reason
                         : 0;
}

/* What the program said; false for a port that it does not use. Under the lock. */
static bool port_written(struct mig_kvm_vcpu *vcpu)
{
    const struct kvm_run *run = vcpu->run;
    struct mig_kvm_counters *c = &vcpu->counters;
    uint32_t value;

    if (run->io.direction != KVM_EXIT_IO_OUT || run->io.size != sizeof(value)
        || run->io.count != 1) {
        return false;
    }
    memcpy(&value, (const uint8_t *)run + run->io.data_offset, sizeof(value));
    if (run->io.port == MIG_KVM_PORT_BEAT) {
        c->heartbeats++;
        c->last_beat = value;
    } else if (run->io.port == MIG_KVM_PORT_CORRUPT) {
        c->corrupt_page = c->corrupt++ ? c->corrupt_page : value;
    } else {
        return false;
    }
    pthread_cond_broadcast(&vcpu->vm->changed);
    return true;
}

/* Runs the guest until a kick, or until it has failed. A port access is finished by the kernel when
 * KVM_RUN is called again, so the loop is left by a kick alone. */
static void run_until_kicked(struct mig_kvm_vcpu *vcpu)
{
    struct mig_kvm *vm = vcpu->vm;
    bool ok = true;

    while (ok) {
        int rc = ioctl(vcpu->fd, KVM_RUN, 0), error = errno;

        if (rc < 0 && error == EAGAIN) {
            continue;
        }
        if (rc < 0 && error == EINTR) {
            drop_kicks(vcpu);
            return;
        }
        if (rc >= 0 && vcpu->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
            ok = mig_kvm_reap(vm) >= 0;
            error = ok ? 0 : EIO;
        } else if (rc >= 0) {
            error = 0;
        }
        pthread_mutex_lock(&vm->lock);
        if (rc < 0) {
            ok = false;
        } else if (vcpu->run->exit_reason == KVM_EXIT_IO) {
            ok = port_written(vcpu);
        } else if (vcpu->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL) {
            ok = false;
        }
        if (!ok) {
            note_failure(vcpu, -error);
        }
        pthread_mutex_unlock(&vm->lock);
    }
}

/* How much of its time the vCPU stands still, in ten-thousandths. Under the lock. */
static int64_t share_of(const struct mig_kvm_vcpu *vcpu)
{
    unsigned all = vcpu->vm->throttle * (MIG_KVM_WHOLE / 100);

    return vcpu->limit > all ? vcpu->limit : all;
}

static int64_t slice_of(const struct mig_kvm_vcpu *vcpu)
{
    int64_t running = CYCLE_NS / MIG_KVM_WHOLE * (MIG_KVM_WHOLE - share_of(vcpu));

    return vcpu->limit && running < SLICE_NS ? running : SLICE_NS;
}

/* Begins a slice of running where the vCPU is throttled. Under the lock. */
static void begin_slice(struct mig_kvm_vcpu *vcpu)
{
    struct itimerspec when = {0};

    if (!share_of(vcpu) || vcpu->slice_end || !vcpu->has_timer) {
        return;
    }
    vcpu->slice_ns = slice_of(vcpu);
    vcpu->slice_end = mig_kvm_now() + vcpu->slice_ns;
    when.it_value = timespec_of(vcpu->slice_end);
    timer_settime(vcpu->timer, TIMER_ABSTIME, &when, NULL);
}

/* Says how long to stand still after a slice. Under the lock. */
static void end_slice(struct mig_kvm_vcpu *vcpu)
{
    int64_t share = share_of(vcpu), now = mig_kvm_now();

    if (!share) {
        vcpu->slice_end = 0;
    } else if (vcpu->slice_end && now >= vcpu->slice_end) {
        vcpu->slice_end = 0;
        vcpu->nap_end = now + vcpu->slice_ns * share / (MIG_KVM_WHOLE - share);
        vcpu->counters.naps++;
    }
}

/* Waits until the vCPU may run; false when it is to end. Under the lock. */
static bool wait_for_turn(struct mig_kvm_vcpu *vcpu)
{
    struct mig_kvm *vm = vcpu->vm;

    vcpu->parked = true;
    pthread_cond_broadcast(&vm->changed);
    while (!vm->closing) {
        struct timespec until = timespec_of(vcpu->nap_end);

        if (!share_of(vcpu) || mig_kvm_now() >= vcpu->nap_end) {
            vcpu->nap_end = 0;
        }
        if (!vm->run || vcpu->counters.failed) {
            pthread_cond_wait(&vm->changed, &vm->lock);
        } else if (vcpu->nap_end) {
            pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
        } else {
            vcpu->parked = false;
            return true;
        }
    }
    return false;
}

static void *vcpu_main(void *opaque)
{
    struct mig_kvm_vcpu *vcpu = opaque;
    struct mig_kvm *vm = vcpu->vm;

    set_up_thread(vcpu);
    pthread_mutex_lock(&vm->lock);
    while (wait_for_turn(vcpu)) {
        begin_slice(vcpu);
        pthread_mutex_unlock(&vm->lock);
        run_until_kicked(vcpu);
        pthread_mutex_lock(&vm->lock);
        vcpu->exits++;
        vcpu->kicked = false;
        end_slice(vcpu);
    }
    pthread_mutex_unlock(&vm->lock);
    if (vcpu->has_timer) {
        timer_delete(vcpu->timer);
    }
    return NULL;
}

/* A number that the program makes no use of: there is no handler, and the calling thread does not
 * keep it for somebody who waits for it. */
static int choose_kick(const sigset_t *blocked)
{
    for (int signal = SIGRTMAX; signal >= SIGRTMIN; signal--) {
        struct sigaction action;

        if (!sigismember(blocked, signal) && sigaction(signal, NULL, &action) == 0
            && !(action.sa_flags & SA_SIGINFO) && action.sa_handler == SIG_DFL) {
            return signal;
        }
    }
    return SIGRTMAX;
}

int mig_kvm_start_threads(struct mig_kvm *vm)
{
    union {
        struct kvm_signal_mask head;
        uint8_t room[sizeof(struct kvm_signal_mask) + KERNEL_SIGSET_BYTES];
    } mask = {.head = {.len = KERNEL_SIGSET_BYTES}};
    uint64_t unblocked;
    sigset_t all, before;
    int rc = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    vm->kick_signal = choose_kick(&before);
    unblocked = ~(UINT64_C(1) << (vm->kick_signal - 1));
    memcpy(mask.head.sigset, &unblocked, sizeof(unblocked));
    for (unsigned i = 0; i < vm->nvcpus && rc >= 0; i++) {
        struct mig_kvm_vcpu *vcpu = vm->vcpus + i;

        if (ioctl(vcpu->fd, KVM_SET_SIGNAL_MASK, &mask) < 0) {
            rc = mig_kvm_fail(vm, "KVM_SET_SIGNAL_MASK");
            break;
        }
        errno = pthread_create(&vcpu->thread, NULL, vcpu_main, vcpu);
        vcpu->has_thread = errno == 0;
        rc = vcpu->has_thread ? 0 : mig_kvm_fail(vm, "starting a thread");
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

void mig_kvm_end_threads(struct mig_kvm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->closing = true;
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        kick(vm->vcpus + i);
    }
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        if (vm->vcpus[i].has_thread) {
            pthread_join(vm->vcpus[i].thread, NULL);
            vm->vcpus[i].has_thread = false;
        }
    }
}

/* ---- what others ask of it --------------------------------------------------------------------- */

void mig_kvm_stop(struct mig_kvm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->run = false;
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        kick(vm->vcpus + i);
    }
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        while (!vm->vcpus[i].parked) {
            pthread_cond_wait(&vm->changed, &vm->lock);
        }
    }
    pthread_mutex_unlock(&vm->lock);
}

void mig_kvm_resume(struct mig_kvm *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->run = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

void mig_kvm_throttle(struct mig_kvm *vm, unsigned percent)
{
    pthread_mutex_lock(&vm->lock);
    vm->throttle = percent;
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        kick(vm->vcpus + i);
    }
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

void mig_kvm_limit(struct mig_kvm *vm, unsigned index, unsigned share)
{
    struct mig_kvm_vcpu *vcpu = vm->vcpus + index;

    pthread_mutex_lock(&vm->lock);
    vcpu->limit = share;
    if (!vcpu->slice_end) {
        kick(vcpu); /* it has no slice to come to the end of */
    }
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

void mig_kvm_kick(struct mig_kvm *vm)
{
    uint64_t before[MIG_KVM_MAX_VCPUS];
    bool inside[MIG_KVM_MAX_VCPUS];

    pthread_mutex_lock(&vm->lock);
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        before[i] = vm->vcpus[i].exits;
        inside[i] = !vm->vcpus[i].parked;
        kick(vm->vcpus + i);
    }
    /* one that was out may go in meanwhile, and nobody has kicked it */
    for (unsigned i = 0; i < vm->nvcpus; i++) {
        while (inside[i] && vm->vcpus[i].exits == before[i]) {
            pthread_cond_wait(&vm->changed, &vm->lock);
        }
    }
    pthread_mutex_unlock(&vm->lock);
}

bool mig_kvm_is_parked(struct mig_kvm *vm, unsigned index)
{
    bool parked;

    pthread_mutex_lock(&vm->lock);
    parked = vm->vcpus[index].parked && !vm->run;
    pthread_mutex_unlock(&vm->lock);
    return parked;
}

bool mig_kvm_wait(struct mig_kvm *vm, unsigned index, uint64_t count, int64_t timeout_ns)
{
    const struct mig_kvm_counters *c = &vm->vcpus[index].counters;
    struct timespec until = timespec_of(mig_kvm_now() + timeout_ns);
    int rc = 0;
    bool there;

    pthread_mutex_lock(&vm->lock);
    while (c->heartbeats < count && !c->failed && rc == 0) {
        rc = pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
    }
    there = c->heartbeats >= count;
    pthread_mutex_unlock(&vm->lock);
    return there;
}

void mig_kvm_counters(struct mig_kvm *vm, unsigned index, struct mig_kvm_counters *counters)
{
    uint64_t logged;

    pthread_mutex_lock(&vm->log_lock);
    logged = vm->vcpus[index].logged;
    pthread_mutex_unlock(&vm->log_lock);
    pthread_mutex_lock(&vm->lock);
    *counters = vm->vcpus[index].counters;
    pthread_mutex_unlock(&vm->lock);
    counters->logged = logged;
}
#endif
