"""A PC as its device state has it: vCPUs, where memory stands, what the kernel has mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mig.errors import MismatchError
from mig.savevm.fields import Device, State

_MIB: Final = 1 << 20
_4_GIB: Final = 1 << 32
#: registers in the order of env.regs and of env.segs
REGISTERS: Final = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs")
#: the block that a PC's memory is in
MAIN_BLOCK: Final = "pc.ram"


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register, or ldt, tr, gdt, idt."""

    selector: int
    base: int
    limit: int
    flags: int


@dataclass(frozen=True, slots=True)
class Cpu:
    """One vCPU.

    registers: by name: rax…r15, rip, eflags
    segments:  by name: es…gs, ldt, tr, gdt, idt
    cr:        control registers 0 to 4
    """

    registers: dict[str, int]
    segments: dict[str, Segment]
    cr: tuple[int, int, int, int, int]
    efer: int
    kernel_gs_base: int


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of guest-physical memory and where it is in its block, in bytes."""

    address: int
    nbytes: int
    offset: int


def cpus_of(devices: Sequence[Device]) -> tuple[Cpu, ...]:
    """Return the vCPUs in order; MismatchError when there are none of a PC."""
    cpus = sorted((d for d in devices if d.idstr == "cpu"), key=lambda d: d.instance_id)
    if not cpus:
        raise MismatchError("there is no vCPU of a PC in the device state")
    try:
        return tuple(_cpu(device) for device in cpus)
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"the vCPUs are none of a PC: {error}") from error


def _cpu(device: Device) -> Cpu:
    state = device.state
    if state is None:
        raise KeyError("no description")
    registers = dict(zip(REGISTERS, _numbers(state["env.regs"]), strict=False))
    registers |= {"rip": _number(state["env.eip"]), "eflags": _number(state["env.eflags"])}
    segs = state["env.segs"]
    if not isinstance(segs, tuple) or len(registers) < len(REGISTERS) + 2:
        raise TypeError("no registers")
    segments = {name: _segment(s) for name, s in zip(SEGMENTS, segs, strict=True)}
    for name in ("ldt", "tr", "gdt", "idt"):
        segments[name] = _segment(state[f"env.{name}"])
    cr0, cr2, cr3, cr4 = (_number(state[f"env.cr[{i}]"]) for i in (0, 2, 3, 4))
    return Cpu(
        registers,
        segments,
        (cr0, 0, cr2, cr3, cr4),
        _number(state.get("env.efer", 0)),
        _number(state.get("env.kernelgsbase", 0)),
    )


def _number(value: object, nbits: int = 64) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << nbits:
        raise TypeError(f"{value!r} is no number of {nbits} bits")
    return value


def _numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise TypeError(f"{value!r} is no array")
    return tuple(_number(item) for item in value)


def _segment(value: object) -> Segment:
    if not isinstance(value, State):
        raise TypeError(f"{value!r} is no segment")
    widths = {"selector": 32, "base": 64, "limit": 32, "flags": 32}
    return Segment(*(_number(value[name], nbits) for name, nbits in widths.items()))


# ---- where memory stands ------------------------------------------------------------------------

_CMOS_ABOVE_16_MIB: Final = 0x34  # le16, in 64 KiB
_CMOS_ABOVE_4_GIB: Final = 0x5B  # le24, in 64 KiB
_CMOS_UNIT: Final = 64 << 10


def memory_ranges(devices: Sequence[Device], nbytes: int) -> tuple[Range, ...]:
    """Return where the main block of so many bytes stands: below and above the hole at 4 GiB.

    The firmware's figures in the real-time clock's memory tell, which QEMU puts there for it.
    MismatchError when there are none, or they cannot be.
    """
    clock = next((d for d in devices if d.idstr == "mc146818rtc"), None)
    cmos = clock.get("cmos_data") if clock is not None else None
    if not isinstance(cmos, bytes) or len(cmos) < _CMOS_ABOVE_4_GIB + 3:
        raise MismatchError("the device state has no real-time clock of a PC")
    above = int.from_bytes(cmos[_CMOS_ABOVE_4_GIB : _CMOS_ABOVE_4_GIB + 3], "little") * _CMOS_UNIT
    if not above:
        return (Range(0, nbytes, 0),)
    units = int.from_bytes(cmos[_CMOS_ABOVE_16_MIB : _CMOS_ABOVE_16_MIB + 2], "little")
    below = 16 * _MIB + units * _CMOS_UNIT
    if not 0 <= nbytes - below - above < _CMOS_UNIT:
        raise MismatchError(
            f"{below} bytes below and {above} above 4 GiB do not make {nbytes}", block=MAIN_BLOCK
        )
    return (Range(0, below, 0), Range(_4_GIB, nbytes - below, below))


# ---- what is mapped -----------------------------------------------------------------------------

_PRESENT: Final = 1
_LARGE: Final = 1 << 7
_ADDRESS: Final = np.uint64(0x000F_FFFF_FFFF_F000)
_ENTRIES: Final = 512
_PAGING: Final = 1 << 31  # of cr0
_PAE: Final = 1 << 5  # of cr4
_LA57: Final = 1 << 12
_OTHER_TABLES: Final = 1 << 12  # of cr3, with page-table isolation
_LONG_MODE: Final = 1 << 10  # of efer
#: page tables that are looked at; a kernel of gigabytes has hundreds
_MAX_TABLES: Final = 1 << 14
#: the same of all vCPUs together
_MAX_ALL_TABLES: Final = 1 << 16
#: mappings that do not join which are taken of one vCPU
_MAX_MAPPINGS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Mapping:
    """Virtual addresses and the physical ones behind them, in bytes."""

    virtual: int
    physical: int
    nbytes: int


#: returns the 512 entries of the table at a physical address, None where there is none
TableReader: TypeAlias = Callable[[int], "NDArray[np.uint64] | None"]


def kernel_mappings(cpus: Sequence[Cpu], read: TableReader) -> list[Mapping]:
    """Return what is mapped in the upper half of the vCPU that has most of it there.

    Not every one needs to have all of the kernel mapped. With too many tables the last vCPUs are
    not looked at.
    """
    most: list[Mapping] = []
    left = _MAX_ALL_TABLES
    for cpu in cpus:
        allowed = min(left, _MAX_TABLES)
        tables = PageTables(cpu, read, allowed)
        most = max(most, tables.kernel_mappings(), key=_nbytes_of)
        left -= allowed - tables.left
    return most


def _nbytes_of(mappings: Sequence[Mapping]) -> int:
    return sum(mapping.nbytes for mapping in mappings)


class PageTables:
    """Walks the page tables of a vCPU in long mode.

    read: returns the 512 entries of the table at a physical address, None where there is none
    left: how many tables may be looked at
    """

    def __init__(self, cpu: Cpu, read: TableReader, left: int = _MAX_TABLES) -> None:
        self._read = read
        #: how many more tables may be looked at
        self.left = left
        self._levels = 5 if cpu.cr[4] & _LA57 else 4
        # Linux may run programs on tables of their own, beside those of the kernel
        self._roots = {cpu.cr[3] & int(_ADDRESS), cpu.cr[3] & int(_ADDRESS) & ~_OTHER_TABLES}
        self._on = bool(cpu.cr[0] & _PAGING and cpu.cr[4] & _PAE and cpu.efer & _LONG_MODE)

    def kernel_mappings(self) -> list[Mapping]:
        """Return what is mapped in the upper half, neighbours joined; none outside of long mode.

        Tables that lead in circles or nowhere end the walk, they are the guest's own affair.
        """
        walks = [self._mappings(root) for root in sorted(self._roots)]
        return max(walks, key=_nbytes_of)

    def _mappings(self, root: int) -> list[Mapping]:
        out: list[Mapping] = []
        for virtual, physical, nbytes in self._walk(root, self._levels, 0):
            last = out[-1] if out else None
            if (
                last is not None
                and last.virtual + last.nbytes == virtual
                and last.physical + last.nbytes == physical
            ):
                out[-1] = Mapping(last.virtual, last.physical, last.nbytes + nbytes)
            elif len(out) == _MAX_MAPPINGS:
                break
            else:
                out.append(Mapping(virtual, physical, nbytes))
        return out

    def _walk(self, table: int, level: int, base: int) -> Iterator[tuple[int, int, int]]:
        entries = self._read(table) if self._on and self.left else None
        if entries is None:
            return
        self.left -= 1
        shift = 12 + 9 * (level - 1)
        top = level == self._levels
        for index in np.flatnonzero(entries & np.uint64(_PRESENT)):
            # the upper half of the addresses are the kernel's
            if top and index < _ENTRIES // 2:
                continue
            entry, virtual = entries[index], base + (int(index) << shift)
            if top:
                virtual |= (1 << 64) - (1 << (shift + 9))
            if level == 1 or (level <= 3 and entry & np.uint64(_LARGE)):
                physical = int(entry & _ADDRESS) >> shift << shift
                yield virtual, physical, 1 << shift
            else:
                yield from self._walk(int(entry & _ADDRESS), level - 1, virtual)
