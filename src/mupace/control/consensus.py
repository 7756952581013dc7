"""One decision on all ranks: rank 0 decides, all hear the same bytes, and all prove that they did the same.

The calls have a static schedule: every rank makes the same ones at every tick, whatever was decided, measured or went
wrong. They use a gloo group of their own on the CPU, so they never wait for a device, and never mix with the model's.

    share:  one broadcast of a fixed header (version, tick, update, length, first 16 bytes of SHA-256 of the payload);
            a second one of the payload where there is one
    digest: one all-reduce MAX of (d, -d), which is MAX and MIN of d at once; d = the first 64 bits of SHA-256 of step,
            names, rates and locks, as two halves of 32 bits
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mupace.errors import ConfigError, RankDivergence, StateError
from mupace.files import write_whole
from mupace.pacer import ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = 1
TIMEOUT = 600.0  # seconds, as torch's own for NCCL; longer than an evaluation or a save that one rank does alone
LARGEST = 1 << 26  # bytes of a payload; no source: this library's choice, a header beyond it is taken for garbage


class Consensus:
    """What the ranks of one run say to each other at every tick.

    All ranks must make it at the same place, as it makes a process group. In a single process there is nobody to talk
    to, and every call gives what it would give among several.

    Args:
        process_group: one that exists, with its own timeout; it must take CPU tensors. None: a new gloo group.
        timeout: seconds after which a rank that does not answer is given up. Longer than any work that one rank does
            while the others wait.
        directory: where a dump is written when the ranks diverge; None for no dump.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        timeout: float = TIMEOUT,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if not 0 < timeout < 1e9:
            raise ConfigError(f"timeout={timeout!r}: legal is a positive number of seconds")
        self.timeout = timeout
        self.directory = None if directory is None else Path(directory)
        self.tick = 0
        self._own = process_group is None and ranks.together()
        self.process_group: Any = process_group  # read by reductions; None in a single process
        if self._own:
            self.process_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group) if self.process_group is not None else 0

    @property
    def size(self) -> int:
        return dist.get_world_size(self.process_group) if self.process_group is not None else 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def share(self, payload: bytes | None = None, step: int = 0) -> bytes:
        """The leader's bytes, on every rank; one tick.

        Args:
            payload: what the leader says, None or b"" for nothing; None on the others.
            step: updates that this rank has done; must be the leader's.

        Raises:
            ConfigError: a rank that does not lead gives a payload.
            StateError: a rank left or does not answer in time.
            RankDivergence: this rank is at another tick or update than the leader, or what it heard is damaged.
        """
        if payload is not None and not self.leads:
            raise ConfigError(f"payload={payload!r:.40} on rank {self.rank}: legal is None, rank 0 decides")
        said = payload or b""
        if len(said) > LARGEST:
            raise ConfigError(f"payload has {len(said)} bytes: legal are at most {LARGEST}")
        self.tick += 1
        if self.size == 1:
            return said
        with self.heard("share"):
            header = self._from_leader(torch.tensor(_header(self.tick, step, said), dtype=torch.int64))
            length = self._checked(header, step)
            if length == 0:
                return b""
            mine = bytearray(said if self.leads else length)
            body = torch.frombuffer(mine, dtype=torch.uint8)
            heard = self._from_leader(body).numpy().tobytes()
        if _header(self.tick, step, heard) != header.tolist():
            raise RankDivergence(f"tick {self.tick}: rank {self.rank} heard a payload that is not what rank 0 said")
        return heard

    def _from_leader(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, src=dist.get_global_rank(self.process_group, 0), group=self.process_group)
        return tensor

    def _checked(self, header: torch.Tensor, step: int) -> int:
        """The length in a header that belongs to this tick."""
        version, *there, length = header.tolist()[:4]
        if version != VERSION:
            raise RankDivergence(f"rank {self.rank} speaks version {VERSION}, rank 0 version {version}: legal is one")
        if there != [self.tick, step] or not 0 <= length <= LARGEST:
            raise RankDivergence(
                f"the ranks disagree: rank {self.rank} is at update {step} (tick {self.tick}), rank 0 at update "
                f"{there[1]} (tick {there[0]})"
            )
        return int(length)

    def digest(
        self,
        step: int,
        names: Sequence[str],
        lrs: Sequence[float],
        wds: Sequence[float] = (),
        locks: Mapping[str, Any] | None = None,
    ) -> int:
        """Prove that all ranks are at the same numbers; the 64 bits that they share.

        Args:
            step: updates done.
            names: of the groups.
            lrs, wds: what stands in the optimizer, a number per group, compared to the last bit; `wds` may be empty.
            locks: group -> its lock, as JSON values.

        Raises:
            RankDivergence: on every rank, naming the first rank and group that differ from rank 0, and both numbers;
                all numbers of all ranks are in `divergence.rank<r>.json` in `directory`.
            StateError: a rank left or does not answer in time.
        """
        lrs, wds, locks = [float(x) for x in lrs], [float(x) for x in wds], locks or {}
        bits = _bits(step, names, lrs, wds, locks)
        if self.size == 1:
            return bits
        mine = [bits >> 32, bits & 0xFFFFFFFF]
        both = torch.tensor([*mine, *(-half for half in mine)], dtype=torch.int64)
        with self.heard("digest"):
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.process_group)
        most, least = both[:2], -both[2:]
        if not torch.equal(most, least):
            self._diverged(
                {
                    "step": step,
                    "lr": dict(zip(names, lrs, strict=True)),
                    "weight_decay": dict(zip(names, wds, strict=True)) if wds else {},
                    "lock": dict(locks),
                }
            )
        return bits

    def _diverged(self, mine: dict[str, Any]) -> None:
        """Every rank comes here at once: all see all numbers, write them down, and raise the same error."""
        with self.heard("digest"):
            found = ranks.gathered(mine, self.process_group)
        message = ranks.difference(found)
        if self.directory is not None:
            path = self.directory / f"divergence.rank{self.rank}.json"
            rows = [{"rank": rank, **numbers} for rank, numbers in enumerate(found)]
            try:
                write_whole(path, json.dumps({"message": message, "tick": self.tick, "ranks": rows}, indent=1), "dump")
            except StateError as error:  # the divergence is what has to be known
                message += f" (and {error})"
            else:
                message += f" (all numbers in {path})"
        raise RankDivergence(message)

    @contextmanager
    def heard(self, call: str) -> Iterator[None]:
        """Any collective call on `process_group`: a rank that left or keeps silent becomes an error that says so.

        Raises:
            StateError: in place of torch's RuntimeError. The process group is of no use from then on.
        """
        try:
            yield
        except RuntimeError as error:  # torch's words name the peer's address or the time that passed
            words = str(error).strip().partition("\n")[0]
            raise StateError(
                f"rank {self.rank}, {call} at tick {self.tick}: another rank left or did not answer within "
                f"{self.timeout:g} s ({words:.200})"
            ) from error

    def close(self) -> None:
        """Give the process group back, if it is our own; may be called twice."""
        if self._own and self.process_group is not None and ranks.together():
            dist.destroy_process_group(self.process_group)
        self._own, self.process_group = False, None


def _header(tick: int, step: int, payload: bytes) -> list[int]:
    first, second = struct.unpack("<qq", hashlib.sha256(payload).digest()[:16])
    return [VERSION, tick, step, len(payload), first, second]


def _bits(step: int, names: Sequence[str], lrs: Sequence[float], wds: Sequence[float], locks: Mapping[str, Any]) -> int:
    """The first 64 bits of SHA-256 of everything, floats as their bytes."""
    words = json.dumps([step, list(names), len(lrs), len(wds), locks], sort_keys=True).encode()
    numbers = struct.pack(f"<{len(lrs) + len(wds)}d", *lrs, *wds)
    return int.from_bytes(hashlib.sha256(words + numbers).digest()[:8], "big")
