"""Text to batches: what is read, what is held out, what is refused, and the order of the sequences."""

from __future__ import annotations

import gzip
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mupace.errors import ConfigError, DataError, MupaceWarning, StateError
from mupace.trainer import tokens
from mupace.trainer.data import Blocks, Sampler, prepare, read_corpus, shuffled, split
from mupace.trainer.tokens import ByteTokenizer, encode, resolve_tokenizer

WORDS = ["the", "rate", "of", "a", "small", "model", "moves", "to", "large", "one", "loss", "follows"]


def prose(n: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, n)) + "\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "mupace"


def names(folder: Path | str) -> list[str]:
    return [d.name for d in read_corpus(folder).documents]


# Reading


def test_folder_is_walked_in_sorted_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ["b.txt", "a.md", "z/c.py", "z/.hidden.txt", ".git/x.txt", "__pycache__/y.py", "table.csv"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path) == ["a.md", "b.txt", "z/c.py"]


def test_gz_jsonl_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("zipped é".encode()))
    rows = [json.dumps({"text": "first"}), "", json.dumps({"text": "second 你好", "n": 1})]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    (tmp_path / "c.csv").write_text("no")
    corpus = read_corpus(str(tmp_path / "*"))
    assert [d.data.decode() for d in corpus.documents] == ["zipped é", "first", "second 你好"]
    assert corpus.documents[-1].name.endswith("b.jsonl:3")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"body": "inner"}\n'))
    assert read_corpus(tmp_path / "d.jsonl.gz", field="body").contents == [b"inner"]


def test_bytes_are_kept_and_repeated_content_is_read_once(tmp_path: Path) -> None:
    odd = b"\xef\xbb\xbfline\r\nline\n\n"
    (tmp_path / "a.txt").write_bytes(odd)
    (tmp_path / "b.txt").write_bytes(odd)
    (tmp_path / "c.txt").write_bytes(b"")
    corpus = read_corpus([tmp_path / "a.txt", tmp_path])
    assert corpus.contents == [odd]
    assert corpus.n_bytes == len(odd)


def test_corpus_hash_depends_on_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = read_corpus(tmp_path).sha256
    assert read_corpus(tmp_path).sha256 == first
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    second = read_corpus(tmp_path).sha256
    (tmp_path / "b.txt").write_text("two")
    assert len({first, second, read_corpus(tmp_path).sha256}) == 3


def test_standard_library_is_the_default_corpus() -> None:
    corpus = read_corpus()
    found = [d.name for d in corpus.documents]
    assert "argparse.py" in found
    assert "json/decoder.py" in found
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "pydoc_data"}
    assert corpus.n_bytes > 4_000_000
    assert len({d.sha256 for d in corpus.documents}) == len(corpus.documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"a\.csv' has an unknown suffix '\.csv': legal are \.txt, \.md, \.py, \.jsonl"),
        ("a.txt", b"", r"a\.txt' is an empty file"),
        ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8: byte 0xff at offset 5"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], r"a\.txt\.gz cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl:2 has no field 'text': it has body"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is a int, not text"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 has no field 'text': it has a list"),
        ("a.jsonl", b'{"text": ""}\n\n', "has no text"),
    ],
)
def test_unusable_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["missing.txt", "missing/*.txt", "*.csv", ".", "x" * 5000])
def test_a_pattern_that_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    (tmp_path / "a.csv").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"finds no text: legal are files, folders and patterns of \.txt"):
        read_corpus(pattern)


# Splitting


def test_many_documents_are_split_by_content(tmp_path: Path) -> None:
    for i in range(400):
        (tmp_path / f"{i}.txt").write_text(prose(200 + i % 7, i))
    corpus = read_corpus(tmp_path)
    train, valid = split(corpus)
    assert 0.01 <= valid.n_bytes / corpus.n_bytes <= 0.02
    assert {d.sha256 for d in train.documents}.isdisjoint(d.sha256 for d in valid.documents)
    assert len(train.documents) + len(valid.documents) == 400
    for i in range(400):  # other names, another order: the same texts are held out
        (tmp_path / f"{i}.txt").rename(tmp_path / f"{(i * 7) % 400}-moved.txt")
    again = split(read_corpus(tmp_path))[1]
    assert {d.sha256 for d in again.documents} == {d.sha256 for d in valid.documents}


