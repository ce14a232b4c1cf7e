"""Compression threads with QEMU 7.2 at the other end, which has them (9.1 has not)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import mig

RAM = "pc.ram"
FOREVER = 120.0


def backed(spec, path: str):
    """The machine with its RAM in a file that can be read from outside."""
    memory = f"memory-backend-file,id={RAM},mem-path={path},size={spec.memory_bytes},share=on"
    return replace(spec, extra=("-object", memory, "-machine", f"memory-backend={RAM}"))


@pytest.fixture(scope="module")
def captured(module_lab):
    """A guest that 7.2 sent compressed, in a file; and what 7.2 said about it."""
    lab = module_lab
    spec = lab.spec("pc", pattern="sparse")
    source = lab.boot("7.2", backed(spec, lab.path("ram")), fresh=True)
    source.set_capabilities({"compress": True})
    # with 7.2's own throttle the two threads have something to do all the time
    source.set_parameters({"compress-threads": 2, "compress-level": 1})
    file = lab.path("vm.mig")
    lab.receive(source, file, f"unix:{lab.path('in')}", return_path=True)
    said = source.query_migrate()
    return spec, source, file, said


def test_what_a_qemu_compresses_is_kept_plain(module_lab, captured):
    _, _, file, said = captured
    assert said["compression"]["pages"] > 3000
    sent = np.fromfile(module_lab.path("ram"), np.uint8).reshape(-1, 4096)
    with mig.open_image(file) as image:
        for i, page in enumerate(sent):
            assert image.page(RAM, i) == page.tobytes(), i


@pytest.mark.parametrize("wait", ["on", "off"])
def test_a_qemu_takes_what_mig_compresses(module_lab, captured, assert_goes_on, wait):
    spec, source, file, said = captured
    lab = module_lab
    destination = lab.incoming("7.2", backed(spec, lab.path(f"ram-{wait}")))
    destination.set_capabilities({"compress": True})
    uri = f"unix:{lab.path(f'out-{wait}')}"
    destination.migrate_incoming(uri)
    with mig.open_image(file) as image:
        outgoing = mig.OutgoingMigration(
            image,
            capabilities={"compress", "return-path"},
            parameters={"compress-wait-thread": wait, "compress-threads": 2, "max-bandwidth": 0},
        )
        outgoing.start(uri)
        outgoing.wait(FOREVER)
    mine = json.loads(json.dumps(outgoing.query().to_qmp()["compression"]))
    assert mine.keys() == said["compression"].keys()
    assert mine["pages"] > (3000 if wait == "on" else 0)
    assert_goes_on(source, destination)
    assert destination.bad_pages() == 0
    destination.close()
