"""Text as the features see it: its kind, its windows, its tokens."""

from __future__ import annotations

import re

import numpy as np

from mupace.errors import ConfigError, DataError

KINDS = ("en", "zh", "code")
"""`en` stands for every text in words with spaces; its lists of words are English."""

WINDOW = 4096
"""Characters of a window (no source: this library's choice)."""
WINDOWS = 16
"""Most windows of a text that are looked at (no source: this library's choice)."""

HAN = r"㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f"
_HAN = re.compile(f"[{HAN}]")
_WORD = re.compile(r"\w+")
_HAN_OR_WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
_SYMBOLS = np.zeros(128, bool)
_SYMBOLS[[ord(c) for c in "{}()[];=<>_#/\\+&|%$@"]] = True

ZH_SHARE = 0.3  # of the characters that are no white space; a Chinese page on software is half in Han
CODE_SYMBOLS = 0.04  # of the characters that are no white space
CODE_PROSE = 0.52  # of the words, those followed by one space and another word


def checked(text: str) -> str:
    """The text itself.

    Raises:
        ConfigError: it is no str.
        DataError: nothing but white space is in it.
    """
    if not isinstance(text, str):
        raise ConfigError(f"text={type(text).__name__}: legal is a str; decode bytes first")
    if not text or text.isspace():
        raise DataError("text is empty: legal is text with a character that is not white space")
    return text


def windows(text: str) -> list[str]:
    """The pieces that are looked at: all of a text up to 64 Ki characters, then 16 evenly spaced of 4 Ki each.

    A short last piece goes with the one before it. The choice depends on the length alone.
    """
    if len(text) <= WINDOW * WINDOWS:
        starts = list(range(0, len(text), WINDOW))
        if len(starts) > 1 and len(text) - starts[-1] < WINDOW // 2:
            starts.pop()
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    last = len(text) - WINDOW
    starts = [i * last // (WINDOWS - 1) for i in range(WINDOWS)]
    return [text[a : a + WINDOW] for a in starts]


def kind_of(text: str) -> str:
    """`zh`, `code` or `en`, by shares of character classes in the windows.

    zh: Han characters are at least 0.3 of what is not white space. code: the symbols `{}()[];=<>_#/+&|%$@` and the
    backslash are at least 0.04 of it, and fewer than 0.52 of the words are followed by a space and another word. en:
    everything else. The thresholds are this library's choice: 0.95 of the files of Python's standard library come out
    as code, those that are mostly documentation do not.
    """
    return _kind("".join(windows(checked(text))))


def _kind(text: str) -> str:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    visible = max(1, int(((codes > 32) & (codes != 0x3000) & (codes != 0xA0)).sum()))
    han = ((codes >= 0x3400) & (codes <= 0x4DBF)) | ((codes >= 0x4E00) & (codes <= 0x9FFF)) | (codes >= 0x20000)
    if int(han.sum()) / visible >= ZH_SHARE:
        return "zh"
    if int(_SYMBOLS[codes[codes < 128]].sum()) / visible < CODE_SYMBOLS:
        return "en"
    letters = ((codes | 32) >= 97) & ((codes | 32) <= 122) | (codes >= 192)
    words = int(letters[:1].sum()) + int((letters[1:] & ~letters[:-1]).sum())
    followed = int((letters[:-2] & (codes[1:-1] == 32) & letters[2:]).sum())
    return "code" if followed < CODE_PROSE * max(words, 1) else "en"


def tokens_of(text: str) -> list[str]:
    """Lower-case tokens: each Han character alone, else runs of letters, digits and underscores.

    >>> tokens_of("The cat, 猫咪 x_1")
    ['the', 'cat', '猫', '咪', 'x_1']
    """
    lower = text.lower()
    return (_WORD if lower.isascii() or not _HAN.search(lower) else _HAN_OR_WORD).findall(lower)
