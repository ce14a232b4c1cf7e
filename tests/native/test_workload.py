"""The process guest's threads under ThreadSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from native.programs import Builder, run, tool

SANITIZE = ["-O1", "-fno-omit-frame-pointer", "-pthread", "-fsanitize=thread"]


def test_workers_have_no_data_race(tmp_path: Path, builder: Builder) -> None:
    compiler = tool("gcc", "gcc")
    parts = ["bitmap", "contents", "thread", "workload"]
    program = builder(tmp_path / "workload", compiler, ["workload.c"], SANITIZE, parts=parts)
    assert run(program) == "fine\n"


RACE = """
#include <pthread.h>
static int shared;
static void *add(void *arg) { shared++; return arg; }
int main(void)
{
    pthread_t a, b;
    pthread_create(&a, 0, add, 0); pthread_create(&b, 0, add, 0);
    pthread_join(a, 0); pthread_join(b, 0);
    return 0;
}
"""


def test_the_sanitizer_finds_a_data_race(tmp_path: Path) -> None:
    (tmp_path / "race.c").write_text(RACE)
    run(tool("gcc", "gcc"), tmp_path / "race.c", *SANITIZE, "-o", tmp_path / "race")
    with pytest.raises(AssertionError, match="data race"):
        run(tmp_path / "race")
