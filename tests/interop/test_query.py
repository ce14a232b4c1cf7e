"""query() as QMP says it: the same keys and types as query-migrate of a real QEMU."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import numpy as np
import pytest

import mig
from mig.errors import MigError

#: bytes a second: a migration that is to stay active
CRAWL = 4096
FOREVER = 30.0
#: what QEMU has dropped since
ONLY_OLD = {"skipped"}


@pytest.fixture(scope="module", params=["7.2", "10.0"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def small(module_lab):
    """A machine whose memory is not zero though nothing has run: pages take their time."""
    path = module_lab.folder / "memory"
    spec = module_lab.spec("pc", memory_mib=32, extra=("-S",))
    path.write_bytes(np.random.default_rng(4).bytes(spec.memory_bytes))
    memory = f"memory-backend-file,id=pc.ram,mem-path={path},size={spec.memory_bytes},share=off"
    extra = ("-S", "-object", memory, "-machine", "memory-backend=pc.ram")
    return module_lab.spec("pc", memory_mib=32, extra=extra)


def wait_for(migration, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + FOREVER
    while migration.status != status:
        assert time.monotonic() < deadline, migration.status
        time.sleep(0.01)
    return migration.query().to_qmp()


@contextlib.contextmanager
def ends(migration):
    try:
        yield migration
    finally:
        migration.cancel()
        with contextlib.suppress(MigError):
            migration.wait(FOREVER)


@pytest.fixture(scope="module")
def said(module_lab, small, version) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What QEMU and mig said, by role and status: QEMU to mig, then mig to QEMU."""
    out = {}
    file = module_lab.folder / f"{version}.mig"
    source = module_lab.start(version, small)
    incoming = mig.IncomingMigration(mig.StreamCapture(file))
    theirs: dict[str, Any] = {"source none": source.query_migrate()}
    mine: dict[str, Any] = {"destination none": incoming.query().to_qmp()}
    with ends(incoming):
        incoming.listen("tcp:127.0.0.1:0")
        mine["destination setup"] = incoming.query().to_qmp()
        source.set_parameters({"max-bandwidth": CRAWL, "downtime-limit": 0})
        source.migrate(incoming.uri)
        theirs["source active"] = source.wait_migration(until=["active"])
        mine["destination active"] = wait_for(incoming, "active")
        source.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
        theirs["source completed"] = source.wait_migration()
        incoming.wait(FOREVER)
        mine["destination completed"] = incoming.query().to_qmp()

    destination = module_lab.incoming(version, small)
    theirs["destination none"] = destination.query_migrate()
    destination.migrate_incoming("tcp:127.0.0.1:0")
    theirs["destination setup"] = destination.query_migrate()
    address = theirs["destination setup"]["socket-address"][0]
    with mig.open_image(str(file)) as image:
        outgoing = mig.OutgoingMigration(image, parameters={"max-bandwidth": CRAWL})
        with ends(outgoing):
            mine["source none"] = outgoing.query().to_qmp()
            outgoing.start(f"tcp:{address['host']}:{address['port']}")
            mine["source active"] = wait_for(outgoing, "active")
            theirs["destination active"] = destination.wait_migration(until=["active"])
            outgoing.set_parameters({"max-bandwidth": 0})
            outgoing.wait(FOREVER)
            mine["source completed"] = outgoing.query().to_qmp()
    theirs["destination completed"] = destination.wait_migration()
    for name, theirs_too in theirs.items():
        out[name] = (theirs_too, json.loads(json.dumps(mine[name])))
    return out