def test_standard_library_split_is_near_the_fraction() -> None:
    corpus = read_corpus()
    assert 0.01 <= split(corpus)[1].n_bytes / corpus.n_bytes <= 0.02


def test_one_document_holds_out_its_tail_on_a_character_boundary(tmp_path: Path) -> None:
    text = "你好é" * 40_000
    (tmp_path / "a.txt").write_text(text)
    corpus = read_corpus(tmp_path / "a.txt")
    train, valid = split(corpus)
    assert train.contents[0].decode() + valid.contents[0].decode() == text
    assert valid.n_bytes == pytest.approx(0.015 * corpus.n_bytes, abs=3)


def test_a_few_large_documents_hold_out_the_tail_of_the_longest(tmp_path: Path) -> None:
    for i, n in enumerate([20_000, 30_000, 20_000]):
        (tmp_path / f"{i}.txt").write_text(prose(n, i))
    corpus = read_corpus(tmp_path)
    train, valid = split(corpus)
    assert [d.name for d in valid.documents] == ["1.txt (tail)"]
    assert len(train.documents) == 3
    assert train.n_bytes + valid.n_bytes == corpus.n_bytes


def test_a_short_text_holds_out_at_most_a_tenth(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 5000)
    assert split(read_corpus(tmp_path))[1].n_bytes == 500
    with pytest.raises(DataError, match=r"valid_fraction=0\.9 must be above 0 and at most 0\.5"):
        split(read_corpus(tmp_path), 0.9)


# Tokens


def test_byte_tokens_round_trip_and_documents_end() -> None:
    tok = ByteTokenizer()
    assert tok.stream([b"ab", "é".encode()]).tolist() == [97, 98, 256, 195, 169, 256]
    text = "a\r\n\tb é 你好 \x00 <|endoftext|>"
    assert tok.decode(tok.encode(text)) == text


def test_saved_byte_tokenizer_gives_the_same_ids_through_transformers(tmp_path: Path) -> None:
    own = ByteTokenizer()
    own.save(tmp_path)
    loaded = resolve_tokenizer(tmp_path, [], "")
    every_byte = "".join(map(chr, [*range(0x250), 0x4F60, 0x1F600])) + "  two  spaces\n\n<|endoftext|>"
    assert loaded.encode(every_byte) == own.encode(every_byte)
    assert loaded.decode(own.encode(every_byte)) == every_byte
    assert (loaded.vocab_size, loaded.end_of_document) == (257, 256)
    assert loaded.stream([b"ab", b"c"]).tolist() == own.stream([b"ab", b"c"]).tolist()


