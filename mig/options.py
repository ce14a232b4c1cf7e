"""Capabilities and parameters, with QMP's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from mig.errors import OptionError


class Capability(StrEnum):
    """Migration capabilities of QEMU 10.0 (MigrationCapability)."""

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    EVENTS = "events"
    POSTCOPY_RAM = "postcopy-ram"
    X_COLO = "x-colo"
    RELEASE_RAM = "release-ram"
    RETURN_PATH = "return-path"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    X_IGNORE_SHARED = "x-ignore-shared"
    VALIDATE_UUID = "validate-uuid"
    BACKGROUND_SNAPSHOT = "background-snapshot"
    ZERO_COPY_SEND = "zero-copy-send"
    POSTCOPY_PREEMPT = "postcopy-preempt"
    SWITCHOVER_ACK = "switchover-ack"
    DIRTY_LIMIT = "dirty-limit"
    MAPPED_RAM = "mapped-ram"


#: what the engine can do; switching on any other is an OptionError
OUTGOING_CAPABILITIES = frozenset(
    {
        Capability.AUTO_CONVERGE,
        Capability.PAUSE_BEFORE_SWITCHOVER,
        Capability.RETURN_PATH,
        Capability.SWITCHOVER_ACK,
    }
)
INCOMING_CAPABILITIES = frozenset({Capability.RETURN_PATH, Capability.SWITCHOVER_ACK})

#: (capability, capability it needs)
REQUIRES = ((Capability.SWITCHOVER_ACK, Capability.RETURN_PATH),)


def _value(raw: object, default: float) -> float:
    """The value of a parameter, which a command line gives as text, of the default's type."""
    if isinstance(default, bool):
        switches: dict[object, bool] = {"on": True, "off": False, True: True, False: False}
        if not isinstance(raw, (bool, str)) or raw not in switches:
            raise TypeError(raw)
        return switches[raw]
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise TypeError(raw)
    return int(raw) if isinstance(default, int) else float(raw)


def _parameter(name: str, unit: str, low: float, high: float, doc: str) -> dict[str, Any]:
    return {"name": name, "unit": unit, "low": low, "high": high, "doc": doc}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Migration parameters; each field's metadata carries QMP name, unit and range."""

    max_bandwidth: int = field(
        default=128 << 20,
        metadata=_parameter(
            "max-bandwidth", "bytes/s", 0, 2**63 - 1, "limit while the guest runs; 0: none"
        ),
    )
    downtime_limit: int = field(
        default=300,
        metadata=_parameter(
            "downtime-limit", "ms", 0, 2_000_000, "longest stand-still of the guest to aim for"
        ),
    )
    avail_switchover_bandwidth: int = field(
        default=0,
        metadata=_parameter(
            "avail-switchover-bandwidth",
            "bytes/s",
            0,
            2**63 - 1,
            "bandwidth to count on while the guest stands still; 0: what was measured",
        ),
    )
    throttle_trigger_threshold: int = field(
        default=50,
        metadata=_parameter("throttle-trigger-threshold", "%", 1, 100, "of what is sent"),
    )
    cpu_throttle_initial: int = field(
        default=20, metadata=_parameter("cpu-throttle-initial", "%", 1, 99, "the first step")
    )
    cpu_throttle_increment: int = field(
        default=10, metadata=_parameter("cpu-throttle-increment", "%", 1, 99, "further steps")
    )
    cpu_throttle_tailslow: bool = field(
        default=False,
        metadata=_parameter("cpu-throttle-tailslow", "on/off", 0, 1, "no larger steps than needed"),
    )
    max_cpu_throttle: int = field(
        default=99, metadata=_parameter("max-cpu-throttle", "%", 1, 99, "the most")
    )
    idle_timeout: float = field(
        default=60.0,
        metadata=_parameter(
            "idle-timeout",
            "s",
            0,
            10**6,
            "give up when no byte moves for so long (mig's own parameter); 0: never",
        ),
    )

    direct_io: bool = field(
        default=True,
        metadata=_parameter(
            "direct-io",
            "on/off",
            0,
            1,
            "write captured VMs around the page cache where possible (off in QEMU)",
        ),
    )

    @classmethod
    def from_qmp(cls, values: Mapping[str, object]) -> Parameters:
        """Return parameters from QMP names; OptionError lists every violation."""
        known = {f.metadata["name"]: f for f in fields(cls)}
        violations: list[str] = []
        chosen: dict[str, Any] = {}
        for name, raw in values.items():
            if name not in known:
                names = ", ".join(known)
                violations.append(f"there is no parameter '{name}' (there are {names})")
                continue
            spec = known[name]
            try:
                value = _value(raw, getattr(cls(), spec.name))
            except (TypeError, ValueError, OverflowError):
                kind = "on or off" if spec.type == "bool" else "a number"
                violations.append(f"parameter '{name}' expects {kind}, not {raw!r}")
                continue
            low, high = spec.metadata["low"], spec.metadata["high"]
            if not low <= value <= high:
                unit = spec.metadata["unit"]
                violations.append(
                    f"parameter '{name}' expects a value between {low} and {high} {unit}"
                )
            chosen[spec.name] = value
        if violations:
            raise OptionError(*violations)
        return cls(**chosen)

    @property
    def timeout(self) -> float | None:
        """The idle limit in seconds, None for ever."""
        return self.idle_timeout or None


def capability_set(
    names: Iterable[str] | Mapping[str, bool], supported: frozenset[Capability]
) -> frozenset[Capability]:
    """Return the capabilities that ``names`` switches on; OptionError lists every violation."""
    wanted = names if isinstance(names, Mapping) else dict.fromkeys(names, True)
    violations, chosen = [], set()
    for name, on in wanted.items():
        try:
            capability = Capability(name)
        except ValueError:
            violations.append(f"there is no capability '{name}'")
            continue
        if on and capability not in supported:
            can = ", ".join(sorted(supported))
            violations.append(f"capability '{name}' is not supported here (these are: {can})")
        elif on:
            chosen.add(capability)
    for capability, needed in REQUIRES:
        if capability in chosen and needed not in chosen:
            violations.append(f"capability '{capability}' requires capability '{needed}'")
    if violations:
        raise OptionError(*violations)
    return frozenset(chosen)
