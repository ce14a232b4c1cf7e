"""QEMU's background snapshots: kept, looked at, and run again by another QEMU."""

from __future__ import annotations

import pytest

import mig
from mig import GuestMemory, IncomingMigration, open_image

FOREVER = 60.0
VERSIONS = ["7.2", "10.0"]


class Keeper:
    """A destination in memory: whatever QEMU sends of RAM; devices as they come."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.loading: list[tuple[mig.Pages, mig.Bitmap]] = []
        self.configuration = None
        self.devices = None
        self.records = 0

    def configure(self, configuration) -> None:
        self.configuration = configuration

    def open_blocks(self, blocks, page_size) -> None:
        for block in blocks:
            pages = self.memory.add(block.idstr, block.used_length).pages
            self.loading.append((pages, mig.Bitmap(pages.npages)))

    def ram_started(self, section_id, footers) -> None:
        assert footers

    def put(self, parser, data, start) -> None:
        # the devices come after all of memory
        assert self.devices is None
        self.records += parser.npages
        parser.place(data, start, *self.loading[parser.current], True)

    def switchover_started(self) -> None:
        raise AssertionError("a background snapshot has no switchover")

    def load_devices(self, state) -> None:
        self.devices = state

    def commit(self) -> None:
        pass

    def abort(self) -> None:
        raise AssertionError("it came to an end too early")


def begin(source, uri) -> None:
    source.set_capabilities({"background-snapshot": True})
    source.set_parameters({"max-bandwidth": 0})
    source.migrate(uri)


def completed(source) -> None:
    """The snapshot is there, and the guest ran on."""
    assert source.wait_migration()["status"] == "completed"
    assert source.status() == "running"
    source.wait_ticks(3)
    assert source.bad_pages() == 0


def resumes(lab, version, spec, file, last) -> None:
    """The guest in the file goes on from the pause, which was before tick `last`."""
    destination = lab.incoming(version, spec)
    uri = f"unix:{lab.path('out')}"
    destination.migrate_incoming(uri)
    assert lab.mig("send", file, uri, "--json").result()["status"] == "completed"
    destination.wait_status("running")
    destination.wait_ticks(6)
    assert destination.bad_pages() == 0
    numbers = [tick.number for tick in destination.ticks()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[0] <= last


@pytest.mark.parametrize("version", VERSIONS)
def test_a_background_snapshot_is_kept_and_runs_again(lab, version):
    spec = lab.spec("pc", "dirty", dirty_kib=16384, fill_mib=48)
    source = lab.boot(version, spec, fresh=True)
    file = lab.path("vm.mig")
    command = lab.mig("receive", f"unix:{lab.path('in')}", file, "--json")
    uri = command.wait_listening()
    begin(source, uri)
    result = command.result()
    last = source.ticks()[-1].number + 2
    completed(source)
    assert result["status"] == "completed"
    with open_image(file) as image:
        blocks = {block.idstr: block for block in image.blocks}
        assert blocks["pc.ram"].missing == 0
        # each page came once
        assert result["ram"]["normal"] + result["ram"]["duplicate"] == sum(
            block.data + block.zero for block in blocks.values()
        )
    source.close()
    resumes(lab, version, spec, file, last)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_background_snapshot_comes_into_memory(lab, version):
    source = lab.boot(version, lab.spec("pc", "dirty"))
    keeper = Keeper()
    incoming = IncomingMigration(keeper)
    incoming.listen(f"unix:{lab.path('in')}")
    begin(source, f"unix:{lab.path('in')}")
    assert incoming.wait(FOREVER)
    completed(source)
    assert keeper.records == sum(block.pages.npages for block in keeper.memory)
    assert {section.idstr for section in keeper.devices.sections} >= {"timer", "cpu", "serial"}


def test_a_background_snapshot_in_a_file_of_qemu_runs_again(lab):
    spec = lab.spec("pc", "dirty", dirty_kib=16384)
    source = lab.boot("10.0", spec, fresh=True)
    stream = lab.path("stream")
    begin(source, f"file:{stream}")
    completed(source)
    last = source.ticks()[-1].number
    source.close()
    assert lab.mig("info", stream, "--json").result()["devices"]
    resumes(lab, "10.0", spec, stream, last)
