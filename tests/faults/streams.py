"""Small guests, the streams that mig makes of them, and streams field by field to be broken."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import mig
from mig.errors import MigError

PAGE = 1024
MACHINE = "fault-box"
#: block → its pages, one fill byte each; 0 is a zero page
RAM = {"pc.ram": bytes([0x11, 0, 0x22, 0]), "vga.vram": bytes([0, 0x33])}
DEVICES = {"timer": b"\x01\x02\x03\x04", "serial": bytes(range(32)), "nothing": b""}

# limits that the streams are pushed past, by the number and not by mig's name for it
MACHINE_LIMIT = 255
CAPABILITY_LIMIT = 256
DESCRIPTION_LIMIT = 64 << 20
RAM_LIMIT = 1 << 44

ZERO, MEM_SIZE, PAGE_FLAG, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
START, PART, END, FULL, SUBSECTION, VMDESCRIPTION, CONFIGURATION, COMMAND, FOOTER = (
    *(1, 2, 3, 4, 5, 6, 7, 8),
    0x7E,
)
RAM_ID = 1


def be16(value: int) -> bytes:
    return struct.pack(">H", value)


def be32(value: int) -> bytes:
    return struct.pack(">I", value)


def be64(value: int) -> bytes:
    return struct.pack(">Q", value)


def counted(name: str | bytes) -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    return bytes([len(raw)]) + raw


def footer(section_id: int = RAM_ID) -> bytes:
    return bytes([FOOTER]) + be32(section_id)


def command(number: int, data: bytes = b"") -> bytes:
    return bytes([COMMAND]) + be16(number) + be16(len(data)) + data


def part(payload: bytes, section_id: int = RAM_ID, kind: int = PART) -> bytes:
    """A PART (or END) section of RAM around ``payload``, which lacks only its EOS."""
    return bytes([kind]) + be32(section_id) + payload + be64(EOS) + footer(section_id)


def description(text: object) -> bytes:
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return bytes([VMDESCRIPTION]) + be32(len(raw)) + raw


# ---- guests ----------------------------------------------------------------------------------


class Guest:
    """A MemoryGuest that remembers what was done to it."""

    def __init__(
        self,
        ram: Mapping[str, bytes] = RAM,
        devices: Mapping[str, bytes] = DEVICES,
        *,
        empty: bool = False,
        dirty: bool = False,
    ) -> None:
        self.memory = mig.GuestMemory(PAGE)
        self.stops = 0
        self.resumes = 0
        self.loaded: dict[str, bytes] = {}
        for name, fills in ram.items():
            block = self.memory.add(name, len(fills) * PAGE)
            if not empty:
                block.view[:] = b"".join(bytes([fill]) * PAGE for fill in fills)
        registry = mig.DeviceRegistry()
        for name, payload in devices.items():
            registry.register(name, save=self._saver(payload), load=self._loader(name))
        self.log = mig.SharedDirtyLog({n: len(f) for n, f in ram.items()}) if dirty else None
        self.guest = mig.MemoryGuest(
            MACHINE,
            self.memory,
            registry,
            dirty=self.log,
            on_stop=self._stop,
            on_resume=self._resume,
        )

    @staticmethod
    def _saver(payload: bytes):
        return lambda: payload

    def _loader(self, name: str):
        def load(payload: bytes, version_id: int) -> None:
            self.loaded[name] = payload

        return load

    def _stop(self) -> None:
        self.stops += 1

    def _resume(self) -> None:
        self.resumes += 1

    def contents(self) -> dict[str, bytes]:
        return {block.idstr: bytes(block.view) for block in self.memory}

    def close(self) -> None:
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stream_of(guest: Guest, path: Path) -> bytes:
    """The stream that mig sends of ``guest``."""
    out = mig.OutgoingMigration(guest.guest, parameters={"max-bandwidth": 0})
    out.start(f"file:{path}")
    assert out.wait(30)
    return path.read_bytes()


# ---- a stream in named pieces ------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """A stream as (label, bytes), in wire order; labels are unique."""

    fields: tuple[tuple[str, bytes], ...]

    def encode(self) -> bytes:
        return b"".join(data for _, data in self.fields)

    def __getitem__(self, label: str) -> bytes:
        return dict(self.fields)[label]

    def offset(self, label: str) -> int:
        at = 0
        for name, data in self.fields:
            if name == label:
                return at
            at += len(data)
        raise KeyError(label)

    def end(self, label: str) -> int:
        return self.offset(label) + len(self[label])

    def put(self, label: str, data: bytes) -> Pieces:
        self[label]
        return replace(self, fields=tuple((n, data if n == label else d) for n, d in self.fields))

    def before(self, label: str, data: bytes) -> Pieces:
        """Insert ``data`` as piece "new"."""
        self[label]
        out: list[tuple[str, bytes]] = []
        for name, old in self.fields:
            if name == label:
                out.append(("new", data))
            out.append((name, old))
        return replace(self, fields=tuple(out))


def sample() -> Pieces:
    """What mig sends of ``Guest()``; test_streams compares the two byte by byte."""
    total = sum(len(fills) for fills in RAM.values()) * PAGE
    out: list[tuple[str, bytes]] = [
        ("magic", b"QEVM"),
        ("version", be32(3)),
        ("configuration", bytes([CONFIGURATION])),
        ("machine length", be32(len(MACHINE))),
        ("machine", MACHINE.encode()),
        ("subsection", bytes([SUBSECTION])),
        ("subsection name length", bytes([len("configuration/target-page-bits")])),
        ("subsection name", b"configuration/target-page-bits"),
        ("subsection version", be32(1)),
        ("page bits", be32(PAGE.bit_length() - 1)),
        ("start", bytes([START])),
        ("start id", be32(RAM_ID)),
        ("start name length", b"\x03"),
        ("start name", b"ram"),
        ("start instance", be32(0)),
        ("start version", be32(4)),
        ("total", be64(total | MEM_SIZE)),
    ]
    for name, fills in RAM.items():
        out += [
            (f"{name} name length", bytes([len(name)])),
            (f"{name} name", name.encode()),
            (f"{name} length", be64(len(fills) * PAGE)),
        ]
    out += [("list eos", be64(EOS)), ("start footer", b"\x7e"), ("start footer id", be32(RAM_ID))]
    for name, fills in RAM.items():
        out += [(f"{name} part", bytes([PART])), (f"{name} part id", be32(RAM_ID))]
        for i, fill in enumerate(fills):
            flag = (PAGE_FLAG if fill else ZERO) | (CONTINUE if i else 0)
            out.append((f"{name} {i} word", be64(i * PAGE | flag)))
            if i == 0:
                out.append((f"{name} record name length", bytes([len(name)])))
                out.append((f"{name} record name", name.encode()))
            out.append((f"{name} {i} data", bytes([fill]) * (PAGE if fill else 1)))
        out += [
            (f"{name} eos", be64(EOS)),
            (f"{name} footer", b"\x7e"),
            (f"{name} footer id", be32(RAM_ID)),
        ]
    out += [
        ("end", bytes([END])),
        ("end id", be32(RAM_ID)),
        ("end eos", be64(EOS)),
        ("end footer", b"\x7e"),
        ("end footer id", be32(RAM_ID)),
    ]
    for number, (name, payload) in enumerate(DEVICES.items(), RAM_ID + 1):
        out += [
            (f"{name} section", bytes([FULL])),
            (f"{name} id", be32(number)),
            (f"{name} name length", bytes([len(name)])),
            (f"{name} name", name.encode()),
            (f"{name} instance", be32(0)),
            (f"{name} version", be32(1)),
            (f"{name} payload", payload),
            (f"{name} footer", b"\x7e"),
            (f"{name} footer id", be32(number)),
        ]
    text = json.dumps(described(DEVICES)).encode()
    out += [
        ("eof", b"\x00"),
        ("description", bytes([VMDESCRIPTION])),
        ("description length", be32(len(text))),
        ("description text", text),
    ]
    return Pieces(tuple(out))


def described(devices: Mapping[str, bytes]) -> dict[str, object]:
    return {
        "configuration": {"vmsd_name": "configuration", "version": 1, "fields": []},
        "page_size": PAGE,
        "devices": [
            {
                "name": name,
                "instance_id": 0,
                "version": 1,
                "size": len(payload),
                "fields": [{"name": "data", "size": len(payload), "type": "buffer"}],
            }
            for name, payload in devices.items()
        ],
    }


def with_return_path(pieces: Pieces) -> Pieces:
    """The stream of a source that has opened its return path and sent PING 1."""
    return pieces.before("start", command(1) + command(2, be32(1)))


# ---- loading them -------------------------------------------------------------------------------


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    left, right = socket.socketpair()
    try:
        yield left, right
    finally:
        left.close()
        right.close()


def outcome(migration: mig.IncomingMigration | mig.OutgoingMigration) -> MigError | None:
    """Wait for the end; the error, None for success. Half a minute without an end is a hang."""
    try:
        assert migration.wait(30), "the migration hangs"
    except MigError as error:
        return error
    return None


def image_error(path: Path) -> MigError | None:
    """What mig says of the stream in ``path``, None when it is in order."""
    try:
        mig.StreamImage(path).close()
    except MigError as error:
        return error
    return None


def receive(data: bytes, path: Path, **parameters: float) -> MigError | None:
    """Let mig capture ``data``, which comes over a socket whose other end then closes."""
    with pair() as (mine, theirs):
        migration = mig.IncomingMigration(
            mig.StreamCapture(path),
            parameters={name.replace("_", "-"): value for name, value in parameters.items()},
        )
        migration.listen(f"fd:{theirs.fileno()}")
        feeder = threading.Thread(target=feed, args=(mine, data))
        feeder.start()
        try:
            return outcome(migration)
        finally:
            mine.close()
            theirs.close()
            feeder.join(30)


def feed(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # a loader that refuses may close before it has read everything


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they are."""
    out = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            out[int(link.name)] = str(link.readlink())
        except FileNotFoundError:
            continue  # the listing's own
    return out


def mig_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("mig-")]
