"""Devices of one's own, described once: a machine with two UARTs and a DMA engine moves."""

import tempfile
from collections import deque
from dataclasses import dataclass, field

import mig
from mig import vmstate


class Uart:
    """A serial port, as an emulator has it: it knows nothing of migration."""

    FIFO_NBYTES = 16

    def __init__(self):
        self.divider = 12
        self.line_control = 3
        self.scratch = 0
        self.fifo = deque()
        self.fifo_length = 0  # only for the stream: pre_save sets it
        self.timeout_at = None  # nanoseconds, while the timer runs
        self.loopback = False
        self.loopback_byte = 0

    def receive(self, byte, now):
        """A byte has come in over the line."""
        self.fifo.append(byte)
        self.timeout_at = now + 4_000_000

    def before_save(self):
        """The length of the FIFO is in the stream before what is in it."""
        self.fifo_length = len(self.fifo)

    def after_load(self, version_id):
        """Version 1 had no timer: start it where bytes wait."""
        if version_id < 2 and self.fifo:
            self.timeout_at = 0


LOOPBACK = vmstate.Description(
    "uart/loopback",
    needed=lambda uart: uart.loopback,
    fields=[
        vmstate.Bool("loopback"),
        vmstate.UInt8("loopback_byte"),
    ],
)

UART = vmstate.Description(
    "uart",
    version=2,
    minimum_version=1,
    fields=[
        vmstate.UInt16("divider"),
        vmstate.UInt8("line_control"),
        vmstate.UInt8("scratch"),
        vmstate.UInt8("fifo_length"),
        vmstate.Validate("the FIFO fits", lambda uart, _: uart.fifo_length <= Uart.FIFO_NBYTES),
        vmstate.Array("fifo", vmstate.UInt8, "fifo_length"),
        vmstate.Timer("timeout_at", since=2),
    ],
    subsections=[LOOPBACK],
    pre_save=Uart.before_save,
    post_load=Uart.after_load,
)


@dataclass
class Channel:
    """One channel of the DMA engine."""

    address: int = 0
    left: int = 0


@dataclass
class Dma:
    """A DMA engine: four channels, and requests that wait."""

    channels: list[Channel] = field(default_factory=lambda: [Channel() for _ in range(4)])
    waiting: list[Channel] = field(default_factory=list)
    masked: int = 0b1111


CHANNEL = vmstate.Description(
    "dma-channel",
    fields=[vmstate.UInt64("address"), vmstate.UInt32("left")],
    make=Channel,
)

DMA = vmstate.Description(
    "dma",
    priority=vmstate.Priority.IOMMU,  # is loaded before what may use it
    fields=[
        vmstate.Array("channels", CHANNEL, 4),
        vmstate.TailQueue("waiting", CHANNEL),
        vmstate.Bitmap("masked", 4),
        vmstate.Unused(8),
    ],
)


class Machine:
    """What both ends build before one moves to the other."""

    def __init__(self):
        memory = mig.GuestMemory()
        memory.add("ram", 1 << 20)
        self.uarts = [Uart(), Uart()]
        self.dma = Dma()
        devices = mig.DeviceRegistry()
        for uart in self.uarts:
            devices.register(UART, uart)  # instance 0, instance 1
        devices.register(DMA, self.dma)
        self.guest = mig.MemoryGuest("two-uarts", memory, devices)

    def work(self):
        """Let the devices have a state that is worth to move."""
        first, second = self.uarts
        for byte in b"hello":
            first.receive(byte, now=1_000_000)
        second.loopback, second.loopback_byte = True, 0x55
        self.dma.channels[2] = Channel(0x1234_5678_9ABC, 512)
        self.dma.waiting.append(Channel(0x1000, 64))
        self.dma.masked = 0b1011


def main():
    """Move a machine, and see that its devices have arrived as they were."""
    here, there = Machine(), Machine()
    here.work()
    with tempfile.TemporaryDirectory() as folder:
        incoming = mig.IncomingMigration(there.guest)
        incoming.listen(f"unix:{folder}/socket")
        outgoing = mig.OutgoingMigration(here.guest, capabilities={"return-path"})
        outgoing.start(incoming.uri)
        outgoing.wait()
        incoming.wait()
    same = [vars(uart) for uart in there.uarts] == [vars(uart) for uart in here.uarts]
    print(bytes(there.uarts[0].fifo).decode(), f"{there.dma.channels[2].address:#x}")

    # what does not fit its field does not leave
    there.dma.channels[1].left = -1
    try:
        DMA.save(there.dma)
    except mig.errors.DeviceStateError as error:
        print(error)
    print("nothing is corrupt" if same and there.dma.waiting == here.dma.waiting else "corrupt")


if __name__ == "__main__":
    main()
