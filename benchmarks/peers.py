# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who the kernels are measured against.

`plain` is this folder's own C for what peers do (peers.c). MIG_BENCH_LIBRARY is the path of a
shared library that is measured beside it; of these functions it has those it wants to be measured:

    bool buffer_is_zero(const void *bytes, size_t nbytes);
    int xbzrle_encode_buffer(uint8_t *old, uint8_t *new, int nbytes, uint8_t *dst, int max);
    int xbzrle_decode_buffer(uint8_t *src, int nsrc, uint8_t *page, int nbytes);
    unsigned long find_next_bit(const unsigned long *words, unsigned long nbits,
                                unsigned long from);
    unsigned long find_next_zero_bit(...);  the same
    void *cache_init(uint64_t nbytes, size_t page_size, void **error);
    bool cache_is_cached(const void *cache, uint64_t address, uint64_t generation);
    uint8_t *get_cached_data(const void *cache, uint64_t address);
    int cache_insert(void *cache, uint64_t address, const uint8_t *page, uint64_t generation);
    void cache_fini(void *cache);

MIG_BENCH_LIBRARY_SCALAR is one whose encoder has no vector instructions. MIG_BENCH_LIBRARY_NAME
and MIG_BENCH_LIBRARY_SCALAR_NAME say what the results call them; by default their file names.

All run in loops of C that is compiled together with csrc/ into a temporary library: mig's own
functions are measured from there only where the package has no face for a batch, and where
a call from Python is measured.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent
_CSRC = _HERE.parent / "csrc"
_WARNINGS = ["-Wall", "-Wextra"]
# as setup.py compiles them, so that the same code comes out
_CSRC_FLAGS = ["-O3", "-std=gnu11", "-D_GNU_SOURCE", "-fPIC", f"-I{_CSRC}"]
_PEERS_FLAGS = ["-O2", *_WARNINGS, "-fPIC", f"-I{_CSRC}"]

#: what the functions are called here, in a foreign library, and in peers.c
_NAMES = {
    "is_zero": ("buffer_is_zero", "plain_is_zero"),
    "encode": ("xbzrle_encode_buffer", "plain_encode"),
    "decode": ("xbzrle_decode_buffer", "plain_decode"),
    "next_set": ("find_next_bit", "plain_next_set"),
    "next_clear": ("find_next_zero_bit", "plain_next_clear"),
    "cache_open": ("cache_init", "plain_cache_open"),
    "cached": ("cache_is_cached", "plain_cache_cached"),
    "data": ("get_cached_data", "plain_cache_data"),
    "insert": ("cache_insert", "plain_cache_insert"),
    "cache_close": ("cache_fini", "plain_cache_close"),
}
#: what a page cache needs
CACHE = ("cache_open", "cached", "data", "insert", "cache_close")

Argument = object
_OPEN = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)


class Cache(ctypes.Structure):
    """A peer's page cache: struct cache_api."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("cache", "cached", "data", "insert")]


@dataclass(frozen=True)
class Peer:
    """Somebody's functions: addresses by name."""

    name: str
    functions: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.functions[name]


def _peer(name: str, library: ctypes.CDLL, column: int) -> Peer:
    functions = {}
    for function, names in _NAMES.items():
        if hasattr(library, names[column]):
            address = ctypes.cast(library[names[column]], ctypes.c_void_p).value
            assert address is not None
            functions[function] = address
    return Peer(name, functions)


def _given(variable: str) -> tuple[str, str] | None:
    """Path and name of a library, None when the environment has none."""
    path = os.environ.get(variable)
    return (path, os.environ.get(f"{variable}_NAME") or Path(path).stem) if path else None


def given_libraries() -> dict[str, str]:
    """Names of the libraries that were given."""
    variables = {"library": "MIG_BENCH_LIBRARY", "scalar": "MIG_BENCH_LIBRARY_SCALAR"}
    return {key: given[1] for key, name in variables.items() if (given := _given(name))}


def _convert(argument: Argument) -> object:
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_uint64(argument)  # type: ignore[arg-type]


class Code:
    """The compiled peers.c, with csrc/."""

    def __init__(self, folder: Path) -> None:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        objects = [str(folder / "peers.o"), *map(str, sorted(_CSRC.glob("*.c")))]
        library = str(folder / "peers.so")
        source = str(_HERE / "peers.c")
        subprocess.run([*compiler, *_PEERS_FLAGS, "-c", source, "-o", objects[0]], check=True)
        codecs = ["-lz", "-lzstd"]
        subprocess.run(
            [*compiler, *_CSRC_FLAGS, "-shared", *objects, *codecs, "-o", library], check=True
        )
        self._library = ctypes.CDLL(library)
        self.plain = _peer("plain C", self._library, 1)
        self._caches: list[Callable[[], object]] = []

    def bind(self, name: str, *arguments: Argument) -> Callable[[], int]:
        """Return a call of a C function; arrays are passed as pointers, all else as 64 bits."""
        function = self._library[name]
        function.restype = ctypes.c_size_t
        converted = [_convert(argument) for argument in arguments]

        def call(_hold: object = arguments) -> int:
            result: int = function(*converted)
            return result

        return call

    def call(self, name: str, *arguments: Argument) -> int:
        """Call a C function."""
        return self.bind(name, *arguments)()

    def kernels(self, name: str) -> int:
        """Address of the named family's table, of csrc/ compiled here."""
        table = ctypes.c_void_p()
        rc = self._library.mig_kernels_select(name.encode(), ctypes.byref(table))
        assert rc == 0
        assert table.value is not None
        return table.value

    def cache(self, peer: Peer, npages: int, page_size: int) -> Cache:
        """Open an empty page cache of a peer."""
        create = _OPEN(peer["cache_open"])
        error = ctypes.c_void_p()
        handle = create(npages * page_size, page_size, ctypes.addressof(error))
        if not handle:
            raise MemoryError(f"{peer.name} has no cache of {npages} pages")
        close = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(peer["cache_close"])
        self._caches.append(lambda: close(handle))
        return Cache(handle, peer["cached"], peer["data"], peer["insert"])

    def mig_cache(self, npages: int, page_size: int) -> int:
        """Address of an empty page cache of csrc/."""
        create = _OPEN(("mig_open", self._library))
        handle: int = create(npages * page_size, page_size, None)
        self._caches.append(self.bind("mig_close", handle))
        return handle

    def close_caches(self) -> None:
        """Release all page caches."""
        while self._caches:
            self._caches.pop()()

    def peers(self, *functions: str) -> Iterator[Peer]:
        """Yield everyone who has these functions: the library that was given, and plain C."""
        if given := _given("MIG_BENCH_LIBRARY"):
            library = _peer(given[1], ctypes.CDLL(given[0]), 0)
            if all(name in library.functions for name in functions):
                yield library
        yield self.plain

    def scalar_peers(self, function: str) -> Iterator[Peer]:
        """Yield the library without vector instructions, if one was given, and plain C."""
        if given := _given("MIG_BENCH_LIBRARY_SCALAR"):
            library = _peer(given[1], ctypes.CDLL(given[0]), 0)
            if function in library.functions:
                yield library
        yield self.plain
