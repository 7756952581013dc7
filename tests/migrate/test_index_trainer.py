"""Folders of transformers' Trainer: numbered optimizer entries get names, with proof, or are refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, run_folder, trainer_folder

from mupace.errors import CheckpointError
from mupace.migrate.index import Entry, digest, index, read, read_rows
from mupace.migrate.index.naming import Parameter

pytestmark = pytest.mark.filterwarnings("ignore")
Order = Callable[[Sequence[str]], Sequence[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints after 20 and 40 updates."""
    return run_folder(tmp_path_factory.mktemp("run")).parent


def alone(run: Path, tmp_path: Path) -> Path:
    """The later checkpoint without the earlier one."""
    return Path(shutil.copytree(run / "checkpoint-40", tmp_path / "checkpoint-40"))


def truth() -> list[list[str]]:
    """The names of a Llama as the Trainer groups them."""
    named = list(llama().named_parameters())
    return [[n for n, p in named if p.ndim > 1], [n for n, p in named if p.ndim < 2]]


def asked(folder: Path) -> list[list[str]]:
    """The names as the Trainer itself groups them, from its own functions."""
    from transformers import AutoModelForCausalLM, Trainer

    model = AutoModelForCausalLM.from_pretrained(folder)
    decay = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    names = [n for n, _ in model.named_parameters()]
    return [[n for n in names if n in decay], [n for n in names if n not in decay]]


def reordered(folder: Path, order: Order) -> None:
    """Renumber the entries as if the optimizer had been built from the parameters in another order."""
    groups = truth()
    names = [n for g in groups for n in g]
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    state = dict(zip(names, (saved["state"][i] for i in range(len(names))), strict=True))
    own = [list(order(g)) for g in groups]
    saved["state"] = dict(enumerate(state[n] for g in own for n in g))
    torch.save(saved, folder / "optimizer.pt")


def _swap(a: str, b: str) -> Order:
    exchanged = {a: b, b: a}
    return lambda names: [exchanged.get(n, n) for n in names]


Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")


def test_every_entry_has_its_own_name_and_bytes(run: Path) -> None:
    check(run / "checkpoint-40")


@pytest.mark.slow
def test_so_it_is_with_a_real_trainer(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path, steps=40, every=20)
    assert asked(folder) == truth()
    (folder / "training_args.bin").write_bytes(b"never read")
    check(folder)


def check(folder: Path) -> None:
    """Names, bytes and proof of a folder with 40 updates."""
    found = index(folder)
    assert (found.kind, found.step) == ("hf_trainer", 40)
    assert found.state["max_steps"] == 40
    (optimizer,) = found.optimizers
    groups = truth()
    assert [list(g.names) for g in optimizer.groups] == groups
    assert optimizer.kind == "AdamW"
    assert [g.settings["weight_decay"] for g in optimizer.groups] == [0.1, 0.0]
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for i, name in enumerate(n for g in groups for n in g):
        state = optimizer.states[name]
        assert state["step"] == 40.0
        for key in ("exp_avg", "exp_avg_sq"):
            entry = state[key]
            assert isinstance(entry, Entry)
            assert torch.equal(read(entry), saved["state"][i][key]), name
            assert torch.equal(read_rows(entry, 3, 7), saved["state"][i][key][3:7])
    assert "only naming that reproduces 23 + 7 entries" in optimizer.proof
    assert "the movement since checkpoint-20 confirms" in optimizer.proof


def test_the_model_that_is_given_names_them_the_same(run: Path) -> None:
    folder = run / "checkpoint-40"
    assert digest(index(folder, model=llama())) == digest(index(folder))


def test_without_an_earlier_checkpoint_the_proof_says_what_it_rests_on(run: Path, tmp_path: Path) -> None:
    (optimizer,) = index(alone(run, tmp_path)).optimizers
    assert "the order of the others is the rule's" in optimizer.proof
    assert "the correlation of weights with their last updates confirms" in optimizer.proof