def shape(value: object) -> object:
    """Keys and JSON types."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items() if key not in ONLY_OLD}
    if isinstance(value, list):
        return [shape(member) for member in value]
    if isinstance(value, bool) or value is None:
        return type(value)
    # QEMU writes a number that happens to be whole like an integer
    return float if isinstance(value, (int, float)) else type(value)


ROLES = ["source", "destination"]
#: all but the setup of a source, which is too short to be asked about
CASES = [(r, s) for r in ROLES for s in ("none", "setup", "active", "completed")]
CASES.remove(("source", "setup"))


@pytest.mark.parametrize(("role", "status"), CASES)
def test_keys_and_types_are_qemu_s(said, version, role, status):
    theirs, mine = said[f"{role} {status}"]
    if (version, role, status) == ("7.2", "destination", "setup"):
        # 7.2 gives no status before somebody connects
        mine.pop("status")
    assert shape(mine) == shape(theirs)
    if status == "none":
        assert mine == {}
    assert mine.get("status") == theirs.get("status")


def test_addresses_are_written_as_qemu_writes_them(said):
    theirs, mine = said["destination setup"]
    (theirs,), (mine,) = theirs["socket-address"], mine["socket-address"]
    assert {**mine, "port": ""} == {**theirs, "port": ""}


@pytest.mark.parametrize("status", ["active", "completed"])
def test_types_are_those_of_the_schema(module_lab, small, said, status):
    """Every member that is not optional is there, every integer is one."""
    qemu = module_lab.start("10.0", small)
    entities = {entity["name"]: entity for entity in qemu.command("query-qmp-schema")}
    qemu.close()

    def check(value: object, name: str, where: str) -> None:
        entity = entities[name]
        kind = entity["meta-type"]
        if kind == "builtin":
            types = {"int": int, "number": (int, float), "string": str, "boolean": bool}
            assert isinstance(value, types[entity["json-type"]]), where
        elif kind == "enum":
            assert value in [member["name"] for member in entity["members"]], where
        elif kind == "array":
            for i, member in enumerate(value):
                check(member, entity["element-type"], f"{where}[{i}]")
        else:
            members = {member["name"]: member for member in entity["members"]}
            for variant in entity.get("variants", []):
                if variant["case"] == value[entity["tag"]]:
                    more = entities[variant["type"]]["members"]
                    members |= {member["name"]: member for member in more}
            assert set(value) <= set(members), where
            assert {n for n, m in members.items() if "default" not in m} <= set(value), where
            for key, member in value.items():
                check(member, members[key]["type"], f"{where}.{key}")

    for role in ROLES:
        check(said[f"{role} {status}"][1], entities["query-migrate"]["ret-type"], role)


def test_what_both_count_is_the_same(said):
    """mig sends what it was sent: the memory in the block list is that of the machine."""
    theirs, mine = said["source completed"]
    for name in ("total", "page-size", "remaining"):
        assert theirs["ram"][name] == mine["ram"][name]


def nobody(folder) -> str:
    """The URI of a socket that nobody listens on."""
    path = str(folder / "nobody")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    return f"unix:{path}"


def test_a_source_that_failed_says_what_qemu_says(module_lab, small, version, tmp_path):
    qemu, uri = module_lab.start(version, small), nobody(tmp_path)
    qemu.migrate(uri)
    theirs = qemu.wait_migration()
    outgoing = mig.OutgoingMigration(mig.MemoryGuest("pc", mig.GuestMemory()))
    outgoing.start(uri)
    with pytest.raises(MigError):
        outgoing.wait(FOREVER)
    assert shape(outgoing.query().to_qmp()) == shape(theirs) == {"status": str, "error-desc": str}


def test_a_source_that_was_cancelled_says_what_qemu_says(module_lab, small, version):
    qemu = module_lab.start(version, small)
    qemu.set_parameters({"max-bandwidth": CRAWL, "downtime-limit": 0})
    qemu.migrate("exec:cat > /dev/null")
    qemu.wait_migration(until=["active"])
    qemu.command("migrate_cancel")
    theirs = qemu.wait_migration()
    memory = mig.GuestMemory()
    memory.add("pc.ram", 1 << 20)
    memory["pc.ram"].view[::4096] = bytes([1]) * 256
    guest = mig.MemoryGuest("pc", memory)
    outgoing = mig.OutgoingMigration(guest, parameters={"max-bandwidth": 1})
    with ends(outgoing):
        outgoing.start("exec:cat > /dev/null")
        wait_for(outgoing, "active")
    assert outgoing.query().to_qmp() == theirs == {"status": "cancelled"}


def test_a_destination_that_failed_says_what_qemu_says(module_lab, small, tmp_path):
    """10.0 only: the old one cannot be told to outlive its failure."""
    qemu = module_lab.incoming("10.0", small)
    path = str(tmp_path / "in")
    qemu.command("migrate-incoming", uri=f"unix:{path}", exit_on_error=False)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(path)
        stranger.sendall(b"nonsense" * 100)
        theirs = qemu.wait_migration()
    incoming = mig.IncomingMigration(mig.StreamCapture(tmp_path / "vm.mig"))
    incoming.listen(f"unix:{path}2")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(f"{path}2")
        stranger.sendall(b"nonsense" * 100)
        with pytest.raises(MigError):
            incoming.wait(FOREVER)
    assert shape(incoming.query().to_qmp()) == shape(theirs) == {"status": str, "error-desc": str}
