"""What can be counted in a text without a model.

Every feature is worked out in each window of a text and averaged over the windows by their length, so that a page
and a book are measured with the same ruler. A name that ends in `_proxy` says that the number only stands near what it
is named after: no sentence is parsed here, and no pronoun resolved.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from mupace.complexity.text import HAN, _kind, checked, tokens_of, windows

VERSION = "features/1"
"""Changes whenever a feature does; cached values of another version are not used."""

FEATURES = {
    "zlib_ratio": "information per byte",
    "mtld": "lexical diversity",
    "nesting_depth_proxy": "depth of nesting",
    "subordinators_proxy": "depth of syntax (en, zh)",
    "indent_depth_proxy": "depth of nesting (code)",
    "ambiguity_proxy": "density of lexical ambiguity",
    "chain_length_proxy": "length of reference chains",
    "pronoun_density_proxy": "references to resolve (en, zh)",
    "sentence_length": "length of sentences (en, zh)",
    "sentence_spread": "unevenness of sentences (en, zh)",
}
"""Every feature with what it stands for."""

MTLD_THRESHOLD = 0.72
"""Type-token ratio that ends a segment: McCarthy and Jarvis, 2010."""
GAP = 30
"""Most tokens between two mentions of one chain (no source: this library's choice)."""
DEEPEST = 64
"""Marks that can be open at once; a run of unmatched ones would make the search for a partner long."""

_SENTENCE = re.compile(r"[.!?…]+(?=[\s\"')\]”’]|$)|[。！？；…]+|\n\s*\n")
_SUBORDINATE_EN = re.compile(
    r"\b(?:that|which|who|whom|whose|because|although|though|while|whereas|if|unless|until|when|whenever|where|wherever"
    r"|since|whether|before|after|as|once|so that|in order to)\b",
    re.IGNORECASE,
)
_SUBORDINATE_ZH = re.compile(
    "因为|由于|虽然|尽管|即使|如果|假如|只要|只有|除非|无论|不管|既然|以便|以致|从而|当|之前|之后|以前|以后|时候|所[^有以谓]|"
    "因為|雖然|儘管|無論|不管|從而|當|之後|以後|時候"
)
_PRONOUNS = frozenset(
    re.findall(
        r"\w+",
        "he she it they him her them his hers its their theirs himself herself itself themselves this these those such "
        "one ones another other others i me my mine we us our ours you your yours",
    )
)
_PRONOUN_ZH = re.compile("[他她它您你我其彼]们?|咱们|自己|这些|那些|这个|那个|[這那此]|[他她它你我]們")
_FUNCTION_EN = frozenset(
    re.findall(
        r"\w+",
        "that this with from have will would been were they them their there then than what when which while whose "
        "into your about some more only also each such other does done must should could these those very just over "
        "because where being between both after before",
    )
)
_FUNCTION_ZH = frozenset("的了是在和有也就都不这那一个上下中为以与及或而但之其他她它我你们到说要会可能还很对把被从")
_HAN_TOKEN = re.compile(f"[{HAN}]")
_BRACKETS = re.compile(r"[()\[\]{}（）【】《》〈〉「」『』“”\"]|\n\s*\n")
_CLOSES = dict(zip(")]}）】》〉」』”", "([{（【《〈「『“", strict=True))
_INDENT = re.compile(r"^([ \t]*)\S", re.MULTILINE)


def features(text: str) -> dict[str, float]:
    """Every feature that the text's kind has and the text is long enough for, and its length in `characters`.

    Raises:
        ConfigError: the text is no str.
        DataError: nothing but white space is in it.
    """
    parts = [part for part in windows(checked(text)) if not part.isspace()]
    kind = _kind("".join(parts))
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in parts:
        for name, value in _window(part, kind).items():
            sums[name] = sums.get(name, 0.0) + value * len(part)
            weights[name] = weights.get(name, 0.0) + len(part)
    return {"characters": float(len(text)), **{name: sums[name] / weights[name] for name in FEATURES if name in sums}}


def _window(text: str, kind: str) -> dict[str, float]:
    tokens = tokens_of(text)
    found = {
        "zlib_ratio": zlib_ratio(text),
        "mtld": mtld(tokens),
        "nesting_depth_proxy": nesting_depth(text, code=kind == "code"),
        "ambiguity_proxy": ambiguity(tokens),
        "chain_length_proxy": chain_length(tokens),
    }
    if kind == "code":
        found["indent_depth_proxy"] = indent_depth(text)
    elif tokens:
        found |= _sentences(text, tokens, kind)
    return {name: value for name, value in found.items() if value is not None}


def zlib_ratio(text: str) -> float:
    """Bytes after zlib (level 1) over bytes before; short texts come out higher, for want of anything to repeat."""
    data = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(data, 1)) / len(data)


def mtld(tokens: Sequence[str]) -> float | None:
    """Mean length of segments whose type-token ratio stays above 0.72, over both directions.

        MTLD = n / (whole segments + (1 − TTR_rest)/(1 − 0.72))

    n: tokens; TTR: different tokens over tokens, of the segment that is not finished. Tokens that never repeat count as
    one segment. Source: McCarthy and Jarvis, MTLD, vocd-D, and HD-D, Behavior Research Methods 42 (2010).
    """
    if not tokens:
        return None
    return (_segments(tokens) + _segments(tokens[::-1])) / 2


