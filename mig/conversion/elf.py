"""An ELF core of a PC: memory by physical and by the kernel's addresses, and the vCPUs.

What QEMU's dump-guest-memory makes with paging, so that gdb and crash read it:

    ELF header | PT_NOTE | PT_LOAD ... | notes | memory, range by range

Virtual and physical segments name the same bytes of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from mig.conversion.x86 import REGISTERS, Cpu, Mapping, Range, Segment
from mig.errors import ChannelError, StreamError

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER: Final = struct.Struct("<IIQQQQIIQQ")
_IDENT: Final = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE = 4, 62, 1, 4
#: e_phnum then: the number is in sh_info of the only section header
_PN_XNUM: Final = 0xFFFF
_RWX: Final = 7
_NT_PRSTATUS: Final = 1
#: where memory begins in the file is a multiple of it
_ALIGNMENT: Final = 4096


@dataclass(frozen=True, slots=True)
class Core:
    """Everything that stands before memory, and where memory begins."""

    head: bytes
    memory_offset: int


def core_of(cpus: Sequence[Cpu], ranges: Sequence[Range], mappings: Iterable[Mapping]) -> Core:
    """Lay a core out; the memory that follows is that of ``ranges``, one behind the other."""
    notes = b"".join(_prstatus(cpu, i + 1) for i, cpu in enumerate(cpus))
    notes += b"".join(_qemu_note(cpu) for cpu in cpus)
    # physical addresses are below, the kernel's above: gdb takes either
    loads = [(r.address, r.address, r.nbytes) for r in ranges]
    loads += [segment for m in mappings for segment in _inside(m, ranges)]
    nheaders = len(loads) + 1
    extended = nheaders >= _PN_XNUM
    at = _HEADER.size
    section_offset = at if extended else 0
    at += _SECTION_HEADER.size if extended else 0
    headers_offset = at
    at += nheaders * _PROGRAM_HEADER.size
    notes_offset = at
    memory_offset = -(-(at + len(notes)) // _ALIGNMENT) * _ALIGNMENT
    out = [
        _HEADER.pack(
            *(_IDENT, _ET_CORE, _EM_X86_64, 1, 0, headers_offset, section_offset, 0),
            *(_HEADER.size, _PROGRAM_HEADER.size, min(nheaders, _PN_XNUM)),
            *(_SECTION_HEADER.size, 1 if extended else 0, 0),
        )
    ]
    if extended:
        out.append(_SECTION_HEADER.pack(0, 0, 0, 0, 0, 0, 0, nheaders, 0, 0))
    out.append(_PROGRAM_HEADER.pack(_PT_NOTE, 0, notes_offset, 0, 0, len(notes), len(notes), 0))
    places = _places(ranges, memory_offset)
    for virtual, physical, nbytes in loads:
        place = next(p + physical - r.address for r, p in places if _holds(r, physical))
        out.append(
            _PROGRAM_HEADER.pack(_PT_LOAD, _RWX, place, virtual, physical, nbytes, nbytes, 0)
        )
    return Core(b"".join([*out, notes]), memory_offset)


def _places(ranges: Sequence[Range], at: int) -> list[tuple[Range, int]]:
    out = []
    for r in ranges:
        out.append((r, at))
        at += r.nbytes
    return out


def _holds(r: Range, physical: int) -> bool:
    return r.address <= physical < r.address + r.nbytes


def _inside(mapping: Mapping, ranges: Sequence[Range]) -> list[tuple[int, int, int]]:
    """The parts of a mapping that are memory: (virtual, physical, nbytes)."""
    out = []
    for r in ranges:
        start = max(mapping.physical, r.address)
        end = min(mapping.physical + mapping.nbytes, r.address + r.nbytes)
        if start < end:
            out.append((mapping.virtual + start - mapping.physical, start, end - start))
    return out


def memory_offset(path: Path) -> int:
    """Return where the memory of a file begins: of a core that this module made, else at once.

    StreamError for an ELF file of another kind, ChannelError when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if head[:4] != _IDENT[:4]:
                return 0
            return _first_load(file, head)
    except OSError as error:
        raise ChannelError(f"{path}: {error.strerror or error}") from error


def _first_load(file: BinaryIO, head: bytes) -> int:
    """The second program header is that of the memory from address 0 on."""
    if len(head) == _HEADER.size:
        _, kind, machine, _, _, headers, *_ = _HEADER.unpack(head)
        if (head[:7], kind, machine) == (_IDENT[:7], _ET_CORE, _EM_X86_64):
            file.seek(min(headers, 1 << 20) + _PROGRAM_HEADER.size)
            entry = file.read(_PROGRAM_HEADER.size)
            if len(entry) == _PROGRAM_HEADER.size:
                kind, _, offset, virtual, physical, *_ = _PROGRAM_HEADER.unpack(entry)
                if (kind, virtual, physical) == (_PT_LOAD, 0, 0):
                    return int(offset)
    raise StreamError("an ELF file, but no core with memory from address 0 on", offset=0)


# ---- notes --------------------------------------------------------------------------------------


def _note(name: bytes, kind: int, payload: bytes) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    head = struct.pack("<III", len(name) + 1, len(payload), kind)
    return head + padded(name + b"\0") + padded(payload)


def _prstatus(cpu: Cpu, pid: int) -> bytes:
    """What Linux says of a thread, which is what gdb calls a vCPU."""
    r, s = cpu.registers, cpu.segments
    names = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi"
    values = [*(r[name] for name in names.split()), r["rax"], r["rip"], s["cs"].selector]
    values += [r["eflags"], r["rsp"], s["ss"].selector, s["fs"].base, s["gs"].base]
    values += [s[name].selector for name in ("ds", "es", "fs", "gs")]
    # siginfo, signal, masks; pid; its relations and times; registers; no FPU
    payload = bytes(32) + struct.pack("<I", pid) + bytes(76)
    payload += struct.pack(f"<{len(values)}Q", *values) + bytes(8)
    return _note(b"CORE", _NT_PRSTATUS, payload)


def _qemu_note(cpu: Cpu) -> bytes:
    """The vCPU as QEMU's dumps have it, with what prstatus has no place for."""
    first = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")
    order = (*first, *REGISTERS[8:], "rip", "eflags")
    body = struct.pack(f"<{len(order)}Q", *(cpu.registers[name] for name in order))
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt"):
        body += _qemu_segment(cpu.segments[name])
    body += struct.pack("<6Q", *cpu.cr, cpu.kernel_gs_base)
    return _note(b"QEMU", 0, struct.pack("<II", 1, len(body) + 8) + body)


def _qemu_segment(s: Segment) -> bytes:
    return struct.pack("<IIIIQ", s.selector, s.limit, s.flags, 0, s.base)
