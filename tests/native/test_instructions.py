"""Instructions that a kernel takes: what a change costs, where the clock says nothing.

Counted by Callgrind, which does not know AVX-512, in what gcc makes of the sources as setup.py
compiles them. When a kernel got better, put the new counts here: the failing test prints them.
"""

from __future__ import annotations

import re
from pathlib import Path

from native.programs import build, run, tool

FAMILIES = ["avx2", "sse2", "scalar"]
#: other compilers than gcc 12 do it a little otherwise
MARGIN = 1.5
#: instructions of each of FAMILIES for one page of 4 KiB, one word of a bitmap ("bits-none",
#: "popcount", "merge", "combine"), one set bit or one run
COUNTS = {
    "zero-page": [404, 551, 893],
    "random-page": [27.3, 27.3, 27.3],
    "bits-none": [0.794, 1.07, 1.44],
    "bits-1%": [61.4, 35, 37],
    "runs-1%": [59.8, 46.2, 46.2],
    "bits-50%": [6.66, 9.6, 9.64],
    "runs-50%": [13.2, 19.3, 19.3],
    "popcount": [2.65, 9.52, 28],
    "merge": [3.77, 12, 34],
    "combine": [1.52, 3.52, 3.52],
    "encode-same": [704, 1404, 1407],
    "encode-sparse": [2327, 3461, 4074],
    "decode-sparse": [653, 653, 653],
    "encode-10%": [21910, 26714, 31676],
    "decode-10%": [12279, 12279, 12279],
    "encode-replaced": [1629, 4160, 11180],
    "cache-hit": [745, 1436, 1453],
    "lookup": [25.2, 25.2, 25.2],
}


def counted(folder: Path) -> dict[str, dict[str, float]]:
    """Read Callgrind's dumps; return the instructions of a unit by workload and family."""
    counts: dict[str, dict[str, float]] = {}
    for file in folder.glob("counts.*"):
        text = file.read_text()
        named = re.search(r"^desc: Trigger: Client Request: (\S+) (\S+) (\d+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        assert named, text[:500]
        assert total, text[-500:]
        family, workload, units = named.groups()
        counts.setdefault(workload, {})[family] = int(total[1]) / int(units)
    return counts


def test_no_kernel_takes_more_instructions_than_it_did(tmp_path: Path) -> None:
    valgrind = tool("valgrind", "valgrind")
    program = build(tmp_path / "program", tool("gcc", "gcc"), ["instructions.c"], ["-O3"])
    out = f"--callgrind-out-file={tmp_path}/counts"
    run(valgrind, "-q", "--tool=callgrind", out, program, *FAMILIES)
    (tmp_path / "counts").unlink()
    counts = {
        workload: [round(counts[family], 2) for family in FAMILIES]
        for workload, counts in counted(tmp_path).items()
    }
    assert counts.keys() == COUNTS.keys()
    print(counts)
    for workload, recorded in COUNTS.items():
        for family, now, before in zip(FAMILIES, counts[workload], recorded, strict=True):
            assert now <= MARGIN * before, f"{workload}, {family}: {now}, was {before}"
