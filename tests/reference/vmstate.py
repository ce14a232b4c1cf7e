"""Devices of QEMU's, described in Python: what a machine `pc` of 7.2 and 10.0 has.

The descriptions are of the streams that those QEMUs write. `STATES` has what must be there before
a device is loaded, since it is compared with what comes.
"""

from __future__ import annotations

from typing import Any

from mig import vmstate
from mig.errors import StreamError
from mig.savevm.vmstate import Description, Field
from mig.stream.reader import StreamReader


def bytes_of(*names: str) -> list[Field]:
    return [vmstate.UInt8(name) for name in names]


def words_of(*names: str) -> list[Field]:
    return [vmstate.UInt32(name) for name in names]


TIMER = Description(
    "timer",
    version=2,
    minimum_version=1,
    fields=[
        vmstate.Int64("cpu_ticks_offset"),
        vmstate.Unused(8),
        vmstate.Int64("cpu_clock_offset", since=2),
    ],
)

I8259 = Description(
    "i8259",
    fields=bytes_of(
        *("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll"),
        *("special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi"),
        *("special_fully_nested_mode", "init4", "single_mode", "elcr"),
    ),
)

PORT92 = Description("port92", fields=bytes_of("outport"))

GLOBAL_STATE = {
    (7, 2): Description(
        "globalstate", fields=[vmstate.UInt32("size"), vmstate.Buffer("runstate", 100)]
    ),
    (10, 0): Description(
        "globalstate",
        fields=[
            vmstate.UInt32("size"),
            vmstate.Buffer("runstate", 32),
            *bytes_of("has_vm_was_suspended", "vm_was_suspended"),
            vmstate.Buffer("unused", 66),
        ],
    ),
}

FW_CFG = Description(
    "fw_cfg",
    version=2,
    minimum_version=1,
    fields=[
        vmstate.UInt16("cur_entry"),
        vmstate.UInt16("cur_offset", when=lambda _, version_id: version_id == 1),
        vmstate.UInt32("cur_offset", since=2),
    ],
    subsections=[
        Description(
            "fw_cfg/dma",
            version=0,
            fields=[vmstate.UInt64("dma_addr")],
            needed=lambda state: "dma_addr" in state,
        ),
        Description(
            "fw_cfg/acpi_mr",
            fields=[
                vmstate.UInt64("table_mr_size"),
                vmstate.UInt64("linker_mr_size"),
                vmstate.UInt64("rsdp_mr_size"),
            ],
            needed=lambda state: "table_mr_size" in state,
        ),
    ],
)

SERIAL = Description(
    "serial",
    version=3,
    minimum_version=2,
    fields=[
        vmstate.UInt16("divider", since=2),
        *bytes_of("rbr", "ier", "iir", "lcr", "mcr", "lsr", "msr", "scr"),
        vmstate.UInt8("fcr_vmstate", since=3),
    ],
    subsections=[
        Description(
            "serial/timeout_ipending",
            fields=[vmstate.Int32("timeout_ipending")],
            needed=lambda state: "timeout_ipending" in state,
        ),
        Description(
            "serial/thr_ipending",
            fields=[vmstate.Int32("thr_ipending")],
            needed=lambda state: "thr_ipending" in state,
        ),
        Description(
            "serial/fifo_timeout_timer",
            fields=[vmstate.Timer("fifo_timeout_timer")],
            needed=lambda state: "fifo_timeout_timer" in state,
        ),
        Description(
            "serial/poll",
            fields=[vmstate.Int32("poll_msl"), vmstate.Timer("modem_status_poll")],
            needed=lambda state: "poll_msl" in state,
        ),
    ],
)
ISA_SERIAL = Description(
    "serial", version=3, minimum_version=2, fields=[vmstate.Struct("state", SERIAL)]
)

DMA = Description(
    "dma",
    fields=[
        *bytes_of("command", "mask", "flip_flop"),
        vmstate.Int32("dshift"),
        vmstate.Array(
            "regs",
            Description(
                "dma_regs",
                fields=[
                    vmstate.Array("now", vmstate.Int32, 2),
                    vmstate.Array("base", vmstate.UInt16, 2),
                    *bytes_of("mode", "page", "pageh", "dack", "eop"),
                ],
            ),
            4,
        ),
    ],
)

RTC = Description(
    "mc146818rtc",
    version=3,
    minimum_version=1,
    fields=[
        vmstate.Buffer("cmos_data", 128),
        vmstate.UInt8("cmos_index"),
        vmstate.Unused(28),
        vmstate.Timer("periodic_timer"),
        vmstate.Int64("next_periodic_time"),
        vmstate.Unused(24),
        vmstate.UInt32("irq_coalesced", since=2),
        vmstate.UInt32("period", since=2),
        vmstate.UInt64("base_rtc", since=3),
        vmstate.UInt64("last_update", since=3),
        vmstate.Int64("offset", since=3),
        vmstate.Timer("update_timer", since=3),
        vmstate.UInt64("next_alarm_time", since=3),
    ],
)

