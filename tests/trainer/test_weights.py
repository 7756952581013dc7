"""Weights of samples in a run: whose block it is, what the loss and the controller make of it, and the resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import SOURCE, TINY, Crashed, config, crash_at, here, initial, overflow, run, weights

from mupace.cli import run as command
from mupace.complexity import Bands, score
from mupace.control import replay
from mupace.control.rerun import readings_of
from mupace.errors import CheckpointError, ConfigError, MupaceWarning
from mupace.record import read
from mupace.trainer.compute import Compute
from mupace.trainer.config import RunConfig
from mupace.trainer.data import Sampler, read_corpus, split
from mupace.trainer.loop import Trainer, prepare
from mupace.trainer.tokens import ByteTokenizer, HFTokenizer, document_ends, resolve_tokenizer
from mupace.trainer.weights import REST, SCORES, owners
from mupace.weighting import Composition, weighted_causal_loss

__all__ = ["here"]

HALF = {"synthetic/*": 0.5}


@pytest.fixture(autouse=True)
def texts(here: None) -> None:
    """Two folders of text in documents of many lengths."""
    at = 0
    for i in range(24):
        folder = Path("texts", "synthetic" if i % 3 == 0 else "books")
        folder.mkdir(parents=True, exist_ok=True)
        size = 40 + 211 * i % 997
        (folder / f"{i:02}.txt").write_text(SOURCE[at : at + size])
        at += size


def weighted(steps: int = 6, sources: dict[str, float] | None = None, **changes: Any) -> RunConfig:
    given = {"sources": HALF if sources is None else sources, **changes.pop("more", {})}
    return config(steps, data__text="texts", weights=given, **changes)


def plain(steps: int = 6, **changes: Any) -> RunConfig:
    return config(steps, data__text="texts", **changes)


def control(mode: str = "act", every: int = 4, **data: Any) -> dict[str, Any]:
    quick = {"beta1": 0.0, "lags": 2.0, **data}  # acts after two updates
    rule = {"bounds": [0.25, 4.0], "options": {"holds": 0.0}, "average": False}
    return {"mode": mode, "every": f"{every} steps", "policies": ["data"], "policy": {"data": quick}, **rule}


def same(one: str, two: str) -> bool:
    a, b = weights(one), weights(two)
    return all(torch.equal(a[k], b[k]) for k in a)


def losses(out: str) -> list[float]:
    return list(read(out).updates["loss"])


def compute_of(c: RunConfig) -> Compute:
    return Compute(prepare(c), torch.amp.GradScaler("cpu", enabled=False))


def gradients(c: RunConfig, blocks: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    compute = compute_of(c)
    compute.accumulate(blocks)
    return {k: p.grad.double() for k, p in compute.model.named_parameters() if p.grad is not None}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)


# Whose block it is


def train_documents() -> list[bytes]:
    return split(read_corpus("texts"))[0].contents


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_documents_end_where_they_are_joined(spec: str) -> None:
    documents = train_documents()
    tokenizer = resolve_tokenizer(spec, documents, "key", Path("cache"))
    ids, ends = tokenizer.stream(documents), document_ends(tokenizer.stream(documents), documents, tokenizer)
    for first, end, data in zip([0, *ends], ends, documents, strict=False):
        assert tokenizer.decode(ids[first:end].tolist()).encode() == data


def test_a_text_that_spells_the_end_of_a_document() -> None:
    """Where the end of a document is an ordinary token, its id alone does not say where documents end."""
    from transformers import AutoTokenizer

    ByteTokenizer().save(Path("tok"))
    backend = AutoTokenizer.from_pretrained("tok")
    backend.eos_token = "e"
    tokenizer, documents = HFTokenizer(backend, name="tok", sha256=""), train_documents()
    ids = tokenizer.stream(documents)
    assert (ids == tokenizer.end_of_document).sum() > len(documents)
    assert document_ends(ids, documents, tokenizer).tolist() == np.cumsum([len(d) + 1 for d in documents]).tolist()


def test_a_block_is_of_the_document_with_most_of_its_tokens() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        ends = np.cumsum(draw.integers(1, 30, size=draw.integers(1, 20)))
        seq_len = int(draw.integers(1, 12))
        blocks = int(ends[-1] - 1) // seq_len
        of_token = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        expected = [  # argmax: the first of equals
            int(np.bincount(of_token[i * seq_len + 1 : (i + 1) * seq_len + 1]).argmax()) for i in range(blocks)
        ]
        assert owners(ends, blocks, seq_len).tolist() == expected


def test_every_block_has_its_documents_weight() -> None:
    data = prepare(weighted(sources={"*/00.txt": 1.5, "synthetic/*": 0.5}, more={"default": 0.8})).data
    assert data.weights is not None
    train, _ = split(read_corpus("texts"))
    factor = {REST: 0.8, "*/00.txt": 1.5, "synthetic/*": 0.5}
    seen = set()
    for block in range(len(data.train)):
        text = bytes(i for i in data.train.take(np.array([block]))[0, 1:].tolist() if i < 256)
        (source,) = data.weights.sources_of(np.array([block]))
        assert data.weights.of(np.array([block])).tolist() == [factor[source]]
        holders = [d.name for d in train.documents if text in d.data]
        if len(holders) == 1:  # a block of one document
            named = "*/00.txt" if holders[0] == "synthetic/00.txt" else "synthetic/*"
            assert source == (named if holders[0].startswith("synthetic") else REST)
            seen.add(source)
    assert seen >= {REST, "synthetic/*"}


# The loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equal_weights_are_the_run_without_them(accumulate: int) -> None:
    run(plain(batch__accumulate=accumulate), "plain")
    run(weighted(sources={"*": 0.5}, batch__accumulate=accumulate), "equal")
    run(weighted(batch__accumulate=accumulate), "weighted")
    assert losses("equal") == losses("plain")
    assert same("equal", "plain")
    assert losses("weighted") != losses("plain")  # the control: other weights are another run
    assert not same("weighted", "plain")


def mixed_blocks(c: RunConfig, n: int) -> np.ndarray[Any, Any]:
    """Blocks whose first half is of one weight, and the second of both."""
    known = prepare(c).data.weights
    assert known is not None
    good, weak = np.flatnonzero(known.raw == 1.0), np.flatnonzero(known.raw == 0.5)
    return np.concatenate([good[: n // 2], weak[: n // 2 - 1], good[-1:]])


def test_the_gradient_is_the_weighted_mean_however_it_is_accumulated() -> None:
    whole = weighted(batch__micro=8)
    blocks = mixed_blocks(whole, 8)
    compute = compute_of(whole)
    ids = compute.parts.data.train.take(blocks)
    raw = torch.tensor([1.0] * 4 + [0.5] * 3 + [1.0])
    logits = compute.model(input_ids=ids).logits[:, :-1]
    by_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    ((raw * by_token.mean(1)).sum() / raw.sum()).backward()
    by_hand = {k: p.grad.double() for k, p in compute.model.named_parameters() if p.grad is not None}

    found = {n: gradients(weighted(batch__micro=8 // n, batch__accumulate=n), blocks) for n in (1, 2, 4)}
    assert max(distance(g, by_hand) for g in found.values()) < 1e-5
    assert distance(gradients(plain(batch__micro=8), blocks), by_hand) > 1e-2


def test_weights_normalised_in_each_micro_batch_are_others() -> None:
    """The negative control of the test above: what a loop that looks at one micro-batch at a time would compute."""
    whole, halves = weighted(batch__micro=8), weighted(batch__micro=4, batch__accumulate=2)
    blocks = mixed_blocks(whole, 8)
    right, compute = gradients(whole, blocks), compute_of(halves)
    known = compute.parts.data.weights
    assert known is not None
    for part in np.split(blocks, 2):
        raw, ids = known.of(part).float(), compute.parts.data.train.take(part)
        (weighted_causal_loss(compute.model(input_ids=ids).logits, ids, raw / raw.mean(), per="token") / 2).backward()
    wrong = {k: p.grad.double() for k, p in compute.model.named_parameters() if p.grad is not None}
    assert distance(wrong, right) > 1e-2
    assert distance(gradients(halves, blocks), right) < 1e-5


@pytest.mark.parametrize(("name", "more"), [("llama", {}), ("gpt2", {}), ("mixtral", {"output_router_logits": True})])
def test_a_weighted_loss_is_the_models_own_where_weights_are_1(name: str, more: dict[str, Any]) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2} if name == "gpt2" else TINY
    compute = compute_of(weighted(model={"name": name, "config": {**sizes, **more}}))
    compute.model.eval()
    ids = compute.parts.data.train.take(np.arange(2))
    own = compute._loss(ids, None)
    assert torch.equal(compute._loss(ids, torch.ones(2)), own)
    assert not torch.equal(compute._loss(ids, torch.tensor([0.5, 1.5])), own)
    if more:  # what the routers add is there in both
        assert not torch.equal(weighted_causal_loss(compute.model(input_ids=ids).logits, ids, per="token"), own)


def test_evaluation_and_probe_are_unweighted() -> None:
    c = weighted()
    one, two = compute_of(c), compute_of(plain())
    blocks = mixed_blocks(c, 8)
    assert one.evaluate() == two.evaluate()
    assert one.loss(blocks) == two.loss(blocks)


# Readings, and the policy


def expected(c: RunConfig, steps: int, every: int) -> list[tuple[float, float]]:
    data = prepare(c).data
    assert data.weights is not None
    batch = c.batch.micro * c.batch.accumulate
    sampler, found = Sampler(len(data.train), batch=batch, seed=c.run.seed), []
    for _ in range(steps // every):
        blocks = np.concatenate([next(sampler) for _ in range(every)])
        found.append((data.weights.raw[blocks].mean(), np.bincount(data.weights.source[blocks]).max() / len(blocks)))
    return found


def read_values(out: str) -> list[tuple[float, float]]:
    return [(r.values["data.quality"], r.values["data.share"]) for r in readings_of(out)[0]]


def test_the_controller_reads_what_the_data_was_made_of() -> None:
    c = weighted(12, control=control("observe"), more={"apply": "lr"}, batch__accumulate=2)
    run(c)
    assert read_values("run") == [pytest.approx(pair) for pair in expected(c, 12, 4)]
    assert len(set(read_values("run"))) > 1
    run(plain(12, batch__accumulate=2), "plain")
    assert same("run", "plain")  # with apply="lr" the loss is the plain one


def test_data_of_a_skipped_update_is_not_counted() -> None:
    c = weighted(4, control=control("observe"), run__precision="fp16", batch__micro=4)
    parts = prepare(c)
    known = parts.data.weights
    assert known is not None
    overflow(parts, "model.embed_tokens.weight", at=3)
    Trainer(parts, Path("run"), lambda row: None).run()
    sampler = Sampler(len(parts.data.train), batch=4, seed=0)
    batches = [known.raw[next(sampler)].mean() for _ in range(5)]
    ((quality, _),) = read_values("run")
    assert read("run").updates["skipped"].tolist() == [False, False, True, False, False]
    assert quality == pytest.approx(np.mean([batches[i] for i in (0, 1, 3, 4)]))
    assert quality != pytest.approx(np.mean(batches))  # the control


def test_a_run_of_one_weak_source_is_slowed_down() -> None:
    c = weighted(16, sources={"*": 0.5}, control=control(), more={"apply": "lr"})
    _, found = run(c)
    assert found.updates["feedback.matrix"][-1] == pytest.approx(0.5)
    assert replay("run").same
    run(weighted(16, control=control(), more={"apply": "lr"}), "mixed")
    assert "feedback.matrix" not in read("mixed").updates  # the control: two thirds of one source are no phase


@pytest.mark.parametrize("k", [5, 9])
def test_a_broken_run_reads_and_decides_the_same(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    c = weighted(12, control=control(always=True), checkpoint__every="5 steps", checkpoint__keep=10)
    run(c, "whole")
    with pytest.raises(Crashed):
        run(c, "broken", progress=crash_at(k + 1))
    run(c, "broken")
    assert same("whole", "broken")
    assert losses("whole") == losses("broken")
    assert read_values("broken") == read_values("whole")
    assert replay("broken").same
    with pytest.raises(Crashed):
        run(c, "forgets", progress=crash_at(k + 1))
    monkeypatch.setattr(Composition, "load_state_dict", lambda self, state: None)  # the control
    run(c, "forgets")
    assert [a == b for a, b in zip(read_values("forgets"), read_values("whole"), strict=True)] == [True, False, True]


# Complexity


def test_documents_are_scored_once_and_kept() -> None:
    Path("texts/books/white.txt").write_text(" \n" * 200)
    c = weighted(sources={}, more={"complexity": True, "bands": {"start": 0.0, "high": 0.9}})
    known = prepare(c).data.weights
    assert known is not None
    train, _ = split(read_corpus("texts"))
    factors = {Bands(start=0.0, high=0.9)(score(d.data.decode()).score) for d in train.documents if d.data.strip()}
    assert set(known.raw.tolist()) <= factors | {1.0}
    assert len(set(known.raw.tolist())) > 3
    kept = (Path("cache") / SCORES).read_text()
    again = prepare(c).data.weights
    assert again is not None
    assert again.sha256 == known.sha256
    assert (Path("cache") / SCORES).read_text() == kept
    assert len(kept.split()) > 5
    flat = prepare(weighted(sources={"*": 1.0}, more={"complexity": True, "bands": {"middle": 1.0, "least": 1.0}}))
    assert flat.data.weights is not None
    assert set(flat.data.weights.raw.tolist()) == {1.0}


def test_scores_that_cannot_be_kept_are_made_again() -> None:
    (Path("cache") / SCORES).mkdir(parents=True)
    with pytest.warns(MupaceWarning, match="documents are scored without it"):
        known = prepare(weighted(more={"complexity": True})).data.weights
    assert known is not None


# Refused, one line each


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "weights: nothing is weighted"),
        ({"sources": {"*": 0.0}}, r"weights.sources.\*=0.0: legal is greater than 0"),
        ({"sources": {"*": -1.0}}, r"weights.sources.\*=-1.0: legal is greater than 0"),
        ({"sources": {"*": float("nan")}}, r"weights.sources.\*=nan: legal is a finite number"),
        ({"sources": {"*": 0.1}}, r"sources.'\*'=0.1: legal is from low=0.25 to high=1.5"),
        ({"sources": {"*": 1.0}, "default": 2.0}, "default=2: legal is from low=0.25"),
        ({"sources": {"*": 1.0}, "bands": {"start": 0.5}}, "legal is with complexity=true"),
        ({"complexity": True, "bands": {"strt": 0.5}}, "key in bands='strt' is not known .did you mean 'start'"),
        ({"complexity": True, "bands": {"start": 0.95}}, "legal is start < high"),
        ({"sources": {"*": 1.0}, "apply": "lr"}, "^weights.apply='lr' is for the policy 'data'"),
        ({"sources": {"synthtic/*": 0.5}}, "'synthtic/\\*' matches none of .* such as 'books/..\\.txt'"),
        ({"sources": {"*": 1.0, "synthetic/*": 0.5}}, "'synthetic/\\*': earlier patterns take all"),
    ],
)
def test_bad_sections(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run(plain(weights=given))
    assert "\n" not in str(caught.value)
    assert not Path("run").exists()


def test_the_policy_needs_the_section() -> None:
    with pytest.raises(ConfigError, match=r"^control.policies has 'data', which reads what \[weights\] gives"):
        plain(control=control())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": {"*/00.txt": 0.5, "synthetic/*": 0.5}}, "weights.sources="),
        ({"sources": {"synthetic/*": 0.5, "*/0*": 0.75}}, "other weights of its samples"),
        (None, r"was written with \[weights\], the config has no such section"),
    ],
)
def test_a_checkpoint_of_other_weights_is_refused(changed: dict[str, Any] | None, message: str) -> None:
    c = weighted(sources={"*/0*": 0.75, "synthetic/*": 0.5}, checkpoint__every="2 steps")
    with pytest.raises(Crashed):
        run(c, progress=crash_at(3))
    other = plain() if changed is None else plain(weights=changed)
    with pytest.raises(CheckpointError, match=message):
        run(other)
    assert run(c)[0].reason == "finished"


# Around it


def test_the_record_says_what_was_weighted() -> None:
    _, found = run(weighted())
    known = found.header["weights"]
    assert known["apply"] == "loss"
    assert list(known["sources"]) == ["synthetic/*", REST]
    assert sum(s["share"] for s in known["sources"].values()) == pytest.approx(1.0)
    weak = known["sources"]["synthetic/*"]
    assert (weak["factor"], weak["mean"]) == (0.5, 0.5)
    assert known["mean"] == pytest.approx(1.0 - 0.5 * weak["share"])
    assert sum(s["documents"] for s in known["sources"].values()) == len(train_documents())
    run(plain(), "plain")
    assert "weights" not in read("plain").header


def test_a_config_with_weights_reads_back_and_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    c = weighted(more={"complexity": True, "bands": {"start": 0.5}})
    assert RunConfig.parse(json.loads(json.dumps(c.to_dict()))) == c
    Path("run.toml").write_text(
        '[schedule]\ntext = "warmup 20% | linear -> 0"\ntotal = "6 steps"\n[model]\n'
        "config = { hidden_size = 16, num_hidden_layers = 1, num_attention_heads = 2 }\n"
        '[data]\ntext = "texts"\nseq_len = 16\ncache = "cache"\n[batch]\nmicro = 2\n'
        '[weights.sources]\n"synthetic/*" = 0.5\n'
    )
    assert command(["check", "run.toml"]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err
    Path("run.toml").write_text(Path("run.toml").read_text().replace("synthetic/", "sinthetic/"))
    assert command(["check", "run.toml"]) == 2
    assert "weights.sources.'sinthetic/*' matches none" in capsys.readouterr().err


def test_a_sweep_keeps_weights_of_the_loss_alone() -> None:
    from mupace.tune.sizes import PROXY, at_size, family

    for c, kept in (
        (weighted(), True),
        (weighted(control=control()), True),
        (weighted(control=control(), more={"apply": "lr"}), False),
    ):
        trial = at_size(family(c)[0], PROXY, "standard")
        assert (trial.weights is not None) == kept
        assert trial.control is None


def test_weights_change_nothing_at_the_beginning() -> None:
    a, b = initial(weighted()), initial(plain())
    assert all(torch.equal(a[k], b[k]) for k in b)
