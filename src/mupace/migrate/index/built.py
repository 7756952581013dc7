"""The parameters of a transformers model as they are in memory, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index.naming import REMEDY, Parameter, parameters_of


def parameters_from_config(file: Path, config: Mapping[str, Any]) -> list[Parameter]:
    """Build the class that config.json names on the meta device.

    Raises:
        CheckpointError: transformers is not installed, or it does not know the class.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise CheckpointError(f"{file}: to name numbered optimizer entries transformers is needed; {REMEDY}") from None
    names = config.get("architectures") or []
    built = getattr(transformers, names[0], None) if len(names) == 1 and str(names[0]).isidentifier() else None
    if config.get("auto_map") or not isinstance(built, type) or not issubclass(built, transformers.PreTrainedModel):
        raise CheckpointError(
            f"{file}: architectures={names} is no class of transformers {transformers.__version__}; {REMEDY}"
        )
    try:
        made = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
        with torch.device("meta"):
            return parameters_of(built(made))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{file}: the model cannot be built from it ({reason}); {REMEDY}") from None