_PIT_CHANNEL = Description(
    "pit channel",
    version=2,
    fields=[
        vmstate.Int32("count"),
        vmstate.UInt16("latched_count"),
        *bytes_of("count_latched", "status_latched", "status", "read_state", "write_state"),
        *bytes_of("write_latch", "rw_mode", "mode", "bcd", "gate"),
        vmstate.Int64("count_load_time"),
        vmstate.Int64("next_transition_time"),
    ],
)
PIT = Description(
    "i8254",
    version=3,
    fields=[
        vmstate.UInt32("channels[0].irq_disabled", since=3, attribute="irq_disabled"),
        vmstate.Array("channels", _PIT_CHANNEL, 3),
        vmstate.Int64("channels[0].next_transition_time", attribute="next_transition_time"),
    ],
)

_HPET_TIMER = Description(
    "hpet_timer",
    fields=[
        vmstate.UInt8("tn"),
        *(vmstate.UInt64(name) for name in ("config", "cmp", "fsb", "period")),
        vmstate.UInt8("wrap_flag"),
        vmstate.Timer("qemu_timer"),
    ],
)


def _hpet(count: str) -> Description:
    return Description(
        "hpet",
        version=2,
        minimum_version=1,
        fields=[
            *(vmstate.UInt64(name) for name in ("config", "isr", "hpet_counter")),
            vmstate.UInt8(count, since=2),
            vmstate.Validate("num_timers must match", lambda state, _: 3 <= state[count] <= 32),
            vmstate.Array("timer", _HPET_TIMER, count),
        ],
        subsections=[
            Description(
                "hpet/offset",
                fields=[vmstate.UInt64("hpet_offset")],
                needed=lambda state: "hpet_offset" in state,
            )
        ],
    )


HPET = {(7, 2): _hpet("num_timers"), (10, 0): _hpet("num_timers_save")}

_DRIVE = Description(
    "fdrive",
    fields=bytes_of("head", "track", "sect"),
    subsections=[
        Description(
            "fdrive/media_rate",
            fields=bytes_of("media_rate"),
            needed=lambda state: "media_rate" in state,
        ),
    ],
)
_FDC = Description(
    "fdc",
    version=2,
    fields=[
        *bytes_of("sra", "srb", "dor_vmstate", "tdr", "dsr", "msr", "status0", "status1"),
        *bytes_of("status2"),
        vmstate.Array("fifo", vmstate.UInt8, 512),
        *words_of("data_pos", "data_len"),
        *bytes_of("data_state", "data_dir", "eot", "timer0", "timer1", "precomp_trk", "config"),
        *bytes_of("lock", "pwrd"),
        vmstate.UInt8("num_floppies", equal=True),
        vmstate.Array("drives", _DRIVE, 2),
    ],
)
FDC = Description("fdc", version=2, fields=[vmstate.Struct("state", _FDC)])

_KBD = Description(
    "pckbd",
    version=3,
    fields=bytes_of("write_cmd", "status", "mode", "pending_tmp"),
    subsections=[
        Description(
            "pckbd/extended_state",
            version=0,
            fields=[*words_of("migration_flags", "obsrc"), *bytes_of("obdata", "cbdata")],
            needed=lambda state: "obsrc" in state,
        ),
    ],
)
KBD = Description("pckbd", version=3, fields=[vmstate.Struct("kbd", _KBD)])


VMMOUSE = Description(
    "vmmouse",
    version=0,
    fields=[
        vmstate.Int32("queue_size", equal=True),
        vmstate.Array("queue", vmstate.UInt32, 1024),
        *(vmstate.UInt16(name) for name in ("nb_queue", "status")),
        vmstate.UInt8("absolute"),
    ],
)

PCI_BUS = Description(
    "PCIBUS",
    fields=[
        vmstate.Int32("nirq", equal=True),
        vmstate.Array("irq_count", vmstate.Int32, "nirq"),
    ],
)


def _take(name: str, nbytes: int) -> Any:
    def load(state: Any, reader: StreamReader) -> None:
        state[name] = reader.read(nbytes, name)

    return load


_PCI_DEVICE = Description(
    "PCIDevice",
    version=2,
    minimum_version=1,
    fields=[
        vmstate.Int32("version_id", at_most=True),
        vmstate.Custom(
            "config",
            "pci config",
            save=lambda s: s["config"],
            load=_take("config", 256),
            when=lambda *_: True,
        ),
        vmstate.Custom("config", "never", save=bytes, load=print, when=lambda *_: False),
        vmstate.Custom(
            "irq_state", "pci irq state", save=lambda s: s["irq"], load=_take("irq", 16)
        ),
    ],
)
PIIX3 = Description(
    "PIIX3",
    version=3,
    minimum_version=2,
    fields=[
        vmstate.Struct("dev", _PCI_DEVICE),
        vmstate.Array("pci_irq_levels_vmstate", vmstate.Int32, 4, since=3),
    ],
)

