"""Small real checkpoints, as their producers write them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def net(seed: int = 0, *, tied: bool = False) -> nn.Sequential:
    """Two square layers of equal shape, one wide one, a norm."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 9))
    if tied:
        model[1].weight = model[0].weight
    return model


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """A few updates on random numbers."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def llama(**changes: Any) -> Any:
    """Four layers, all projections of attention of one shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, **changes,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**fields))


def run_folder(root: Path, *, steps: int = 40, every: int = 20) -> Path:
    """`checkpoint-N` as the Trainer lays it out, from a loop of our own; 8 times faster than the Trainer to import."""
    model = llama()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    data = _Text(model.config.vocab_size)
    for step in range(1, steps + 1):
        batch = data.rows[4 * step % 64 :][:4]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if step % every == 0:
            folder = root / f"checkpoint-{step}"
            model.save_pretrained(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            state = {"global_step": step, "max_steps": steps, "num_input_tokens_seen": 0}
            (folder / "trainer_state.json").write_text(json.dumps(state))
    return root / f"checkpoint-{steps}"


class _Text(torch.utils.data.Dataset[Any]):
    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(2)
        steps = torch.randint(1, 4, (64, 17), generator=generator)
        self.rows = steps.cumsum(1) % vocabulary

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer_folder(
    root: Path,
    *,
    steps: int = 3,
    every: int = 0,
    lr: float = 1e-3,
    model: Any = None,
    groups: Callable[[Any], Sequence[Any]] | None = None,
    **options: Any,
) -> Path:
    """`checkpoint-N` as transformers' Trainer writes it; `groups` builds an optimizer of the user's own."""
    from transformers import Trainer, TrainingArguments

    model = llama() if model is None else model
    optimizer = None if groups is None else torch.optim.AdamW(groups(model), lr=lr)
    arguments = TrainingArguments(
        output_dir=str(root), max_steps=steps, save_steps=every or steps, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, learning_rate=lr, weight_decay=0.1, lr_scheduler_type="constant", disable_tqdm=True,
        logging_steps=10**6, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            model=model, args=arguments, train_dataset=_Text(model.config.vocab_size), optimizers=(optimizer, None)
        )
        trainer.train()
    return root / f"checkpoint-{steps}"


def safetensors_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a file, to be changed and written again."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(file: Path, header: dict[str, Any] | str, data: bytes) -> None:
    """With this header, right or wrong."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
