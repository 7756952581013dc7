"""A slow, readable widening of a trained model by duplication: what the scaling rules must be exact for.

E duplicates each coordinate k times. h' = E h for activations needs W' = E_out W E_in^T / k_in; gradients are then
G' = E_out G E_in^T / k_out. The layouts below are written by hand for each family, from the modelling code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Factors = Sequence[tuple[int, int]]  # (size, copies) of each factor of one dimension, outermost first
Layout = Callable[[str], tuple[list[Factors], float]]  # name -> factors of each dimension, k_in


def duplicated(tensor: torch.Tensor, dimensions: Sequence[Factors]) -> torch.Tensor:
    for dim, factors in enumerate(dimensions):
        moved = tensor.movedim(dim, -1)
        lead = moved.shape[:-1]
        moved = moved.reshape(*lead, *(size for size, _ in factors))
        for i, (_, copies) in enumerate(factors):
            moved = moved.repeat_interleave(copies, dim=len(lead) + i)
        tensor = moved.reshape(*lead, -1).movedim(-1, dim).contiguous()
    return tensor


def llama(*, d: int, heads: int, kv: int, head_dim: int, f: int, k: int, k_heads: int, k_kv: int, k_f: int) -> Layout:
    """Width by k, query heads by k_heads, key-value heads by k_kv (the rest in repeats), feed-forward by k_f."""
    D, F = [(d, k)], [(f, k_f)]
    Q = [(kv, k_kv), (heads // kv, k_heads // k_kv), (head_dim, 1)]
    KV = [(kv, k_kv), (head_dim, 1)]

    def layout(name: str) -> tuple[list[Factors], float]:
        if "embed_tokens" in name:
            return [[(0, 1)], D], 1
        if "lm_head" in name:
            return [[(0, 1)], D], k
        if "q_norm" in name or "k_norm" in name:
            return [[(head_dim, 1)]], 1
        if "norm" in name:
            return [D], 1
        if "q_proj" in name:
            return [Q, D], k
        if "k_proj" in name or "v_proj" in name:
            return [KV, D], k
        if "o_proj" in name:
            return [D, Q], k_heads
        if "gate_proj" in name or "up_proj" in name:
            return [F, D], k
        if "down_proj" in name:
            return [D, F], k_f
        raise KeyError(name)

    return layout


def gpt2(*, d: int, heads: int, f: int, k: int, tied: bool = True) -> Layout:
    """Conv1D is (in, out); the fused projection (3, heads, head size); a tied readout puts 1/k into the last norm."""
    D, F = [(d, k)], [(f, k)]
    QKV, H = [(3, 1), (heads, k), (d // heads, 1)], [(heads, k), (d // heads, 1)]

    def layout(name: str) -> tuple[list[Factors], float]:
        if "wte" in name or "wpe" in name:
            return [[(0, 1)], D], 1
        if "ln_f" in name:
            return [D], k if tied else 1
        if "ln_" in name:
            return [D], 1
        if "c_attn" in name:
            return ([D, QKV], k) if "weight" in name else ([QKV], 1)
        if "attn.c_proj" in name:
            return ([H, D], k) if "weight" in name else ([D], 1)
        if "c_fc" in name:
            return ([D, F], k) if "weight" in name else ([F], 1)
        if "mlp.c_proj" in name:
            return ([F, D], k) if "weight" in name else ([D], 1)
        raise KeyError(name)

    return layout


def gemma(*, d: int, heads: int, kv: int, head_dim: int, f: int, k: int) -> Layout:
    """As llama, tied. Embeddings are multiplied by √d, so they are divided by √k; the last norm makes up for the rest:
    k copies, each with 1/√k from the matrix, want a gain of 1/√k. It is used as 1 + w, and `widen` divides 1 + w."""
    plain = llama(d=d, heads=heads, kv=kv, head_dim=head_dim, f=f, k=k, k_heads=k, k_kv=k, k_f=k)

    def layout(name: str) -> tuple[list[Factors], float]:
        dimensions, k_in = plain(name)
        return dimensions, k**0.5 if "embed_tokens" in name or name == "model.norm.weight" else k_in

    return layout


@torch.no_grad()
def widen(small: torch.nn.Module, wide: torch.nn.Module, layout: Layout) -> None:
    """Give `wide` the duplicated weights of `small`."""
    theirs = dict(small.named_parameters())
    for name, tensor in wide.named_parameters():
        dimensions, k_in = layout(name)
        whole = [[(theirs[name].shape[i], 1)] if f == [(0, 1)] else f for i, f in enumerate(dimensions)]
        offset = float("norm" in name and "Gemma" in type(small).__name__)
        tensor.copy_((duplicated(theirs[name], whole) + offset) / k_in - offset)
