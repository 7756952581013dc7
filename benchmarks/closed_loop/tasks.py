"""What is trained: a model, its batches and its validation set, all functions of a seed."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mupace.trainer.data import Blocks, Sampler, read_corpus, split
from mupace.trainer.tokens import ByteTokenizer

SEQ, BATCH = 64, 16
STEPS = 300
VALID = {"mid": 128, "end": 1024}  # sequences
CORRUPTED = 0.3
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of run.

    Attributes:
        build: seed -> model.
        batches: (seed, steps) -> one tensor whose first axis is the update.
        loss: (model, batch) -> loss with a graph.
        evaluate: (model, "mid" or "end") -> validation loss.
        nothing: what a failed run scores.
        optimizer: "adamw" or "sgd".
        clip: largest gradient norm.
        exponents: of the tuning grid, powers of 2.
    """

    name: str
    build: Callable[[int], nn.Module]
    batches: Callable[[int, int], Tensor]
    loss: Callable[[Any, Tensor], Tensor]
    evaluate: Callable[[Any, str], float]
    nothing: float
    optimizer: str = "adamw"
    clip: float = 1.0
    steps: int = STEPS
    evals: int = 20
    exponents: tuple[int, ...] = (-9, -8, -7, -6, -5, -4, -3)


# --- text ----------------------------------------------------------------------------------------------------------


def docstrings(source: bytes) -> str:
    """All docstrings of a file of Python, one after the other."""
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


@lru_cache
def source_text() -> tuple[Blocks, Blocks]:
    """The standard library's source: training and validation."""
    parts = split(read_corpus("stdlib"))
    train, valid = (Blocks(ByteTokenizer().stream(part.contents), SEQ) for part in parts)
    return train, valid


@lru_cache
def prose() -> tuple[Blocks, Blocks]:
    """The docstrings of the same files, split as the files are."""
    out = []
    for part in split(read_corpus("stdlib")):
        texts = [text.encode() for d in part.documents if (text := docstrings(d.data))]
        out.append(Blocks(ByteTokenizer().stream(texts), SEQ))
    return out[0], out[1]


def drawn(blocks: Blocks, seed: int, steps: int) -> Tensor:
    """int64 (steps, BATCH, SEQ + 1)"""
    sampler = Sampler(len(blocks), batch=BATCH, seed=seed)
    return torch.stack([blocks.take(next(sampler)) for _ in range(steps)])


def shifted(seed: int, steps: int) -> Tensor:
    half = steps // 2
    return torch.cat([drawn(source_text()[0], seed, half), drawn(prose()[0], seed, steps - half)])


def partly_shuffled(seed: int, steps: int) -> Tensor:
    """A share of the sequences has its bytes in random order."""
    batches = drawn(source_text()[0], seed, steps).flatten(0, 1)  # (steps·BATCH, SEQ + 1)
    rng = np.random.default_rng([seed, 4])
    bad = torch.from_numpy(rng.random(len(batches)) < CORRUPTED)
    order = torch.from_numpy(rng.random(batches.shape).argsort(1))
    batches[bad] = batches[bad].gather(1, order[bad])
    return batches.unflatten(0, (steps, BATCH))


def llama(seed: int) -> nn.Module:
    """Unmodified Llama of transformers: 2 layers of width 32, tied head, 35 008 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=SEQ,
        tie_word_embeddings=True,
        initializer_range=0.1,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def next_byte(model: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy, nats a byte."""
    logits = model(input_ids=ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def over(*sets: Callable[[], tuple[Blocks, Blocks]]) -> Callable[[Any, str], float]:
    """Evaluation on equal shares of the validation text of each."""

    @lru_cache
    def fixed(size: str) -> Tensor:
        parts = [s()[1] for s in sets]
        n = min(VALID[size] // len(parts), *map(len, parts))
        return torch.cat([b.take(b.spread(n)) for b in parts])

    def evaluate(model: Any, size: str) -> float:
        ids = fixed(size)
        with torch.no_grad():
            return sum(float(next_byte(model, chunk)) * len(chunk) for chunk in ids.split(64)) / len(ids)

    return evaluate


# --- fine-tuning ---------------------------------------------------------------------------------------------------


@lru_cache
def pretrained() -> dict[str, Tensor]:
    """Weights of (b) after its run at a rate of 2^-6, linear to zero, seed 3: the same for every fine-tune."""
    model, batches = llama(3), drawn(source_text()[0], 3, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2**-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for i, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 2**-6 * min((i + 0.5) / 15, 1 - (i + 0.5) / STEPS)
        next_byte(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def adapted(seed: int) -> nn.Module:
    """The pretrained model with LoRA of rank 4 on every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model

    model = llama(3)
    model.load_state_dict(pretrained())
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=names)).train()


# --- quadratic -----------------------------------------------------------------------------------------------------

DIMS, SPREAD = 200, 2.0
CURVATURE = torch.logspace(0, -4, DIMS, dtype=torch.float64)


class Bowl(nn.Module):
    """½ Σ h w², w at the start normal with standard deviation SPREAD; the optimum is 0."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng([seed, 0])
        self.w = nn.Parameter(torch.from_numpy(rng.normal(0, SPREAD, DIMS)))


def noisy(model: Any, noise: Tensor) -> Tensor:
    """Its gradient is h·w + √h·noise."""
    w = model.w
    return (0.5 * CURVATURE * w * w + CURVATURE.sqrt() * noise * w).sum()


def exact(model: Any, size: str) -> float:
    w = model.w.detach()
    return float((0.5 * CURVATURE * w * w).sum())


def normal_noise(seed: int, steps: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 1]).normal(0, 1, (steps, DIMS)))


NATS = math.log(257)
TASKS = {
    t.name: t
    for t in (
        Task(
            name="quadratic",
            build=Bowl,
            batches=normal_noise,
            loss=noisy,
            evaluate=exact,
            nothing=float(0.5 * SPREAD**2 * CURVATURE.sum()),
            optimizer="sgd",
            clip=20.0,  # about twice the norm at the start
            exponents=(-6, -5, -4, -3, -2, -1, 0),
        ),
        Task(
            name="source",
            build=llama,
            batches=lambda seed, steps: drawn(source_text()[0], seed, steps),
            loss=next_byte,
            evaluate=over(source_text),
            nothing=NATS,
        ),
        Task(
            name="shift",
            build=llama,
            batches=shifted,
            loss=next_byte,
            evaluate=over(source_text, prose),
            nothing=NATS,
        ),
        Task(
            name="corrupted",
            build=llama,
            batches=partly_shuffled,
            loss=next_byte,
            evaluate=over(source_text),
            nothing=NATS,
        ),
        Task(
            name="lora",
            build=adapted,
            batches=lambda seed, steps: drawn(prose()[0], seed, steps),
            loss=next_byte,
            evaluate=over(prose),
            nothing=NATS,
            steps=150,
        ),
    )
}
