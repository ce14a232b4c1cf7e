"""What a running target QEMU says of itself, over QMP."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Any, Final

from mig.errors import ChannelError, MigError
from mig.selftest.errors import SelftestError
from mig.selftest.qmp import QmpCommandError, QmpConnection

#: seconds for an answer
_TIMEOUT: Final = 20.0
# name, page size, offset, used, total, ...
_RAM_BLOCK = re.compile(r"^\s*(\S+)\s+\d+ [KMG]iB\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+(0x[0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class TargetBlock:
    """A RAM block: its length in bytes, and the most that it can be resized to."""

    used_length: int
    max_length: int


@dataclass(frozen=True, slots=True)
class Target:
    """A QEMU. What it does not tell is None.

    machine:      resolved machine type
    machines:     all that it knows, aliases included
    pci:          places of its PCI devices, as sections have them: ``0000:00:02.0``
    capabilities: those that are on
    """

    version: str
    machine: str | None
    machines: frozenset[str]
    blocks: dict[str, TargetBlock] | None
    ncpus: int | None
    pci: frozenset[str] | None
    capabilities: frozenset[str]

    @classmethod
    def ask(cls, address: str) -> Target:
        """Connect to a QMP socket, a path or HOST:PORT, and ask; ChannelError, MigError."""
        try:
            connection = QmpConnection(_connect(address), _TIMEOUT)
        except SelftestError as error:
            raise ChannelError(f"{address}: {error}") from error
        try:
            return cls._of(connection)
        except SelftestError as error:
            raise ChannelError(f"{address}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MigError(f"{address}: an answer that is not QEMU's: {error!r}") from error
        finally:
            connection.close()

    @classmethod
    def _of(cls, connection: QmpConnection) -> Target:
        def ask(command: str, **arguments: object) -> Any:
            return connection.execute(command, arguments)

        number = ask("query-version")["qemu"]
        machines = ask("query-machines")
        aliases = {m["alias"] for m in machines if "alias" in m}
        capabilities = ask("query-migrate-capabilities")
        return cls(
            ".".join(str(number[key]) for key in ("major", "minor", "micro")),
            _maybe(lambda: _machine(ask("qom-get", path="/machine", property="type"))),
            frozenset({m["name"] for m in machines} | aliases),
            _maybe(lambda: _blocks(_monitor(ask, "info ramblock"))),
            _maybe(lambda: len(ask("query-cpus-fast"))),
            _maybe(lambda: _pci(ask("query-pci"))),
            frozenset(c["capability"] for c in capabilities if c["state"]),
        )


def _maybe(ask: Any) -> Any:
    """What QEMU answers, None where it cannot."""
    try:
        return ask()
    except QmpCommandError:
        return None


def _monitor(ask: Any, command: str) -> str:
    return str(ask("human-monitor-command", **{"command-line": command}))


def _connect(address: str) -> socket.socket:
    host, colon, port = address.removeprefix("tcp:").rpartition(":")
    try:
        if colon and port.isdecimal() and "/" not in address and not address.startswith("unix:"):
            return socket.create_connection((host, int(port)), _TIMEOUT)
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(address.removeprefix("unix:"))
    except (OSError, OverflowError) as error:
        raise ChannelError(f"{address}: {error}") from error
    return connected


def _machine(qom_type: str) -> str:
    """``pc-i440fx-7.2-machine`` is the machine type pc-i440fx-7.2."""
    return qom_type.removesuffix("-machine")


def _blocks(text: str) -> dict[str, TargetBlock] | None:
    found = {}
    for line in text.splitlines():
        if match := _RAM_BLOCK.match(line):
            found[match[1]] = TargetBlock(int(match[2], 16), int(match[3], 16))
    return found or None


def _pci(buses: list[dict[str, Any]]) -> frozenset[str]:
    """Places of all devices, those behind bridges too; the domain is 0000 on a PC."""
    found: set[str] = set()
    todo = [(device, 0) for bus in buses for device in bus["devices"]]
    while todo:
        device, _ = todo.pop()
        place = f"{device['bus']:02x}:{device['slot']:02x}.{device['function']:x}"
        found.add(f"0000:{place}")
        bridge = device.get("pci_bridge")
        todo += [(d, 0) for d in (bridge or {}).get("devices", ())]
    return frozenset(found)
