"""The optional scorers, each with the real package where it is installed, and its one line where it is not."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mupace import ConfigError
from mupace.complexity import Cache, ReferenceLoss, SpacyDepth, WordnetSenses, calibrate, default_calibration, score
from mupace.errors import DataError

TEXT = "The bank by the river was closed, so we sat on the bank."


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize(
    ("package", "scorer"), [("spacy", SpacyDepth("en_core_web_sm")), ("wn", WordnetSenses("oewn:2024"))]
)
def test_a_missing_package_is_one_line(package: str, scorer: Any) -> None:
    if has(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install {package}$"):
        scorer.measure(TEXT)


# A reference model ----------------------------------------------------------------------------------------------------


def saved_model(folder: Path, seed: int = 0) -> Any:
    """A real Llama over bytes, with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, max_position_embeddings=64)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far from uniform, so that texts differ
    model.save_pretrained(folder)
    return model.eval()


def by_hand(model: Any, folder: Path, text: str, piece: int) -> float:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for a in range(0, len(ids), piece):
        part = ids[a : a + piece]
        for t in range(1, len(part)):
            with torch.no_grad():
                p = model(input_ids=torch.tensor([part[:t]])).logits[0, -1].softmax(-1)
            total -= math.log(float(p[part[t]]))
            count += 1
    return total / count


@pytest.mark.parametrize("text", ["A short one.", TEXT * 3, "中文也可以。" * 4])
def test_the_loss_is_the_models(text: str, tmp_path: Path) -> None:
    """Bytes are the tokens here, so nats per byte are nats per token."""
    model = saved_model(tmp_path)
    found = ReferenceLoss(str(tmp_path)).measure(text)
    assert found["reference_loss"] == pytest.approx(by_hand(model, tmp_path, text, 64), rel=1e-4)


def test_less_is_read_and_less_context(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    short = ReferenceLoss(str(tmp_path), limit=20).measure(TEXT)["reference_loss"]
    assert short == pytest.approx(by_hand(model, tmp_path, TEXT[:20], 64), rel=1e-4)
    pieces = ReferenceLoss(str(tmp_path), context=8).measure(TEXT)["reference_loss"]
    assert pieces == pytest.approx(by_hand(model, tmp_path, TEXT, 8), rel=1e-4)
    assert abs(pieces / ReferenceLoss(str(tmp_path)).measure(TEXT)["reference_loss"] - 1) > 1e-3  # the control
    assert ReferenceLoss(str(tmp_path)).measure("a") == {}
    with pytest.raises(DataError):
        ReferenceLoss(str(tmp_path)).measure(" ")


def test_it_counts_in_a_calibration_that_knows_it(tmp_path: Path) -> None:
    saved_model(tmp_path / "model")
    scorer = ReferenceLoss(str(tmp_path / "model"))
    texts = [TEXT + f" It was the {i}th of {['May', 'June'][i % 2]}, {'very ' * i}late." for i in range(10)]
    with Cache(tmp_path / "c.jsonl") as cache:
        own = calibrate(texts, scorers=[scorer], cache=cache)
        found = score(texts[0], calibration=own, scorers=[scorer], cache=cache)
        assert cache.misses == 20
    assert "reference_loss" in found.z
    reported = score(texts[0], calibration=default_calibration(), scorers=[scorer])
    assert "reference_loss" in reported.features
    assert "reference_loss" not in reported.z
    assert reported.score == score(texts[0]).score


def test_another_model_in_the_folder_is_another_scorer(tmp_path: Path) -> None:
    saved_model(tmp_path)
    name = ReferenceLoss(str(tmp_path)).name
    assert ReferenceLoss(str(tmp_path)).name == name
    assert ReferenceLoss(str(tmp_path), limit=7).name != name
    saved_model(tmp_path, seed=1)
    assert ReferenceLoss(str(tmp_path)).name != name


def test_folders_that_are_none(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="legal is a local folder"):
            ReferenceLoss(str(folder)).measure(TEXT)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded as a causal model") as caught:
        ReferenceLoss(str(tmp_path)).measure(TEXT)
    assert "\n" not in str(caught.value)


# spaCy and wn, where they are installed -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_spacy_depths(tmp_path: Path) -> None:
    """A parser trained here on three sentences, saved and loaded; the depths are counted in its own parse."""
    spacy = pytest.importorskip("spacy")
    from spacy.training import Example

    nlp = spacy.blank("en")
    parser = nlp.add_pipe("parser")
    rows = [
        (["dogs", "run", "."], [1, 1, 1], ["nsubj", "ROOT", "punct"]),
        (
            ["we", "saw", "that", "dogs", "run", "."],
            [1, 1, 4, 4, 1, 1],
            ["nsubj", "ROOT", "m", "nsubj", "ccomp", "punct"],
        ),
    ]
    examples = [Example.from_dict(spacy.tokens.Doc(nlp.vocab, words=w), {"heads": h, "deps": d}) for w, h, d in rows]
    for label in {d for row in rows for d in row[2]}:
        parser.add_label(label)
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(60):
        nlp.update(examples, sgd=optimizer)
    nlp.to_disk(tmp_path / "model")
    scorer = SpacyDepth(str(tmp_path / "model"))
    assert scorer.measure("dogs run .") == {"dependency_depth": 1.0}
    assert scorer.measure("we saw that dogs run .") == {"dependency_depth": 2.0}
    assert scorer.name.startswith("spacy/en_")
    with pytest.raises(ConfigError, match="legal is an installed spaCy pipeline"):
        SpacyDepth(str(tmp_path / "none")).measure(TEXT)
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ConfigError, match="has no parser"):
        SpacyDepth(str(tmp_path / "blank")).measure(TEXT)