@pytest.mark.parametrize(
    "order",
    [
        lambda names: list(reversed(names)),
        lambda names: random.Random(0).sample(names, len(names)),
        lambda names: sorted(names, reverse=True),
    ],
)
def test_another_order_whose_shapes_differ_is_refused(order: Order, run: Path, tmp_path: Path) -> None:
    """The control: as if the user had built the optimizer with param groups of another kind."""
    folder = alone(run, tmp_path)
    assert index(folder).optimizers
    reordered(folder, order)
    with pytest.raises(CheckpointError) as error:
        index(folder)
    assert "fit no known rule for the model's 30 trainable parameters" in str(error.value)
    assert "build the optimizer from model.named_parameters()" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (_swap(Q, K), f"the states of ({Q} and {K}|{K} and {Q}) are exchanged"),
        (lambda names: [n.replace("layers.0.", "layers.x.").replace("layers.2.", "layers.0.")
                        .replace("layers.x.", "layers.2.") for n in names], "are exchanged"),
        (lambda names: [_turned(n) for n in names], "are exchanged"),
    ],
)  # fmt: skip
def test_another_order_of_equal_shapes_is_refused_by_the_movement(
    order: Order, says: str, run: Path, tmp_path: Path
) -> None:
    """Every shape agrees: only the numbers tell that layers, or projections, have been exchanged."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    reordered(copy / "checkpoint-40", order)
    with pytest.raises(CheckpointError, match=says):
        index(copy / "checkpoint-40")
    shutil.rmtree(copy / "checkpoint-20")  # the control: without the movement nothing contradicts, and it is not hidden
    proof = index(copy / "checkpoint-40").optimizers[0].proof
    assert _confirmed(proof) < _confirmed(index(run / "checkpoint-40").optimizers[0].proof)


def _confirmed(proof: str) -> int:
    return int(proof.split("confirms ")[1].split()[0])


def _turned(name: str) -> str:
    """Layer 0 -> 1 -> 2 -> 0."""
    parts = name.split(".")
    if "layers" in parts:
        parts[2] = str((int(parts[2]) + 1) % 3)
    return ".".join(parts)


@pytest.mark.slow
def test_groups_of_the_users_own(tmp_path: Path) -> None:
    """One group of all parameters is a rule as well; the embedding without decay is none that is known."""
    folder = trainer_folder(tmp_path / "one", groups=lambda m: list(m.parameters()))
    (optimizer,) = index(folder).optimizers
    assert [list(g.names) for g in optimizer.groups] == [[n for n, _ in llama().named_parameters()]]
    assert "one group, model.parameters()" in optimizer.proof

    def embedding_apart(model: Any) -> list[dict[str, Any]]:
        apart = [p for n, p in model.named_parameters() if "embed" in n or p.ndim < 2]
        rest = [p for n, p in model.named_parameters() if not ("embed" in n or p.ndim < 2)]
        return [{"params": rest}, {"params": apart, "weight_decay": 0.0}]

    with pytest.raises(CheckpointError, match=r"22 \+ 8 numbered entries fit no known rule"):
        index(trainer_folder(tmp_path / "two", groups=embedding_apart))

    def named(model: Any) -> list[dict[str, Any]]:
        pairs = list(model.named_parameters())
        return [{"params": pairs[::2]}, {"params": pairs[1::2]}]

    (optimizer,) = index(trainer_folder(tmp_path / "three", groups=named)).optimizers
    assert optimizer.proof.startswith("the checkpoint names every entry")
    assert list(optimizer.groups[1].names) == [n for n, _ in llama().named_parameters()][1::2]


def test_rules_that_disagree_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mupace.migrate.index import naming

    def other(p: Parameter) -> bool:  # as many in each group as the Trainer's rule, all shapes as well, other names
        name = p.name.replace("input", "post_attention") if "input" in p.name else p.name
        return "norm" not in name

    folder = alone(run, tmp_path)
    monkeypatch.setitem(naming.RULES, "other", other)
    assert index(folder).optimizers  # the control: it agrees about every name
    grouped = naming._grouped

    def turned(parameters: Any, first: Any) -> Any:
        made = grouped(parameters, first)
        return [made[0], made[1][::-1]] if first is other else made

    monkeypatch.setattr(naming, "_grouped", turned)
    with pytest.raises(CheckpointError, match="fit several rules that name them differently"):
        index(folder)


def test_what_names_the_parameters_must_be_there(run: Path, tmp_path: Path) -> None:
    folder = alone(run, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"nothing tells the order of the parameters; build the optimizer from"):
        index(folder)
    assert index(folder, model=llama()).optimizers[0].groups[0].names[0] == "model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match="fit no known rule"):
        index(folder, model=llama(num_hidden_layers=2))
    config = json.loads((run / "checkpoint-40" / "config.json").read_text())
    for change, says in (
        ({"architectures": ["Unknown"]}, r"architectures=\['Unknown'\] is no class of transformers"),
        ({"architectures": ["Trainer"]}, "is no class of transformers"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "is no class of transformers"),
        ({"model_type": "unheard_of"}, "the model cannot be built from it"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=says):
            index(folder)


@pytest.mark.slow
def test_a_tied_head_and_older_layouts(tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path, model=llama(tie_word_embeddings=True))
    found = index(folder)
    assert "lm_head.weight" not in found.weights
    assert "lm_head.weight" not in found.optimizers[0].states
    assert found.optimizers[0].states.keys() == found.weights.keys()
    (folder / "trainer_state.json").unlink()
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")  # as accelerate names it
    again = index(folder)
    assert again.kind == "safetensors"
    assert again.optimizers[0].states.keys() == found.optimizers[0].states.keys()
    assert again.step == 3


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "gemma2", "mixtral", "gpt_neox"])
@pytest.mark.slow
def test_other_families(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "head_dim": 8, "ffn_dim": 64,
        "word_embed_proj_dim": 32, "num_local_experts": 4, "pad_token_id": 0,
    }  # fmt: skip
    if family == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small))
    folder = trainer_folder(tmp_path, model=model, steps=20, every=10)
    (optimizer,) = index(folder).optimizers
    assert [list(g.names) for g in optimizer.groups] == asked(folder)
    assert _confirmed(optimizer.proof) > 0