def test_bpe_is_trained_once_and_is_lossless(cache: Path, tmp_path: Path) -> None:
    text = (Path(os.__file__).read_text() + " 你好").encode()
    tok = resolve_tokenizer("bpe:512", [text], "key")
    assert tok.vocab_size == 512
    assert tok.decode(tok.encode(text.decode())) == text.decode()
    assert len(tok.encode(text.decode())) < 0.6 * len(text)
    ids = tok.stream([b"a <|endoftext|> b"])
    assert (ids == tok.end_of_document).sum() == 1  # the spelling inside the text ends nothing
    (entry,) = cache.glob("bpe-*.json")
    stamp = entry.stat().st_mtime_ns
    again = resolve_tokenizer("bpe:512", [text], "key")
    assert again.sha256 == tok.sha256
    assert entry.stat().st_mtime_ns == stamp
    tok.save(tmp_path)
    assert resolve_tokenizer(tmp_path, [], "").encode("import os") == tok.encode("import os")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("byte", r"tokenizer='byte' is not known: legal are bytes, bpe:N"),
        ("bpe:256", r"tokenizer='bpe:256': the size after 'bpe:' must be a number from 257 to 65536"),
        ("bpe:2k", "tokenizer='bpe:2k'"),
        ("bpe:", "tokenizer='bpe:'"),
        ("bpe:5000", r"only yields \d+ ids"),
    ],
)
def test_unknown_tokenizers(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_tokenizer(word, [b"short text"], "key")


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder holds no tokenizer\.json"):
        resolve_tokenizer(tmp_path, [], "")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        resolve_tokenizer(tmp_path, [], "")
    assert "\n" not in str(caught.value)


def test_tokens_come_from_the_cache_and_a_damaged_entry_is_made_again(cache: Path) -> None:
    tok, text = ByteTokenizer(), [prose(500).encode()]
    first = encode(text, "key", tok)
    (entry,) = cache.glob("tokens-*.npy")
    assert isinstance(first.base, np.memmap)
    assert encode([b"not read"], "key", tok).tolist() == first.tolist()  # from the file, not from the text
    damaged = bytearray(entry.read_bytes())
    damaged[-5] ^= 1
    entry.write_bytes(damaged)
    with pytest.warns(MupaceWarning, match="is damaged and is made again"):
        assert encode(text, "key", tok).tolist() == tok.stream(text).tolist()
    entry.write_bytes(entry.read_bytes()[:100])
    with pytest.warns(MupaceWarning, match="is damaged"):
        assert encode(text, "key", tok).tolist() == tok.stream(text).tolist()
    assert [p.name for p in cache.iterdir()] == [entry.name]


def test_an_unusable_cache_is_named_and_the_tokens_are_right(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(MupaceWarning, match=r"the cache .*file/cache cannot be used"):
        ids = encode([b"ab"], "key", ByteTokenizer(), tmp_path / "file" / "cache")
    assert ids.tolist() == [97, 98, 256]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokens.cache_dir() == tmp_path / ".cache" / "mupace"


# Blocks


def test_every_token_but_the_first_is_predicted_once() -> None:
    blocks = Blocks(np.arange(1000, dtype=np.uint16), seq_len=7)
    rows = blocks.take(np.arange(len(blocks)))
    assert rows.dtype == torch.int64
    assert rows.shape == (142, 8)
    assert rows[:, 1:].flatten().tolist() == list(range(1, 142 * 7 + 1))
    assert [len(Blocks(np.arange(n), seq_len=7)) for n in (0, 7, 8, 14, 15)] == [0, 0, 1, 1, 2]


def test_prepare_puts_it_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(20_000))
    data = prepare(tmp_path, seq_len=64)
    assert data.eval_blocks(4).shape == (4, 65)
    assert torch.equal(data.eval_blocks(4), data.eval_blocks(4))
    assert len(data.eval_blocks(10**6)) == len(data.valid)
    seen = [i for _, i in zip(range(len(data.train)), Sampler(len(data.train), batch=1), strict=False)]
    text = b"".join(
        data.tokenizer.decode(row[1:].tolist()).encode() for row in data.train.take(np.sort(np.concatenate(seen)))
    )
    assert text == (tmp_path / "a.txt").read_bytes()[1 : len(text) + 1]
    assert data.valid_bytes_per_token == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("size", "part"), [(100, "training"), (1000, "validation")])
def test_text_too_short_for_a_sequence(tmp_path: Path, size: int, part: str) -> None:
    (tmp_path / "a.txt").write_text("x" * size)
    with pytest.raises(DataError, match=rf"is too short: \d+ tokens of {part} text, .* seq_len=128 needs 129"):
        prepare(tmp_path / "a.txt", seq_len=128)


# Order


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_shuffled_is_a_permutation(n: int) -> None:
    assert sorted(shuffled(np.arange(n), n, seed=3, epoch=1).tolist()) == list(range(n))


