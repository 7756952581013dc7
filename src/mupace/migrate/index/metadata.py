"""`.metadata` of torch.distributed.checkpoint: a pickle, read by an unpickler that knows a few classes and no other.

`torch.distributed.checkpoint.FileSystemReader.read_metadata` calls `pickle.load`, which runs whatever the file says.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError

LONGEST = 512 * 2**20
_CLASSES: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset(
        {
            *("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
            *("float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "uint16", "uint32", "uint64"),
        }
    ),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath"}),
    "pathlib._local": frozenset({"PosixPath", "PurePosixPath"}),
}


def metadata(file: Path) -> Any:
    """The `Metadata` in a file.

    Raises:
        CheckpointError: it names anything but the classes that torch writes, or is damaged.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    if file.stat().st_size > LONGEST:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes; legal are at most {LONGEST}")
    try:
        with file.open("rb") as f:
            found = _Restricted(f).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file} {error}") from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file} is damaged: {str(error).splitlines()[0] if str(error) else error!r}") from None
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{file} holds {type(found).__name__}: legal is Metadata of torch.distributed.checkpoint")
    return found


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise CheckpointError(
                f"asks for {module}.{name}, which metadata of torch.distributed.checkpoint never does: nothing of it "
                "was run; do not load this checkpoint with torch either"
            )
        if module.startswith("pathlib"):  # the path of a machine that may not be of this kind
            from pathlib import PurePosixPath

            return PurePosixPath
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError("holds references to other objects; the file is damaged")