LEXICON = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE LexicalResource SYSTEM "http://globalwordnet.github.io/schemas/WN-LMF-1.0.dtd">
<LexicalResource xmlns:dc="http://purl.org/dc/elements/1.1/">
<Lexicon id="tiny" label="tiny" language="en" email="a@b.c" license="CC0" version="1">
<LexicalEntry id="w1"><Lemma writtenForm="bank" partOfSpeech="n"/>
<Sense id="s1" synset="tiny-1"/><Sense id="s2" synset="tiny-2"/></LexicalEntry>
<LexicalEntry id="w2"><Lemma writtenForm="river" partOfSpeech="n"/><Sense id="s3" synset="tiny-3"/></LexicalEntry>
<LexicalEntry id="w3"><Lemma writtenForm="银行" partOfSpeech="n"/><Sense id="s4" synset="tiny-1"/></LexicalEntry>
<Synset id="tiny-1" ili="" partOfSpeech="n"/><Synset id="tiny-2" ili="" partOfSpeech="n"/>
<Synset id="tiny-3" ili="" partOfSpeech="n"/>
</Lexicon></LexicalResource>
"""


@pytest.mark.filterwarnings("ignore")
def test_wordnet_senses(tmp_path: Path) -> None:
    wn = pytest.importorskip("wn")
    wn.config.data_directory = tmp_path / "data"
    (tmp_path / "tiny.xml").write_text(LEXICON, encoding="utf-8")
    wn.add(tmp_path / "tiny.xml", progress_handler=None)
    scorer = WordnetSenses("tiny:1")
    expected = (2 * math.log(3) + math.log(2)) / 3  # bank twice with two senses, river once with one
    assert scorer.measure(TEXT)["senses"] == pytest.approx(expected)
    assert scorer.measure("他去银行。")["senses"] == pytest.approx(math.log(2))
    assert scorer.measure("none of it") == {}
    with pytest.raises(ConfigError, match="legal is a lexicon in wn's local database"):
        WordnetSenses("oewn:1999").measure(TEXT)
