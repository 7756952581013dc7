"""Factors by role, as numbers: tables of a role's lr relative to the base's, and classes of roles."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Range = tuple[float, float, float]
"""Lowest, highest and used factor."""

SHARPNESS: Mapping[str, float] = MappingProxyType(
    {
        "embedding": 10,
        "attention_q": 8,
        "attention_k": 8,
        "attention_v": 4,
        "attention_o": 4,
        "attention_qkv": 4,  # one rate for three matrices: that of the sharpest, the value; this library's choice
        "ffn": 6,
        "norm": 1,
    }
)
"""Multiples of the norms' rate: Norm 1, VO 4, FFN 6, QK 8, Emb 10 in Wang et al., "The Sharpness Disparity Principle in
Transformers for Accelerating Language Model Pre-Training" (arXiv 2502.19002)."""


def _around(times: float) -> Range:
    """0.8 to 1.25 times what is published, no source: this library's choice; ffn, the unit, stands still."""
    used = times / SHARPNESS["ffn"]
    return (used, used, used) if used == 1 else (0.8 * used, 1.25 * used, used)


ROLE_PRESETS: Mapping[str, Mapping[str, Range]] = MappingProxyType(
    {
        "stability": MappingProxyType(
            {
                "embedding": (0.60, 0.75, 0.675),
                "attention_q": (0.90, 0.90, 0.90),
                "attention_k": (0.90, 0.90, 0.90),
                "attention_v": (0.90, 0.90, 0.90),
                "attention_qkv": (0.90, 0.90, 0.90),
                "ffn": (1.00, 1.00, 1.00),
                "norm": (1 / 3, 1 / 2, 0.40),
            }
        ),
        "sharpness": MappingProxyType({role: _around(times) for role, times in SHARPNESS.items()}),
    }
)
"""Preset to role to (lowest, highest, used) lr factor; `mupace.scales.role_policy` says what is known of them."""

DECAY_PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType({"stability": {"embedding": 1.5}, "sharpness": {}})
"""Preset to role to lr · weight_decay relative to the base's. 1.5 has no source: this library's choice; over the
range of the embedding's lr it stays between 1.33 and 1.67."""

ROLE_CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"attention": ("attention_q", "attention_k", "attention_v", "attention_qkv", "attention_o")}
)
"""Names for several roles together, for `groups(..., split=...)`."""
