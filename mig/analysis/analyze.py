"""`analyze`: open a file, recognise what it is by its content, walk over the stream in it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import BinaryIO

from mig.analysis.report import Analysis, Finding, Severity
from mig.analysis.walk import StreamWalk
from mig.errors import ChannelError, StreamError
from mig.image.found import FoundStream, split_name
from mig.image.libvirt import SaveFormat
from mig.image.unpack import UnpackingSource
from mig.mapped import MappedFile
from mig.stream.reader import StreamReader


def analyze(name: str | os.PathLike[str]) -> Analysis:
    """Return everything that is in a file, and what is wrong with it.

    name: a path, or ``file:PATH[,offset=N]``: a stream, a mapped-ram file, a save file of
          libvirt, or one of these compressed by gzip, bzip2, xz, zstd or lzop

    What is wrong with the contents are findings of the result, never errors; ChannelError when
    the file cannot be read. Memory does not grow with the file, except for two bits a page of the
    guest and for its devices.
    """
    named, offset = split_name(name)
    path = Path(named)
    try:
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            analysis = Analysis(str(path), nbytes, offset)
            try:
                _analyze_file(file, analysis)
            except StreamError as error:
                analysis.add(
                    Finding(Severity.ERROR, error.message, error.offset, error.section, error.block)
                )
            return analysis
    except OSError as error:
        raise ChannelError(f"{path}: {error.strerror or error}") from error


def _analyze_file(file: BinaryIO, analysis: Analysis) -> None:
    """Go through libvirt's header and a packing, where they are."""
    found = FoundStream.in_file(analysis.file, file.fileno(), analysis.start)
    analysis.libvirt, analysis.start, analysis.packing = found.save, found.offset, found.packing
    if found.save is not None:
        _compare_format(analysis, found.save.format, found.packing)
    if analysis.packing is None:
        _analyze_mapped(file, analysis)
        return
    file.seek(analysis.start)
    source = UnpackingSource(file, analysis.packing)
    try:
        StreamWalk(StreamReader(source), analysis).run()
    finally:
        source.close()


def _compare_format(analysis: Analysis, format_: SaveFormat, packing: str | None) -> None:
    named = None if format_ in (SaveFormat.RAW, SaveFormat.SPARSE) else format_.name.lower()
    if named != packing:
        text = f"the header says {format_.name.lower()}, the stream is {packing or 'not packed'}"
        analysis.add(Finding(Severity.ERROR, text, 0))


def _analyze_mapped(file: BinaryIO, analysis: Analysis) -> None:
    """Only what is walked over at the time is in memory."""
    if analysis.file_nbytes <= analysis.start:
        text = f"the file has {analysis.file_nbytes} bytes: no stream starts at {analysis.start}"
        analysis.add(Finding(Severity.ERROR, text, 0))
        return
    with (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
        memoryview(mapping) as whole,
        whole[analysis.start :] as stream,
    ):
        mapping.madvise(mmap.MADV_SEQUENTIAL)
        reader = StreamReader(data=stream)
        walk = StreamWalk(reader, analysis, MappedFile(analysis.start, analysis.file_nbytes))
        try:
            walk.run()
        finally:
            reader.close()
