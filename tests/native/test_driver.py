"""The kernels without Python: under sanitizers, on another CPU, against a fuzzer."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from native.programs import CACHE, KERNELS, PAGES, RECORDS, Builder, run, tool

from mig import _core

# programs with the same flags share objects
SANITIZE = [
    *["-O1", "-fno-omit-frame-pointer", "-pthread"],
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
]
RACES = ["-O1", "-fsanitize=thread", "-fno-sanitize-recover=all", "-pthread"]
CODECS = ["-lz", "-lzstd"]
DRIVER = [
    *["driver.c", "driver_bitmap.c", "driver_cache.c", "driver_records.c", "driver_xbzrle.c"],
    "simple_xbzrle.c",
]
DRIVEN = RECORDS | CACHE | {"ramdelta"}
RECEIVER = (
    PAGES | CACHE | {"adaptive", "codec", "fdio", "mappedlog", "multifd_packet", "multifd_recv"}
)
#: by program: the parts of csrc/ that are in it
FUZZED = {
    "fuzz_ramio.c": RECORDS | {"compress", "pool", "thread"},
    "fuzz_xbzrle.c": KERNELS,
    "fuzz_multifd.c": RECEIVER,
}
#: by fuzz target: its sources, and an input to begin with
TARGETS = {
    "fuzz_ramio": (
        ["fuzz_ramio.c"],
        b"\x0c"
        + b"\0\0\0\0\0\0\0\x08\x03ram"
        + b"\x5a" * 64
        + b"\0\0\0\0\0\0\0\x68"
        + b"\x5a" * 64
        + b"\0\0\0\0\0\0\0\xa2\0"
        + b"\0\0\0\0\0\0\0\x10",
    ),
    "fuzz_ramio differences": (
        ["fuzz_ramio.c"],
        b"\x0d"
        + b"\0\0\0\0\0\0\0\x40\x03ram\x01\0\x03\x05\x01A"
        + b"\0\0\0\0\0\0\0\xe0\x01\0\x06\0\x01A\x09\x01B"
        + b"\0\0\0\0\0\0\0\x22\0"
        + b"\0\0\0\0\0\0\0\x10",
    ),
    "fuzz_ramio compressed": (
        ["fuzz_ramio.c"],
        b"\x0e"
        + b"\0\0\0\0\0\0\x05\0\x03ram\0\0\0\x11"
        + zlib.compress(b"A" * 1024)
        + b"\0\0\0\0\0\0\x09\x20\0\0\0\x11"
        + zlib.compress(bytes(1024))
        + b"\0\0\0\0\0\0\0\x10",
    ),
    "fuzz_xbzrle": (
        ["fuzz_xbzrle.c", "simple_xbzrle.c"],
        b"\x0c\0\0" + b"\0\x01A" + b"\x80\x01\x02BC",
    ),
    "fuzz_multifd": (
        ["fuzz_multifd.c"],
        # zlib; two pages with contents and one without, then a SYNC
        b"\x01" + b"\x02\x02\x01\0\0\0\0\x02\x01\x02\x03AaBb" + b"\x01" + bytes(7),
    ),
    "fuzz_multifd adaptive": (
        ["fuzz_multifd.c"],
        # a page raw, one by zstd, one as a difference, and one without contents; then a SYNC
        b"\x03"
        + b"\x3e\x03\x01\0\0\0\0\x02\x01\x02\x03\x04AaBbCc\0\x02\x01\x09\x03"
        + b"\x01"
        + bytes(7),
    ),
}


def families_that_ran(output: str) -> set[str]:
    lines = [line.split(": ") for line in output.splitlines()]
    assert {name for name, _ in lines} == set(_core.kernel_names())
    return {name for name, verdict in lines if verdict == "fine"}


def test_every_kernel_at_the_end_of_its_memory(tmp_path: Path, builder: Builder) -> None:
    clang = tool("clang", "clang libclang-rt-dev")
    program = builder(tmp_path / "driver", clang, DRIVER, SANITIZE, parts=DRIVEN)
    assert families_that_ran(run(program)) == set(_core.kernel_names(usable=True))


def test_neon_kernels_on_an_emulated_cpu(tmp_path: Path, builder: Builder) -> None:
    compiler = tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    emulator = tool("qemu-aarch64-static", "qemu-user-static")
    flags = ["-O2", "-static", "-pthread"]
    program = builder(tmp_path / "driver", compiler, DRIVER, flags, parts=DRIVEN)
    assert families_that_ran(run(emulator, program)) == {"neon", "scalar"}


@pytest.mark.parametrize("flags", [RACES, SANITIZE], ids=["thread", "address,undefined"])
def test_multifd_channels_at_both_ends(tmp_path: Path, builder: Builder, flags: list[str]) -> None:
    clang = tool("clang", "clang libclang-rt-dev")
    parts = RECEIVER | {"multifd_send", "splice", "zerocopy"}
    program = builder(
        tmp_path / "multifd", clang, ["multifd.c"], flags, parts=parts, libraries=CODECS
    )
    assert run(program) == "fine\n"


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_target(tmp_path: Path, builder: Builder, target: str) -> None:
    """A few thousand inputs, so that the target cannot rot; fuzz longer by hand."""
    clang = tool("clang", "clang libclang-rt-dev")
    sources, first = TARGETS[target]
    program = builder(
        tmp_path / "fuzz",
        clang,
        sources,
        [*SANITIZE, "-fsanitize=fuzzer-no-link"],
        parts=FUZZED[sources[0]],
        libraries=CODECS,
        linked=["-fsanitize=fuzzer"],
    )
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "first").write_bytes(first)
    artifacts = f"-artifact_prefix={tmp_path}/"
    run(program, "-runs=3000", "-seed=1", "-max_len=2048", artifacts, corpus)
