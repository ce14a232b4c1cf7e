"""csrc/uffdtimes.c against the definition of postcopy-blocktime."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import pytest
from reference.blocktime import Blocktime

CSRC = Path(__file__).parents[2] / "csrc"
#: of the program that the numbers are read by: threads are 100 and up, 0 stands for none
THREAD = 100
PROGRAM = """
#include "uffd.h"
static struct mig_waits w;
void vcpus(const uint32_t *threads, size_t n) { mig_waits_vcpus(&w, threads, n); }
void begin(uint64_t address, uint32_t thread, int64_t now)
{
    mig_waits_begin(&w, address, thread, now);
}
void end(uint64_t address, int64_t now) { mig_waits_end(&w, address, now); }
int64_t blocked(size_t i) { return w.blocked[i]; }
int64_t overlap(void) { return w.all_blocked; }
uint64_t count(void)
{
    uint64_t n = 0;
    for (size_t i = 0; i < MIG_UFFD_BUCKETS; i++) {
        n += w.bucket[i];
    }
    return n;
}
size_t bucket(uint64_t us) { return mig_waits_bucket(us); }
uint64_t limit(size_t i) { return mig_waits_limit(i); }
"""


@pytest.fixture
def waits(tmp_path):
    source, library = tmp_path / "waits.c", tmp_path / "waits.so"
    source.write_text(PROGRAM)
    options = ["-std=gnu11", "-D_GNU_SOURCE", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run(
        ["gcc", *options, source, CSRC / "uffdtimes.c", "-o", library], check=True, timeout=60
    )
    found = ctypes.CDLL(str(library))
    found.begin.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int64]
    found.end.argtypes = [ctypes.c_uint64, ctypes.c_int64]
    for name in ("blocked", "overlap", "count", "bucket", "limit"):
        getattr(found, name).restype = ctypes.c_int64
    found.bucket.argtypes = [ctypes.c_uint64]
    return found


def set_vcpus(waits, threads) -> None:
    waits.vcpus((ctypes.c_uint32 * len(threads))(*threads), ctypes.c_size_t(len(threads)))


@pytest.mark.parametrize("known", [True, False], ids=["by thread", "as they come"])
@pytest.mark.parametrize("nvcpus", [1, 2, 3, 7])
def test_block_times_are_those_of_the_definition(waits, nvcpus, known):
    rng = random.Random(nvcpus)
    mine, now, numbers, ended = Blocktime(nvcpus), 0, {}, 0
    threads = [THREAD + vcpu for vcpu in range(nvcpus)]
    set_vcpus(waits, threads if known else [0] * nvcpus)
    if known:
        numbers = {thread: vcpu for vcpu, thread in enumerate(threads)}
    pages = [1 << 12, 2 << 12, 3 << 12]
    others: dict[int, int] = {}
    for _ in range(3000):
        now += rng.randrange(1, 1000)
        thread = rng.choice(threads)
        vcpu = numbers.get(thread, len(numbers))
        if rng.random() < 0.6 and vcpu not in mine.waiting:
            numbers[thread] = vcpu
            page = rng.choice(pages)
            mine.begin(vcpu, page, now)
            waits.begin(page, thread, now)
        elif known and rng.random() < 0.1 and len(others) < 5:
            # a thread that is no vCPU
            stranger = 1000 + rng.randrange(10**6)
            others[stranger] = rng.choice(pages)
            waits.begin(others[stranger], stranger, now)
        else:
            page = rng.choice(pages)
            ended += sum(a == page for a in (*mine.waiting.values(), *others.values()))
            others = {t: a for t, a in others.items() if a != page}
            mine.end(page, now)
            waits.end(page, now)
    # whoever still waits is counted when the wait ends
    for page in pages:
        ended += sum(a == page for a in (*mine.waiting.values(), *others.values()))
        now += 1
        mine.end(page, now)
        waits.end(page, now)
    assert [waits.blocked(vcpu) for vcpu in range(nvcpus)] == mine.vcpus
    assert waits.overlap() == mine.overlap > 0
    assert waits.count() == ended


def test_classes_of_latencies_follow_each_other(waits):
    before = 0
    for number in range(120):
        limit = waits.limit(number)
        assert limit > before
        assert waits.bucket(before) == waits.bucket(limit - 1) == number
        # no wider than a quarter of what is in it
        assert number < 4 or (limit - before) * 4 <= limit
        before = limit
