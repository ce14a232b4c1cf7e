"""A VM in one format after the other, until a QEMU goes on with it; its memory read by gdb."""

from __future__ import annotations

import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest


def started(lab, version, spec, file, kind):
    """Return a QEMU that goes on from the file."""
    if kind == "stream":
        return lab.incoming(version, spec, f"exec:cat {file}")
    qemu = lab.incoming(version, spec)
    qemu.set_capabilities({"mapped-ram": True})
    qemu.migrate_incoming(f"file:{file}")
    return qemu


@pytest.fixture
def kept(lab):
    """Return what makes a source, and the file that it was received into."""

    def make(version, spec, kind="mapped-ram", *, fresh=False):
        source = lab.boot(version, spec, fresh=fresh)
        file = lab.path("vm.mig")
        uri = f"unix:{lab.path('in')}"
        lab.receive(source, file, uri, return_path=True, options=("--format", kind))
        return source, file

    return make


@pytest.mark.parametrize(
    ("version", "kinds"),
    [
        ("10.0", ["mapped-ram", "stream"]),
        ("10.0", ["stream", "mapped-ram"]),
        ("7.2", ["mapped-ram", "stream"]),
        ("10.0", ["mapped-ram", "stream", "stream", "mapped-ram", "mapped-ram"]),
    ],
)
def test_files_that_hold_a_vm(lab, kept, assert_goes_on, version, kinds):
    spec = lab.spec("q35")
    source, file = kept(version, spec, kinds[0])
    for number, kind in enumerate(kinds[1:]):
        out = lab.path(f"out-{number}")
        result = lab.mig("convert", file, out, "--format", kind, "--json").result()
        assert result["format"] == kind
        file = out
    assert_goes_on(source, started(lab, version, spec, file, kinds[-1]))


@pytest.mark.parametrize("kind", ["raw", "elf"])
@pytest.mark.parametrize("back", ["mapped-ram", "stream"])
def test_memory_alone_and_back(lab, kept, assert_goes_on, kind, back):
    spec = lab.spec("pc")
    source, file = kept("10.0", spec)
    memory, out, empty = lab.path("memory"), lab.path("out"), lab.path("empty")
    lab.mig("convert", file, memory, "--format", kind, "--json").result()
    # the way back has nothing of the memory but what is in the file
    zeros = lab.path("zeros")
    with Path(zeros).open("wb") as wiped:
        wiped.truncate(spec.memory_bytes)
    command = ("convert", file, empty, "--format", "mapped-ram", "--memory", zeros, "--json")
    lab.mig(*command).result()
    lab.mig("convert", empty, out, "--format", back, "--memory", memory, "--json").result()
    assert_goes_on(source, started(lab, "10.0", spec, out, back))


def test_a_stream_with_differences_is_laid_down_anew(lab, assert_goes_on, start_migration):
    """QEMU itself wrote it, of a guest that went on writing: pages come again, as XBZRLE."""
    spec = lab.spec("pc", "dirty")
    source = lab.boot("10.0", spec)
    file, out, raw = lab.path("qemu.stream"), lab.path("out"), lab.path("raw")
    source.set_capabilities({"xbzrle": True})
    source.set_parameters({"max-bandwidth": 64 << 20})
    start_migration(source, f"exec:cat > {file}")
    assert source.wait_migration()["status"] == "completed"
    assert lab.mig("convert", file, out, "--format", "mapped-ram").finish() == 0
    assert lab.mig("convert", file, raw, "--format", "raw").finish() == 0
    assert_goes_on(source, started(lab, "10.0", spec, out, "mapped-ram"))


# ---- ELF ----------------------------------------------------------------------------------------


def loads(core):
    """The PT_LOADs: (offset, virtual, physical, length)."""
    count = struct.unpack_from("<H", core, 56)[0]
    headers = (struct.unpack_from("<IIQQQQQQ", core, 64 + 56 * i) for i in range(count))
    return [(h[2], h[3], h[4], h[5]) for h in headers if h[0] == 1]


def gdb(core, *commands):
    asked = [word for command in commands for word in ("-ex", command)]
    run = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", f"core-file {core}", *asked],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return run.stdout


@pytest.mark.parametrize(("version", "machine"), [("7.2", "pc"), ("10.0", "q35")])
def test_gdb_reads_the_kernel(lab, kept, version, machine):
    """linux_banner, where the kernel has it mapped, and the same where QEMU itself finds it."""
    spec = lab.spec(machine, extra=("-smp", "2"))
    _, file = kept(version, spec, fresh=True)
    core = Path(lab.path("core"))
    assert lab.mig("convert", file, str(core), "--format", "elf").finish() == 0
    data = core.read_bytes()
    kernel = [load for load in loads(data) if load[1] >= 0xFFFFFFFF80000000]
    banner = b"Linux version "
    found = [
        virtual + match.start() - offset
        for match in re.finditer(re.escape(banner), data)
        for offset, virtual, _, length in kernel
        if offset <= match.start() < offset + length
    ]
    assert found

    there = lab.incoming(version, replace(spec, extra=(*spec.extra, "-S")))
    there.migrate_incoming(f"unix:{lab.path('out')}")
    assert lab.mig("send", file, f"unix:{lab.path('out')}").finish() == 0
    for address in found:
        said = gdb(core, f"x/s {address:#x}")
        assert '"Linux version ' in said
        monitor = there.command(
            "human-monitor-command", **{"command-line": f"x /{len(banner)}xb {address:#x}"}
        )
        bytes_there = re.findall(r"0x([0-9a-f]{2})\b", monitor)
        assert bytes.fromhex("".join(bytes_there)) == banner
    # registers, of both vCPUs, as QEMU has them
    theirs = there.command("human-monitor-command", **{"command-line": "info registers -a"})
    rips = [int(rip, 16) for rip in re.findall(r"RIP=([0-9a-f]+)", theirs)]
    mine = gdb(core, "thread apply all info registers rip")
    assert sorted(int(rip, 16) for rip in re.findall(r"rip\s+0x([0-9a-f]+)", mine)) == sorted(rips)
    assert len(rips) == 2
    # physical memory is at its own addresses
    assert loads(data)[0][1:] == (0, 0, spec.memory_bytes)


def test_memory_on_both_sides_of_4_gib(lab, kept):
    """A guest of 5 GiB: the hole is where the machine has it."""
    spec = lab.spec("q35", memory_mib=5 << 10)
    _, file = kept("10.0", spec, fresh=True)
    core = Path(lab.path("core"))
    assert lab.mig("convert", file, str(core), "--format", "elf").finish() == 0
    with core.open("rb") as start:
        physical = [load for load in loads(start.read(1 << 20)) if load[1] == load[2]]
    assert [load[2:] for load in physical] == [
        (0, 2 << 30),
        (4 << 30, spec.memory_bytes - (2 << 30)),
    ]