def _segments(tokens: Sequence[str]) -> float:
    seen: set[str] = set()
    begun, count, different = 0, 0, 0
    for i, token in enumerate(tokens, 1):
        if token not in seen:
            seen.add(token)
            different += 1
        elif different <= MTLD_THRESHOLD * (i - begun):
            count, begun, different = count + 1, i, 0
            seen.clear()
    rest = len(tokens) - begun
    part = (1 - different / rest) / (1 - MTLD_THRESHOLD) if rest else 0.0
    return len(tokens) / max(count + part, 1.0)


def nesting_depth(text: str, code: bool = False) -> float:
    """Pairs of brackets and quotation marks that a character stands in, on average.

        depth = Σ_pairs (characters between its two marks) / characters

    A mark without its partner counts nothing. In prose an empty line ends what is open; in code straight quotation
    marks are not looked at, for they may stand in any string.
    """
    inside, open_marks = 0, list[tuple[str, int]]()
    for match in _BRACKETS.finditer(text):
        mark, at = match.group(), match.start()
        if mark[0] == "\n":
            if not code:
                open_marks.clear()
        elif mark == '"' and code:
            continue
        else:
            inside += _mark(mark, at, open_marks)
    return inside / len(text)


def _mark(mark: str, at: int, open_marks: list[tuple[str, int]]) -> int:
    """Open or close; the characters between the pair that is closed."""
    opener = mark if mark == '"' else _CLOSES.get(mark)
    if opener is not None:
        for k in range(len(open_marks) - 1, -1, -1):
            if open_marks[k][0] == opener:
                begun = open_marks[k][1]
                del open_marks[k:]
                return at - begun - 1
        if mark != '"':
            return 0
    open_marks.append((mark, at))
    del open_marks[:-DEEPEST]
    return 0


def indent_depth(text: str) -> float | None:
    """Mean indentation of the lines that are not empty, in units of the smallest one there is; a tab counts as four."""
    widths = [len(white.replace("\t", "    ")) for white in _INDENT.findall(text)]
    unit = min((w for w in widths if w > 1), default=4)
    return sum(widths) / (unit * len(widths)) if widths else None


def ambiguity(tokens: Sequence[str]) -> float | None:
    """How little a repeated token says about the one after it, between 0 and 1.

        ambiguity = Σ_v n_v · H_v/log₂ n_v / Σ_v n_v        H_v = −Σ_u (n_vu/n_v) log₂(n_vu/n_v)

    v: tokens followed n_v ≥ 2 times by another, n_vu times by u; H_v/log₂ n_v is 1 where every time another one follows
    and 0 where always the same. Without a dictionary this stands for the meanings a word has here; it cannot tell a
    word with two meanings from one that goes with everything.
    """
    after = Counter(tokens[:-1])
    pairs = Counter(pairwise(tokens))
    spread = dict.fromkeys((v for v, n in after.items() if n > 1), 0.0)
    if not spread:
        return None
    for (v, _), n in pairs.items():
        if n > 1:
            spread[v] += n * math.log2(n)
    total = sum(after[v] for v in spread)
    # n_v · H_v = n_v log n_v − Σ_u n_vu log n_vu, so each term is n_v − (Σ_u n_vu log n_vu)/log n_v
    return sum(after[v] - s / math.log2(after[v]) for v, s in spread.items()) / total


def chain_length(tokens: Sequence[str]) -> float | None:
    """Mentions per chain, on average over the chains of two mentions or more.

    A chain is one content token that comes back within 30 tokens, again and again. Content: words of four letters or
    more that are no function words; in Chinese, pairs of neighbouring characters without a function character.
    """
    chains, links = 0, 0
    last: dict[str, int] = {}
    linked: set[str] = set()
    for i, token in _content(tokens):
        before = last.get(token)
        if before is not None and i - before <= GAP:
            links += 1
            if token not in linked:
                linked.add(token)
                chains += 1
        else:
            linked.discard(token)
        last[token] = i
    return 1 + links / chains if chains else None


def _content(tokens: Sequence[str]) -> list[tuple[int, str]]:
    found, before = [], ""
    for i, token in enumerate(tokens):
        if len(token) > 3:
            before = ""
            if token not in _FUNCTION_EN:
                found.append((i, token))
        elif len(token) == 1 and token not in _FUNCTION_ZH and token > "㏿" and _HAN_TOKEN.match(token):
            if before:
                found.append((i, before + token))
            before = token
        else:
            before = ""
    return found


def _sentences(text: str, tokens: Sequence[str], kind: str) -> dict[str, float]:
    """What is counted per sentence, and the pronouns per token."""
    ends = [m.start() for m in _SENTENCE.finditer(text)]
    lengths = [b - a for a, b in zip([0, *ends], [*ends, len(text.rstrip())], strict=True) if b - a > 2] or [len(text)]
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((n - mean) ** 2 for n in lengths) / len(lengths)) / mean
    if kind == "zh":
        subordinate, pronouns = _SUBORDINATE_ZH.findall(text), len(_PRONOUN_ZH.findall(text))
    else:
        subordinate, pronouns = _SUBORDINATE_EN.findall(text), sum(t in _PRONOUNS for t in tokens)
    return {
        "subordinators_proxy": len(subordinate) / len(lengths),
        "pronoun_density_proxy": pronouns / len(tokens),
        "sentence_length": len(tokens) / len(lengths),
        "sentence_spread": spread,
    }