def test_shuffled_is_fair() -> None:
    """Chi-square of (position, block) over 3000 epochs of 8 blocks: 49 degrees of freedom, p < 1e-4 beyond 98."""
    counts = np.zeros((8, 8))
    pairs: Counter[tuple[int, ...]] = Counter()
    for epoch in range(3000):
        order = shuffled(np.arange(8), 8, seed=0, epoch=epoch)
        counts[np.arange(8), order] += 1
        pairs[tuple(order[:2].tolist())] += 1
    assert ((counts - 375) ** 2 / 375).sum() < 98
    expected = 3000 / 56
    chi_pairs = sum((pairs[a, b] - expected) ** 2 / expected for a in range(8) for b in range(8) if a != b)
    assert chi_pairs < 105  # 55 degrees of freedom, p = 5e-5


def test_shuffled_leaves_no_order_in_a_large_range() -> None:
    n = 10**12
    order = shuffled(np.arange(20_000), n, seed=0, epoch=0).astype(float)
    assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert order.mean() == pytest.approx(n / 2, rel=0.02)


def test_the_order_is_pinned() -> None:
    """A resumed run of an older version must see the same text: this order may never change."""
    assert shuffled(np.arange(10), 10, seed=0, epoch=0).tolist() == [3, 5, 7, 8, 2, 4, 6, 0, 9, 1]
    assert next(Sampler(1000, batch=6, seed=7)).tolist() == [404, 899, 682, 797, 961, 217]


def test_epochs_are_whole_and_different_and_batches_cross_them() -> None:
    sampler = Sampler(10, batch=4, seed=1)
    flat = np.concatenate([next(sampler) for _ in range(10)])
    epochs = flat.reshape(4, 10)
    assert all(sorted(e) == list(range(10)) for e in epochs.tolist())
    assert len({tuple(e) for e in epochs.tolist()}) == 4
    assert sampler.epoch == 4.0
    assert sorted(np.concatenate([next(Sampler(3, batch=9))]).tolist()) == sorted([0, 1, 2] * 3)


def test_another_seed_gives_another_order() -> None:
    assert next(Sampler(1000, batch=50, seed=0)).tolist() != next(Sampler(1000, batch=50, seed=1)).tolist()


@pytest.mark.parametrize("k", range(12))
def test_resume_continues_exactly(k: int) -> None:
    whole, first, second = (Sampler(11, batch=4, seed=5) for _ in range(3))
    expected = [next(whole).tolist() for _ in range(12)]
    for _ in range(k):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state) == {"epoch", "index", "seed", "blocks"}
    next(second)  # wherever it was
    second.load_state_dict(state)
    assert [next(second).tolist() for _ in range(12 - k)] == expected[k:]


def test_processes_share_one_global_batch() -> None:
    whole = Sampler(50, batch=12, seed=2)
    ranks = [Sampler(50, batch=12, seed=2, rank=r, world=3) for r in range(3)]
    for _ in range(9):
        assert np.concatenate([next(r) for r in ranks]).tolist() == next(whole).tolist()
    alone = Sampler(50, batch=12, seed=2)
    alone.load_state_dict(ranks[2].state_dict())  # three processes to one
    assert next(alone).tolist() == next(whole).tolist()


def test_a_state_of_other_data_is_refused() -> None:
    state = Sampler(50, batch=5, seed=2).state_dict()
    with pytest.raises(StateError, match="the saved seed is 2, this run's is 3"):
        Sampler(50, batch=5, seed=3).load_state_dict(state)
    with pytest.raises(StateError, match="the saved blocks is 50, this run's is 51"):
        Sampler(51, batch=5, seed=2).load_state_dict(state)
    with pytest.raises(DataError, match="batch=5 must be a multiple of the number of processes, 2"):
        Sampler(50, batch=5, world=2)


def test_no_global_generator_is_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    next(Sampler(50, batch=5))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_reading_warns_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(2000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(tmp_path, seq_len=16, tokenizer="bpe:280")