IOAPIC = Description(
    "ioapic",
    version=3,
    minimum_version=1,
    fields=[
        *bytes_of("id", "ioregsel"),
        vmstate.Unused(8),
        vmstate.UInt32("irr"),
        vmstate.Array("ioredtbl", vmstate.UInt64, 24),
    ],
)

#: by idstr
DEVICES = {
    "timer": TIMER,
    "i8259": I8259,
    "port92": PORT92,
    "fw_cfg": FW_CFG,
    "serial": ISA_SERIAL,
    "dma": DMA,
    "mc146818rtc": RTC,
    "i8254": PIT,
    "fdc": FDC,
    "pckbd": KBD,
    "vmmouse": VMMOUSE,
    "PCIBUS": PCI_BUS,
    "0000:00:01.0/PIIX3": PIIX3,
    "ioapic": IOAPIC,
}


def state_before(idstr: str) -> dict[str, Any]:
    """What the device has before it is loaded."""
    states: dict[str, dict[str, Any]] = {
        "fdc": {"state": {"num_floppies": 2}},
        "vmmouse": {"queue_size": 1024},
        "PCIBUS": {"nirq": 4},
        "0000:00:01.0/PIIX3": {"dev": {"version_id": 2}},
    }
    return states.get(idstr, {})


def attempt(description: Description, payload: bytes, idstr: str) -> tuple[Any, StreamError | None]:
    """What was loaded, or why not."""
    try:
        return description.load(payload, state_before(idstr)), None
    except StreamError as error:
        return None, error


def description_of(idstr: str, version: tuple[int, int]) -> Description | None:
    """How that QEMU describes a device, None for one that is not here."""
    of_versions = {"globalstate": GLOBAL_STATE, "hpet": HPET}
    return of_versions[idstr][version] if idstr in of_versions else DEVICES.get(idstr)


# ---- any device ------------------------------------------------------------------------------

_NUMBERS = {
    name: kind
    for kind in (
        *(vmstate.Int8, vmstate.Int16, vmstate.Int32, vmstate.Int64),
        *(vmstate.UInt8, vmstate.UInt16, vmstate.UInt32, vmstate.UInt64),
        *(vmstate.Bool, vmstate.Timer),
    )
    for name in (kind.element.type_name,)
}


def mirrored(said: dict[str, Any]) -> Description:
    """A description of a state of which this is said: good for that state alone."""
    fields: list[Field] = []
    entries = said["fields"]
    while entries:
        like = [e for e in entries if e["name"] == entries[0]["name"]]
        assert entries[: len(like)] == like, "an array is in one place"
        # of a subsection, too, in one state; dots would lead on
        attribute = f"{said['vmsd_name']} {len(fields)}".replace(".", " ")
        fields.append(_mirrored_field(attribute, like))
        entries = entries[len(like) :]
    subsections = [mirrored(sub) for sub in said.get("subsections", ())]
    return Description(
        said["vmsd_name"], version=said["version"], fields=fields, subsections=subsections
    )


def _mirrored_field(attribute: str, entries: list[dict[str, Any]]) -> Field:
    first, options = entries[0], {"attribute": attribute}
    name, kind, nbytes = first["name"], first["type"], first["size"]
    if len(entries) > 1:
        return _Various(name, [mirrored(e["struct"]) for e in entries], **options)
    if "index" in first:
        raise AssertionError(f"{name} is an array of one")
    element: Any = _NUMBERS.get(kind)
    if kind == "struct":
        element = mirrored(first["struct"])
    if element is not None and "array_len" in first:
        return vmstate.Array(name, element, first["array_len"], **options)
    if isinstance(element, Description):
        return vmstate.Struct(name, element, **options)
    if element is not None:
        return element(name, **options)
    if kind == "buffer":
        return vmstate.Buffer(name, nbytes, **options)
    if kind == "unused_buffer":
        return vmstate.Unused(nbytes, name=name)
    if kind == "tmp":
        return vmstate.Temporary(mirrored(first), lambda state: state.setdefault(attribute, {}))
    assert "array_len" not in first, kind
    return vmstate.Custom(
        name, kind, save=lambda state: state[attribute], load=_take(attribute, nbytes)
    )


class _Various(vmstate.Array):
    """An array of structs whose elements are not alike."""

    def __init__(self, name: str, kinds: list[Description], **options: Any) -> None:
        super().__init__(name, _Rotating(kinds), len(kinds), when=lambda *_: True, **options)


class _Rotating(vmstate.Element):
    """Elements that are described by one description after the other."""

    type_name = "struct"
    nested = True

    def __init__(self, kinds: list[Description]) -> None:
        self._kinds = kinds

    def _next(self) -> Description:
        self._kinds.append(self._kinds.pop(0))
        return self._kinds[-1]

    def put(self, out: vmstate.StateWriter, value: Any, body: vmstate.JsonObject) -> None:
        self._next().put(out, value, body)

    def get(self, source: vmstate.StateReader, old: Any, parent: Any) -> Any:
        state: dict[str, Any] = {}
        description = self._next()
        description.get(source, state, description.version)
        return state
