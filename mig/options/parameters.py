"""The parameters (MigrationParameters), with QMP's names, in QEMU 10.0's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Final

from mig.errors import OptionError
from mig.options.bitmaps import NodeAlias
from mig.options.kinds import (
    IN_RANGE,
    UINT32_MAX,
    UINT64_MAX,
    BitmapMapping,
    Choice,
    Integer,
    Kind,
    Seconds,
    Size,
    Switch,
    Text,
)
from mig.options.rules import broken_rules
from mig.wire import DEFAULT_PAGE_BITS


class MultiFDCompression(StrEnum):
    """How the channels of multifd compress. QEMU has more where it is built for their hardware.

    ADAPTIVE is mig's own, between two ends of mig: each page in its own way.
    """

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"
    ADAPTIVE = "adaptive"


class ZeroPageDetection(StrEnum):
    """Who looks for zero pages: nobody, the migration's thread, the channels of multifd."""

    NONE = "none"
    LEGACY = "legacy"
    MULTIFD = "multifd"


class MigMode(StrEnum):
    """A move to another machine, or a restart of QEMU or the host in place (CPR)."""

    NORMAL = "normal"
    CPR_REBOOT = "cpr-reboot"
    CPR_TRANSFER = "cpr-transfer"


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """What a parameter is.

    name:      QMP's
    attribute: of Parameters
    kind:      unit, range, and how a value is read
    default:   as a value of Parameters
    doc:       what it does
    since:     first QEMU that has it, None for mig's own
    until:     first QEMU that has it no more, None while 10.0 has it
    in_flight: whether a change takes effect while a migration runs
    """

    name: str
    attribute: str
    kind: Kind
    default: object
    doc: str
    since: str | None
    in_flight: bool
    until: str | None = None


#: QEMU's error for a rate: its limits and unit
_RATE: Final = IN_RANGE + " bytes/second"

#: parameters that QEMU 10.0 has no more, and what became of them
REMOVED_PARAMETERS: Final = {
    "block-incremental": "only QEMU before 9.1 has it; the successor is blockdev-mirror",
}


