"""Another process that maps a guest's memory, as vhost-user backends do: run as a program.

It is given a memfd over a unix socket, maps it, registers the mapping with a userfaultfd of its
own, and gives that away. Then it reads pages as it is told.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import socket
import struct
import sys

PAGE = 4096
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]
UFFD_API, UFFDIO_API, UFFDIO_REGISTER = 0xAA, 0xC018AA3F, 0xC020AA00
MODE_MISSING = 1
WHERE = struct.Struct("=QQQ")


def main(path: str) -> None:
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    data, (memfd,), _, _ = socket.recv_fds(line, WHERE.size, 1)
    offset, nbytes, _ = WHERE.unpack(data)
    memory = mmap.mmap(memfd, nbytes, mmap.MAP_SHARED, offset=offset)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    uffd = ctypes.CDLL(None, use_errno=True).syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    assert uffd >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("=QQQ", UFFD_API, 0, 0)))
    register = struct.pack("=QQQQ", address, nbytes, MODE_MISSING, 0)
    fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(register))
    socket.send_fds(line, [WHERE.pack(offset, nbytes, address)], [uffd])
    while order := line.recv(8):
        at = int.from_bytes(order, "little") * PAGE
        line.sendall(memory[at : at + PAGE])


if __name__ == "__main__":
    main(sys.argv[1])
