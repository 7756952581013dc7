"""Computing in float64 what a model computes in float32 by its own will."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Inside the block a float64 tensor is never rounded to float32.

    Norms, softmax and rotary tables of transformers are computed in float32 whatever their input is. The rounding is
    1e-7 of a value, and after some updates 1e-6 of a loss, where what is looked for is smaller. Neither the model nor
    its modules are changed: `x.float()`, `x.to(torch.float32)` and `dtype=torch.float32` are answered in float64 when
    x is float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if func is torch.Tensor.float:
                return first
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)