def _spec(
    kind: Kind, doc: str, since: str | None, *, in_flight: bool = False, until: str | None = None
) -> dict[str, Any]:
    """Return the metadata of a field, whose name is the QMP name with underscores."""
    return {"kind": kind, "doc": doc, "since": since, "in_flight": in_flight, "until": until}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Values of all parameters; `Parameters.specs` tells what each of them is."""

    announce_initial: int = field(
        default=50,
        metadata=_spec(
            Integer(0, 100_000, "ms"),
            "delay before the network hears of the move for the first time",
            "4.0",
            in_flight=True,
        ),
    )
    announce_max: int = field(
        default=550,
        metadata=_spec(
            Integer(0, 100_000, "ms"),
            "longest delay between two such announcements",
            "4.0",
            in_flight=True,
        ),
    )
    announce_rounds: int = field(
        default=5,
        metadata=_spec(Integer(0, 1000), "number of announcements", "4.0", in_flight=True),
    )
    announce_step: int = field(
        default=100,
        metadata=_spec(
            Integer(1, 10_000, "ms"), "by how much the delay grows each time", "4.0", in_flight=True
        ),
    )
    throttle_trigger_threshold: int = field(
        default=50,
        metadata=_spec(
            Integer(1, 100, "%", IN_RANGE),
            "auto-converge slows the guest when it writes more than this share of what is sent",
            "5.0",
            in_flight=True,
        ),
    )
    cpu_throttle_initial: int = field(
        default=20,
        metadata=_spec(
            Integer(1, 99, "%", IN_RANGE),
            "how much of the time auto-converge takes from the guest at first",
            "2.7",
            in_flight=True,
        ),
    )
    cpu_throttle_increment: int = field(
        default=10,
        metadata=_spec(
            Integer(1, 99, "%", IN_RANGE),
            "how much more it takes each time that was not enough",
            "2.7",
            in_flight=True,
        ),
    )
    cpu_throttle_tailslow: bool = field(
        default=False,
        metadata=_spec(
            Switch(),
            "no more than is needed in the last steps of auto-converge",
            "5.1",
            in_flight=True,
        ),
    )
    tls_creds: str = field(
        default="",
        metadata=_spec(Text(), "object with the TLS credentials; none: no TLS", "2.7"),
    )
    tls_hostname: str = field(
        default="",
        metadata=_spec(
            Text(),
            "name that the destination's certificate must have; none: that of the URI",
            "2.7",
        ),
    )
    tls_authz: str = field(
        default="",
        metadata=_spec(Text(), "object that says which clients may connect by TLS", "4.0"),
    )
    max_bandwidth: int = field(
        default=128 << 20,
        metadata=_spec(
            Size(0, UINT64_MAX, "bytes/s", _RATE),
            "how fast to send while the guest runs; 0: no limit",
            "2.8",
            in_flight=True,
        ),
    )
    avail_switchover_bandwidth: int = field(
        default=0,
        metadata=_spec(
            Size(0, UINT64_MAX, "bytes/s", _RATE),
            "speed to count on when the guest is stopped; 0: as measured",
            "8.2",
            in_flight=True,
        ),
    )
    downtime_limit: int = field(
        default=300,
        metadata=_spec(
            Integer(0, 2_000_000, "ms", IN_RANGE + " ms"),
            "longest stand-still of the guest to aim for",
            "2.8",
            in_flight=True,
        ),
    )
    x_checkpoint_delay: int = field(
        default=20_000,
        metadata=_spec(
            Integer(0, UINT32_MAX, "ms"),
            "time between two checkpoints of COLO (experimental)",
            "2.8",
            in_flight=True,
        ),
    )
    multifd_channels: int = field(
        default=2,
        metadata=_spec(Integer(1, 255), "number of connections of multifd", "4.0"),
    )
    multifd_compression: MultiFDCompression = field(
        default=MultiFDCompression.NONE,
        metadata=_spec(
            Choice(MultiFDCompression),
            "how the channels of multifd compress; adaptive is mig's own",
            "5.0",
        ),
    )
    multifd_zlib_level: int = field(
        default=1,
        metadata=_spec(Integer(0, 9), "level of zlib: 0 none, 1 fast, 9 small", "5.0"),
    )
    multifd_qatzip_level: int = field(
        default=1,
        metadata=_spec(Integer(1, 9), "level of qatzip: 1 fast, 9 small", "9.2"),
    )
    multifd_zstd_level: int = field(
        default=1,
        metadata=_spec(Integer(0, 20), "level of zstd: 0 its default, 1 fast, 20 small", "5.0"),
    )
    xbzrle_cache_size: int = field(
        default=64 << 20,
        metadata=_spec(
            Size(
                1 << DEFAULT_PAGE_BITS,
                1 << 63,
                "bytes",
                "a power of two no less than the target page size",
                power=True,
            ),
            "memory for the pages that XBZRLE compares with; no less than a target page",
            "2.11",
            in_flight=True,
        ),
    )
    max_postcopy_bandwidth: int = field(
        default=0,
        metadata=_spec(
            Size(0, UINT64_MAX, "bytes/s", _RATE),
            "how fast to send pages nobody waits for in postcopy; 0: no limit",
            "3.0",
            in_flight=True,
        ),
    )
    max_cpu_throttle: int = field(
        default=99,
        metadata=_spec(
            Integer(1, 99, "%", "an integer in the range of cpu-throttle-initial to {high}"),
            "the most that auto-converge takes; no less than cpu-throttle-initial",
            "3.1",
            in_flight=True,
        ),
    )
    block_bitmap_mapping: tuple[NodeAlias, ...] | None = field(
        default=None,
        metadata=_spec(
            BitmapMapping(), "names of disks and their dirty bitmaps on the wire", "5.2"
        ),
    )
    x_vcpu_dirty_limit_period: int = field(
        default=1000,
        metadata=_spec(
            Integer(1, 1000, "ms"),
            "how often dirty-limit looks at the vCPUs (experimental)",
            "8.1",
            in_flight=True,
        ),
    )
    vcpu_dirty_limit: int = field(
        default=1,
        metadata=_spec(
            Integer(1, UINT64_MAX, "MB/s", "a value of at least {low} MB/s"),
            "how fast dirty-limit lets a vCPU write",
            "8.1",
            in_flight=True,
        ),
    )
    mode: MigMode = field(
        default=MigMode.NORMAL,
        metadata=_spec(Choice(MigMode), "a move, or a restart in place", "8.2"),
    )
    zero_page_detection: ZeroPageDetection = field(
        default=ZeroPageDetection.MULTIFD,
        metadata=_spec(
            Choice(ZeroPageDetection),
            "who looks for zero pages; multifd without the capability: as legacy",
            "9.0",
        ),
    )
    direct_io: bool = field(
        default=True,
        metadata=_spec(
            Switch(), "write files around the page cache where possible (off in QEMU)", "9.1"
        ),
    )
    compress_level: int = field(
        default=1,
        metadata=_spec(
            Integer(0, 9), "level of compress: 0 none, 1 fast, 9 small", "2.4", until="9.1"
        ),
    )
    compress_threads: int = field(
        default=8,
        metadata=_spec(Integer(1, 255), "threads that compress pages", "2.4", until="9.1"),
    )
    compress_wait_thread: bool = field(
        default=True,
        metadata=_spec(
            Switch(),
            "wait for a thread of compress; off: a page for which none is free goes as it is",
            "3.1",
            in_flight=True,
            until="9.1",
        ),
    )
    decompress_threads: int = field(
        default=2,
        metadata=_spec(
            Integer(1, 255), "threads that inflate compressed pages", "2.4", until="9.1"
        ),
    )
    idle_timeout: float = field(
        default=60.0,
        metadata=_spec(Seconds(0, 10**6), "give up when no byte moves for so long; 0: never", None),
    )

    @classmethod
    def specs(cls) -> Iterator[ParameterSpec]:
        """Yield what each parameter is, in order."""
        for f in fields(cls):
            name = f.name.replace("_", "-")
            yield ParameterSpec(name=name, attribute=f.name, default=f.default, **f.metadata)

    @classmethod
    def from_qmp(cls, values: Mapping[str, object]) -> Parameters:
        """Return parameters from QMP names; OptionError lists every violation.

        Values are QMP's, or a command line's text: numbers in decimal or 0x hexadecimal, sizes
        with suffix, on or off.
        """
        parameters, violations = cls().read(values)
        violations += broken_rules(frozenset(), parameters)
        if violations:
            raise OptionError(*violations)
        return parameters

    def read(self, values: Mapping[str, object]) -> tuple[Parameters, list[str]]:
        """Return these parameters with ``values`` taken over, and what is wrong with the others."""
        known = {spec.name: spec for spec in self.specs()}
        violations: list[str] = []
        chosen: dict[str, Any] = {}
        for name, raw in values.items():
            if name in REMOVED_PARAMETERS:
                why = REMOVED_PARAMETERS[name]
                violations.append(f"parameter '{name}' is not supported: {why}")
            elif name not in known:
                names = ", ".join(known)
                violations.append(f"Parameter '{name}' is unexpected (there are {names})")
            else:
                spec = known[name]
                try:
                    chosen[spec.attribute] = spec.kind.read(name, raw)
                except ValueError as error:
                    violations.append(str(error))
        return replace(self, **chosen), violations

    def differences(self, other: Parameters) -> list[tuple[ParameterSpec, object, object]]:
        """Return what differs: specification, value here, value there."""
        pairs = ((s, getattr(self, s.attribute), getattr(other, s.attribute)) for s in self.specs())
        return [(spec, here, there) for spec, here, there in pairs if here != there]

    def to_qmp(self) -> dict[str, Any]:
        """Return what query-migrate-parameters of QEMU 10.0 answers."""
        out: dict[str, Any] = {}
        for spec in self.specs():
            value = getattr(self, spec.attribute)
            # a mapping that nobody made is not an empty one
            if spec.since is not None and spec.until is None and value is not None:
                out[spec.name] = spec.kind.to_qmp(value)
        return out

    @property
    def timeout(self) -> float | None:
        """The idle limit in seconds, None for ever."""
        return self.idle_timeout or None
