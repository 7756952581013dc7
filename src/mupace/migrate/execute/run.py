"""One execution: blocks are made by threads, and hashed and noted in the order in which they stand in the files.

.OUT.DIGEST.part/     where everything is written, beside OUT
    .journal          the blocks that are written
    model.safetensors, optimizer.pt, config.json, …
    migration.json    the manifest, written when everything else is on the disk
OUT                   the same directory, renamed: what has this name is complete
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mupace.errors import ConfigError, StateError
from mupace.files import write_whole
from mupace.migrate.arithmetic import Transform
from mupace.migrate.execute.archive import joined
from mupace.migrate.execute.blocks import Block, Budget, blocks, budget, raw, smallest
from mupace.migrate.execute.check import check, check_disk, source_files
from mupace.migrate.execute.identity import digest, versions
from mupace.migrate.execute.journal import NAME, Journal
from mupace.migrate.execute.layout import File, Known, Made, Taken, files
from mupace.migrate.execute.source import Source, entries, read_into, room, row_bytes
from mupace.migrate.index.model import Index
from mupace.migrate.manifest import SCHEMA
from mupace.migrate.output import MANIFEST, Outputs

Progress = Callable[[dict[str, Any]], None]


def execute(
    outputs: Outputs,
    index: Index,
    out: Path,
    *,
    max_memory: int = 10**9,
    threads: int = 2,
    progress: Progress | None = None,
) -> Path:
    """Write the target directory: out of core, whole or not at all.

    Everything is checked before a byte is written. A call that was killed is continued by the same call; what it has
    written already is believed when it has the checksum that was noted. The result is the same to the bit whatever
    the threads, the memory and the interruptions.

    Args:
        outputs: what is written.
        index: the source; it is only read.
        out: a directory that does not exist, on any disk, outside of the source.
        max_memory: bytes that this may take beyond what the process has.
        threads: that make blocks, beside the calling one, which hashes them.
        progress: called with {"done": bytes, "total": bytes}, now and then with a "message".

    Raises:
        ConfigError, CheckpointError: it cannot be done; nothing has been written.
        StateError: it cannot be written, or another process is writing it; what is there is continued by another call.
    """
    started = time.monotonic()
    tensors = entries(index)
    check(outputs, index, tensors, out)
    limit = budget(outputs.operations(), tensors, max_memory, threads)
    read = source_files(outputs.operations(), tensors)
    laid = files(outputs)
    part = out.parent / f".{out.name}.{digest(outputs, tensors, read)[:16]}.part"
    check_disk(out, sum(file.size for file in laid), _held(part))
    with _one_line(out, part), _one_thread_each():
        part.mkdir(parents=True, exist_ok=True)
        journal = Journal(part)
        try:
            (part / MANIFEST).unlink(missing_ok=True)
            source = Source(tensors)
            written = _Execution(part, laid, source, limit, journal, outputs.seed, progress).run()
            manifest = {
                "schema": SCHEMA,
                **outputs.manifest,
                "versions": versions(),
                "seed": outputs.seed,
                "files": written,
                "source_files": {str(path): path.stat().st_size for path in read},
                "execution": {
                    "bytes_read": source.bytes,
                    "bytes_written": sum(file.size for file in laid),
                    "seconds": round(time.monotonic() - started, 3),
                },
            }
            write_whole(part / MANIFEST, json.dumps(manifest, indent=1), "manifest")
            _publish(part, out)
        finally:
            journal.close()
    return out


def least(outputs: Outputs, index: Index) -> int:
    """The least `max_memory` with which `execute` can do it."""
    return smallest(outputs.operations(), entries(index))


@dataclass(slots=True)
class _Execution:
    """The writing of all files."""

    part: Path
    files: list[File]
    source: Source
    limit: Budget
    journal: Journal
    seed: int
    progress: Progress | None
    done: int = 0
    reused: int = 0

    def run(self) -> dict[str, dict[str, Any]]:
        """Write what is not there, force it to disk; of every file its size and hash."""
        found: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            syncing = stack.enter_context(ThreadPoolExecutor(1))
            makers = stack.enter_context(ThreadPoolExecutor(self.limit.threads))
            stack.callback(makers.shutdown, cancel_futures=True)
            synced = []
            for file in self.files:
                handle = os.open(self.part / file.name, os.O_RDWR | os.O_CREAT, 0o644)
                stack.callback(os.close, handle)
                stack.callback(makers.shutdown, cancel_futures=True)  # before the file is closed under its writers
                found[file.name] = {"size": file.size, "sha256": self._file(file, handle, makers)}
                synced.append(syncing.submit(_synced, handle))
            for future in synced:
                future.result()
        extra = {path.name for path in self.part.iterdir()} - set(found) - {NAME}
        for name in extra:
            (self.part / name).unlink()
        return found

    def _file(self, file: File, handle: int, makers: ThreadPoolExecutor) -> str:
        if os.fstat(handle).st_size != file.size:
            os.ftruncate(handle, 0)
            if file.size:
                os.posix_fallocate(handle, 0, file.size)
        sha, crcs, offset = hashlib.sha256(), _Checksums(), 0
        for item, future in self._ahead(file, handle, makers):
            if future is None:
                assert isinstance(item, Known)
                data: Any = crcs.filled(item)
                _write(handle, data, offset)
            else:
                assert isinstance(item, Block)
                data, crc, old = future.result()
                crcs.add(item, crc)
                if not old:
                    self.journal.add((file.name, item.offset, item.length), crc)
                self.reused += item.length if old else 0
            sha.update(data)
            offset += len(data)
            self._report(len(data))
            del data, future  # room for the next one
        assert offset == file.size
        return sha.hexdigest()

    def _ahead(
        self, file: File, handle: int, makers: ThreadPoolExecutor
    ) -> Iterator[tuple[Known | Block, Future[Any] | None]]:
        """The parts of a file in order, as many of them being made ahead as there is memory for."""
        waiting: deque[tuple[Known | Block, Future[Any] | None]] = deque()
        transform: Transform | None = None
        ahead = 0
        for item in blocks(file, self.source.tensors, self.limit):
            if isinstance(item, Known):
                waiting.append((item, None))
                continue
            op = item.span.operation if isinstance(item.span, Made) else None
            if op is not None and (transform is None or transform.op is not op):
                transform = Transform(op, self.source.rows, seed=self.seed)
            waiting.append((item, makers.submit(self._block, file, handle, item, transform)))
            ahead += 1
            while ahead >= self.limit.window:
                first = waiting.popleft()
                ahead -= first[1] is not None
                yield first
                del first
        while waiting:
            yield waiting.popleft()

    def _block(self, file: File, handle: int, block: Block, transform: Transform | None) -> tuple[Any, int, bool]:
        """Its bytes, their checksum, and whether they were there already."""
        noted = self.journal.done.get((file.name, block.offset, block.length))
        if noted is not None:
            data = room(block.length)
            if os.preadv(handle, [data], block.offset) == block.length and zlib.crc32(data) == noted:
                return data, noted, True
            del data
        made = self._bytes(block, transform)
        _write(handle, made, block.offset)
        os.posix_fadvise(handle, block.offset, block.length, os.POSIX_FADV_DONTNEED)  # begins to write it out
        return made, zlib.crc32(made), False

    def _bytes(self, block: Block, transform: Transform | None) -> Any:
        if isinstance(block.span, Taken):
            data = room(block.length)
            read_into(block.span.source, block.start, data)
            return data
        op = block.span.operation
        if raw(op, self.source.tensors):
            assert op.source is not None
            entry = self.source.tensors[op.source]
            data = room(block.length)
            self.source.into(entry, block.start * row_bytes(entry), data)
            return data
        assert transform is not None
        made = transform.block(block.start, block.stop).contiguous()
        return made.reshape(-1).view(torch.uint8).numpy().data

    def _report(self, size: int) -> None:
        self.done += size
        if self.progress is None:
            return
        said: dict[str, Any] = {"done": self.done, "total": sum(file.size for file in self.files)}
        if self.reused:
            said["message"] = f"{self.reused} bytes were there already"
        self.progress(said)


class _Checksums:
    """The crc32 of each tensor of a file, from those of its blocks."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.span: Made | Taken | None = None

    def add(self, block: Block, crc: int) -> None:
        """The next block, in order."""
        if block.span is self.span:
            self.found[-1] = joined(self.found[-1], crc, block.length)
        else:
            self.span = block.span
            self.found.append(crc)

    def filled(self, known: Known) -> bytes:
        """Known bytes with the checksums of the tensors before them."""
        content = bytearray(known.content)
        for at, hole in known.checksums:
            content[at : at + 4] = self.found[hole].to_bytes(4, "little")
        return bytes(content)


def _write(handle: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


def _synced(handle: int) -> None:
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(part: Path, out: Path) -> None:
    (part / NAME).unlink()
    _sync_directory(part)
    if os.path.lexists(out):  # a rename would replace an empty directory
        raise ConfigError(f"out={str(out)!r} exists; legal is a directory that does not")
    os.rename(part, out)
    _sync_directory(out.parent)


def _held(part: Path) -> int:
    """Bytes on the disk that an earlier execution has allocated."""
    return sum(path.stat().st_blocks * 512 for path in part.iterdir()) if part.is_dir() else 0


@contextmanager
def _one_line(out: Path, part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = f"; {part} is kept, and the same call continues it" if part.is_dir() else ""
        raise StateError(f"{out} cannot be written: {error.strerror}{kept}") from error


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Blocks are what runs in parallel: torch's own threads would only get into their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
