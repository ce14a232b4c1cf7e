"""Somebody else's emulator, unicorn from PyPI, whose guest moves while it runs.

emulator.py         be the source, and start the destination
emulator.py URI     be the destination
"""

import math
import socket
import struct
import subprocess
import sys
import threading
import time

from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL, Uc, x86_const

import mig

RAM_NBYTES = 64 << 20
DATA = 1 << 20  # where the guest's data begins, above its program
SLICE = 0.01  # seconds that the vCPU runs before it looks whether it is to stop

# The guest fills page after page with the number of the round (r12), and looks before whether the
# page still is what the last round left there: a page that was lost on the way is an older one.
PROGRAM = bytes.fromhex(
    "4c89f7"  # round:  mov rdi, r14        first page
    "4889fb"  # page:   mov rbx, rdi
    "b900020000"  #     mov ecx, 512
    "4c89e0"  #         mov rax, r12
    "f348af"  #         repe scasq
    "7518"  #           jne corrupt
    "4889df"  #         mov rdi, rbx
    "b900020000"  #     mov ecx, 512
    "48ffc0"  #         inc rax
    "f348ab"  #         rep stosq
    "4c39ff"  #         cmp rdi, r15        end of memory
    "72dd"  #           jb page
    "49ffc4"  #         inc r12
    "ebd5"  #           jmp round
)
CORRUPT = len(PROGRAM)

# All that this guest uses of a CPU. Registers by name, and not unicorn's uc_context: that is the
# memory of a struct, which another build of unicorn may lay out in another way.
REGISTERS = [
    getattr(x86_const, f"UC_X86_REG_{name}")
    for name in (
        *("RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP"),
        *("R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15", "RIP", "RFLAGS"),
    )
]
# the registers, then the time at which the vCPU stopped
CPU_STATE = struct.Struct(f">{len(REGISTERS)}Qd")


class Machine:
    """Memory, and a vCPU whose thread emulates it in slices: between two of them it can stop."""

    def __init__(self):
        memory = mig.GuestMemory()
        self.ram = memory.add("ram", RAM_NBYTES)
        self.cpu = Uc(UC_ARCH_X86, UC_MODE_64)
        self.cpu.mem_map_ptr(0, RAM_NBYTES, UC_PROT_ALL, self.ram.pages.hva)
        devices = mig.DeviceRegistry()
        devices.register("cpu", save=self.save_cpu, load=self.load_cpu)
        self.guest = mig.MemoryGuest(
            "unicorn-x86",
            memory,
            devices,
            dirty=mig.WriteTracker(memory),
            on_stop=self.stop,
            on_resume=self.run,
            on_throttle=self.throttle,
        )
        self.pc = self.rounds = 0
        self.stopped_at = self.downtime = 0.0
        self._halt = threading.Event()
        self._pause_ratio = 0.0
        self._vcpu = None

    def boot(self):
        """Put the program into memory, and the CPU to its start."""
        self.ram.view[: len(PROGRAM)] = PROGRAM
        self.cpu.reg_write(x86_const.UC_X86_REG_R14, DATA)
        self.cpu.reg_write(x86_const.UC_X86_REG_R15, RAM_NBYTES)

    # ---- what a migration asks for ----------------------------------------------------------

    def run(self, rounds=math.inf):
        """Let the vCPU run, for so many rounds."""
        self._halt.clear()
        self._vcpu = threading.Thread(target=self._emulate, args=[self.rounds + rounds])
        self._vcpu.start()

    def stop(self):
        """Return when the vCPU stands still: nothing writes memory any more."""
        self._halt.set()
        self.join()

    def throttle(self, percent):
        """Have the vCPU stand still for so much of its time."""
        self._pause_ratio = percent / (100 - percent)

    def save_cpu(self):
        """Return the vCPU's state."""
        registers = [self.cpu.reg_read(register) for register in REGISTERS]
        return CPU_STATE.pack(*registers, self.stopped_at)

    def load_cpu(self, payload, version_id):
        """Take the vCPU's state."""
        if len(payload) != CPU_STATE.size:
            raise mig.errors.MismatchError("this is no CPU of unicorn's", section="cpu")
        *registers, self.stopped_at = CPU_STATE.unpack(payload)
        for register, value in zip(REGISTERS, registers, strict=True):
            self.cpu.reg_write(register, value)
        self._note()

    # ---- the vCPU's thread ------------------------------------------------------------------

    def join(self):
        """Wait for the vCPU to have gone its rounds."""
        self._vcpu.join()

    def _emulate(self, last_round):
        began = time.monotonic()
        self.downtime = began - self.stopped_at
        while not self._halt.is_set() and self.rounds < last_round and self.pc != CORRUPT:
            self.cpu.emu_start(self.pc, CORRUPT, timeout=round(SLICE * 1e6))
            self._note()
            self.stopped_at = time.monotonic()
            self._halt.wait((self.stopped_at - began) * self._pause_ratio)
            began = time.monotonic()

    def _note(self):
        self.pc = self.cpu.reg_read(x86_const.UC_X86_REG_RIP)
        self.rounds = self.cpu.reg_read(x86_const.UC_X86_REG_R12)


def source():
    """Run the guest, and move it to another process."""
    machine = Machine()
    machine.boot()
    machine.run(rounds=2)
    machine.join()
    machine.run()
    # between two computers the URI is tcp:host:port
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", __file__, f"fd:{theirs.fileno()}"]
    there = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    outgoing = mig.OutgoingMigration(
        machine.guest,
        capabilities={"return-path", "auto-converge"},
        parameters={"max-bandwidth": 0, "downtime-limit": 100},
    )
    try:
        outgoing.start(f"fd:{ours.fileno()}")
        outgoing.wait()
    except mig.MigError:
        machine.stop()  # the guest runs again
        raise
    finally:
        ours.close()
    print(f"{outgoing.query().ram.dirty_sync_count} iterations", flush=True)
    sys.exit(there.wait())


def destination(uri):
    """Take the guest, and let it go twice around its memory: so it looks at all of it."""
    machine = Machine()
    incoming = mig.IncomingMigration(machine.guest)
    incoming.listen(uri)
    incoming.wait()
    arrived = machine.rounds
    machine.run(rounds=2)
    machine.join()
    print(f"{machine.downtime * 1000:.1f} ms of downtime, in round {arrived} of the guest")
    print("corrupt" if machine.pc == CORRUPT else "nothing is corrupt")


if __name__ == "__main__":
    destination(*sys.argv[1:]) if sys.argv[1:] else source()
