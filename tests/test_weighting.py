"""Sample weights: mean 1 over the whole update, on any number of micro-batches and ranks; equal ones change no bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from mupace import ConfigError
from mupace.complexity import Bands
from mupace.weighting import (
    Composition,
    SampleWeights,
    labelled_tokens,
    normalised,
    weighted_causal_loss,
    weighted_loss,
)

torch.set_num_threads(1)
RULE = SampleWeights(quality={"books": 1.2, "web": 1.0, "synthetic": 0.5})


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, max_position_embeddings=32))


def batch(samples: int = 6, padded: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels; labels with ignored ends and an ignored middle."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (samples, 12), generator=draw)
    labels = ids.clone()
    if padded:
        for i in range(samples):
            labels[i, 12 - i :] = -100
        labels[0, 4:6] = -100
    return ids, labels


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# The rule -------------------------------------------------------------------------------------------------------------


def test_the_formula_by_hand() -> None:
    raw = RULE.of(["books", "web", "synthetic", "synthetic"], [0.0, 0.75, 0.75, 1.0])
    assert raw.tolist() == pytest.approx([1.2, 0.9, 0.45, 0.3])
    assert RULE.of(["books", "synthetic"]).tolist() == [1.2, 0.5]
    clipped = SampleWeights(quality={"a": 3.0, "b": 0.01}).of(["a", "b"])
    assert clipped.tolist() == [1.5, 0.25]
    own = SampleWeights(default=0.8, bands=Bands(start=0.1, high=0.5)).of(["anything"], [0.5])
    assert own.tolist() == pytest.approx([0.64])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"quality": {"a": 0.0}}, r"quality\['a'\]=0.0: legal is a positive number"),
        ({"quality": {"a": float("nan")}}, "quality"),
        ({"quality": {"a": True}}, "quality"),
        ({"default": -1.0}, "default=-1.0"),
        ({"low": 2.0}, "low=2.0, high=1.5: legal is low <= 1 <= high"),
    ],
)
def test_rules_that_are_none(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SampleWeights(**wrong)


def test_samples_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"source='boks' is not known \(did you mean 'books'"):
        RULE.of(["boks"])
    with pytest.raises(ConfigError, match="1 scores for 2 samples"):
        RULE.of(["web", "web"], [0.1])
    with pytest.raises(ConfigError, match=r"score=1\.5"):
        RULE.of(["web"], [1.5])
    with pytest.raises(ConfigError, match="one source per sample"):
        RULE.of("web")


# Normalisation --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(0.25, 1.5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_the_mean_is_one_and_ratios_stay(rows: list[list[float]]) -> None:
    raw = [torch.tensor(row, dtype=torch.float64) for row in rows]
    weights = torch.cat(normalised(raw))
    everything = torch.cat(raw)
    assert float(weights.double().mean()) == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(weights.double() / weights[0], everything / everything[0], rtol=1e-6, atol=0)
    assert [len(w) for w in normalised(raw)] == [len(row) for row in rows]


@given(st.floats(0.25, 1.5), st.lists(st.integers(1, 70), min_size=1, max_size=5))
def test_equal_weights_are_exactly_one(value: float, sizes: list[int]) -> None:
    for part in normalised([torch.full((n,), value, dtype=torch.float64) for n in sizes]):
        assert torch.equal(part, torch.ones(len(part)))


def test_equal_weights_would_not_be_exact_in_float64() -> None:
    """The control: why the weights are rounded to float32."""
    raw = torch.full((3,), 0.3, dtype=torch.float64)
    assert any(
        not torch.equal(r * (len(r) / r.sum()), torch.ones(len(r), dtype=torch.float64))
        for r in (torch.full((n,), v, dtype=torch.float64) for n in range(1, 60) for v in (0.3, 0.7, 1.1))
    )
    assert torch.equal(normalised([raw])[0], torch.ones(3))


def test_token_counts() -> None:
    raw, counts = [torch.tensor([0.5, 1.0]), torch.tensor([1.5])], [torch.tensor([10, 2]), torch.tensor([0])]
    first, second = normalised(raw, counts)
    assert float((first * counts[0]).sum() + (second * counts[1]).sum()) == pytest.approx(12, rel=1e-6)
    assert float(first[1] / first[0]) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize(
    ("raw", "counts", "says"),
    [
        ([], None, "raw is empty"),
        ([[]], None, r"raw\[0\] has shape \(0,\)"),
        ([[[1.0]]], None, r"raw\[0\] has shape \(1, 1\)"),
        ([[1.0], [0.0]], None, r"raw\[1\] has a weight that is not positive"),
        ([[1.0, float("nan")]], None, "not positive and finite"),
        ([[1.0, float("inf")]], None, "not positive and finite"),
        ([[1.0, 1.0]], [[1]], r"counts of sizes \[1\] for weights of sizes \[2\]"),
        ([[1.0], [1.0]], [[1]], "counts of sizes"),
        ([[1.0]], [[0]], "counts are all 0"),
    ],
)
def test_what_cannot_be_normalised(raw: Any, counts: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        normalised([torch.tensor(r) for r in raw], counts and [torch.tensor(c) for c in counts])


# The loss -------------------------------------------------------------------------------------------------------------


def test_uniform_weights_are_the_plain_loss_to_the_bit() -> None:
    ids, labels = batch()
    model = llama()
    (ones,) = normalised([RULE.of(["synthetic"] * 6, [0.8] * 6)])
    plain = model(input_ids=ids, labels=labels).loss
    ours = weighted_causal_loss(model(input_ids=ids).logits, labels, ones, per="token")
    assert torch.equal(ours, plain)
    assert torch.equal(gradient(model, ours), gradient(model, plain))
    unweighted = weighted_causal_loss(model(input_ids=ids).logits, labels)
    weighted = weighted_causal_loss(model(input_ids=ids).logits, labels, ones)
    assert torch.equal(unweighted, weighted)
    assert torch.equal(gradient(model, unweighted), gradient(model, weighted))
    losses = torch.randn(7)
    assert torch.equal(weighted_loss(losses, torch.ones(7)), losses.mean())
    (uneven,) = normalised([RULE.of(["synthetic"] * 5 + ["web"], [0.8] * 6)])
    other = weighted_causal_loss(model(input_ids=ids).logits, labels, uneven, per="token")
    assert not torch.equal(other, plain)  # the control


def test_the_losses_are_the_readable_ones() -> None:
    ids, labels = batch()
    labels[5, 1:] = -100  # nothing to predict
    weights = torch.tensor([0.5, 1.5, 1.0, 0.7, 1.3, 1.0])
    logits = llama()(input_ids=ids).logits.detach()
    means, sums, tokens = [], [], 0
    for i in range(6):
        found = [
            -float(logits[i, t].double().log_softmax(-1)[labels[i, t + 1]]) for t in range(11) if labels[i, t + 1] >= 0
        ]
        means.append(float(weights[i]) * sum(found) / max(1, len(found)))
        sums.append(float(weights[i]) * sum(found))
        tokens += len(found)
    assert tokens == int(labelled_tokens(labels).sum())
    assert float(weighted_causal_loss(logits, labels, weights)) == pytest.approx(sum(means) / 6, rel=1e-5)
    assert float(weighted_causal_loss(logits, labels, weights, per="token")) == pytest.approx(
        sum(sums) / tokens, rel=1e-5
    )
    moved = labels.masked_fill(labels == -100, 49)
    ignored = torch.where(labels == -100, torch.tensor(7777), labels)
    assert torch.equal(
        weighted_causal_loss(logits, ignored, weights, ignore_index=7777),
        weighted_causal_loss(logits, labels, weights),
    )
    assert not torch.equal(weighted_causal_loss(logits, moved, weights), weighted_causal_loss(logits, labels, weights))


@pytest.mark.parametrize("per", ["sample", "token"])
def test_accumulated_is_the_whole_batch(per: str) -> None:
    """Micro-batches of any sizes, normalised together, have the gradient of one batch; each by itself has not."""
    ids, labels = batch()
    model = llama().double()
    raw = RULE.of(["books", "synthetic", "synthetic", "web", "synthetic", "web"])
    counts = labelled_tokens(labels)

    def together(sizes: Sequence[int]) -> list[torch.Tensor]:
        parts = list(raw.split(list(sizes)))
        held = list(counts.split(list(sizes))) if per == "token" else None
        return list(normalised(parts, held))

    def accumulated(sizes: Sequence[int], weights: Sequence[torch.Tensor], of: float) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        rows = zip(ids.split(list(sizes)), labels.split(list(sizes)), weights, strict=True)
        for x, y, w in rows:
            total = total + weighted_causal_loss(model(input_ids=x).logits, y, w, per=per, of=of).double()
        return gradient(model, total)

    of = 6.0 if per == "sample" else float(counts.sum())
    (whole,) = together([6])
    expected = gradient(model, weighted_causal_loss(model(input_ids=ids).logits, labels, whole, per=per).double())
    for sizes in ([3, 3], [1, 2, 3], [5, 1], [1] * 6):
        torch.testing.assert_close(accumulated(sizes, together(sizes), of), expected, rtol=1e-5, atol=1e-9)
    alone = [normalised([part])[0] for part in raw.split([3, 3])]
    assert not torch.allclose(accumulated([3, 3], alone, of), expected, rtol=1e-2, atol=1e-9)  # the control


def test_equal_micro_batches_need_no_denominator() -> None:
    losses = torch.randn(12, dtype=torch.float64)
    raw = torch.rand(12, dtype=torch.float64) + 0.3
    parts = normalised(list(raw.split(4)))
    accumulated = sum(weighted_loss(x, w) / 3 for x, w in zip(losses.split(4), parts, strict=True))
    assert float(accumulated) == pytest.approx(float((losses * raw).sum() / raw.sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: weighted_loss(torch.zeros(2, 2), None), r"losses has shape \(2, 2\)"),
        (lambda: weighted_loss(torch.zeros(2), torch.ones(3)), r"weights of shape \(3,\) for 2 samples"),
        (lambda: weighted_loss(torch.zeros(2), torch.ones(2), of=0.0), "of=0.0: legal is a positive number"),
        (lambda: weighted_causal_loss(torch.zeros(2, 3, 4), torch.zeros(2, 2)), r"labels \(2, 2\): legal is"),
        (lambda: weighted_causal_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "legal is"),
        (lambda: weighted_causal_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3), per="tokens"), "did you mean 'token'"),
        (lambda: Composition(["a"]).add(["a"], torch.ones(2)), "1 sources for 2 weights"),
    ],
)
def test_what_does_not_belong_together(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call()


def test_composition() -> None:
    made = Composition(["web", "synthetic", "books"])
    assert made.values() == {}
    made.add(["web", "synthetic", "web"], RULE.of(["web", "synthetic", "web"]))
    made.add(["web", "unknown"], torch.tensor([1.0, 0.5]))
    assert made.values() == {"data.quality": pytest.approx(4.0 / 5), "data.share": pytest.approx(3 / 5)}
    assert made.values() == {}  # a new start


# Ranks ----------------------------------------------------------------------------------------------------------------

RANKS = """
import json, sys
import torch, torch.distributed as dist
from mupace.weighting import Composition, SampleWeights, normalised
rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
rule = SampleWeights(quality={"web": 1.0, "synthetic": 0.5})
mine = [["web", "web", "synthetic"], ["synthetic"]] if rank == 0 else [["synthetic"] * 2]
raw = [rule.of(sources) for sources in mine]
made = Composition(["web", "synthetic"])
for sources, part in zip(mine, raw):
    made.add(sources, part)
print(json.dumps({
    "weights": [w.tolist() for w in normalised(raw)],
    "equal": [w.tolist() for w in normalised([torch.full((3 + rank,), 0.3)])],
    "values": made.values(), "empty": made.values(),
}))
dist.destroy_process_group()
"""


@pytest.mark.dist
def test_two_ranks_share_one_mean(tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    found = [json.loads(run.communicate(timeout=90)[0].splitlines()[-1]) for run in runs]
    weights = [w for rank in found for part in rank["weights"] for w in part]
    raw = [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert weights == pytest.approx([r * 6 / 4 for r in raw])
    assert found[0]["equal"] == [[1.0] * 3]
    assert found[1]["equal"] == [[1.0] * 4]
    expected = {"data.quality": pytest.approx(4 / 6), "data.share": pytest.approx(4 / 6)}
    assert [rank["values"] for rank in found] == [expected, expected]
    assert [rank["empty"] for rank in found] == [{}, {}]
    alone = normalised([RULE.of(["web", "web", "synthetic"]), RULE.of(["synthetic"])])
    assert alone[0].tolist() != pytest.approx(found[0]["weights"][0])  # the control: one rank by itself
