"""`mupace complexity`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mupace.cli.settings import GivenPath, refuse_place
from mupace.errors import DataError

if TYPE_CHECKING:
    from mupace.complexity import Cache, Calibration


def complexity(
    *files: GivenPath,
    calibration: GivenPath | None = None,
    calibrate: GivenPath | None = None,
    cache: GivenPath | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Show how complex texts are: kind, score, the factor that follows from it, and every feature.

    Parameters
    ----------
    files
        Text files in UTF-8; each is one text.
    calibration
        A calibration that --calibrate wrote; by default the one that comes along.
    calibrate
        Make a calibration from these files and write it there, instead of showing them.
    cache
        A file in which features are kept under the hash of the text.
    as_json
        Print one JSON object per file.
    """
    from mupace.complexity import Cache, Calibration
    from mupace.complexity import calibrate as made_from

    if not files:
        raise DataError("files: none is given; legal is at least one text file")
    if calibrate is not None:
        refuse_place("--calibrate", calibrate)
    known = None if calibration is None else Calibration.load(calibration)
    kept = None if cache is None else Cache(cache)
    texts = [(file, _text(file)) for file in files]
    if calibrate is not None:
        made = made_from((text for _, text in texts), cache=kept, base=known, source=f"{len(files)} files")
        made.save(calibrate)
        print(f"{calibrate}: {', '.join(f'{n} {kind}' for kind, n in made.texts.items())}")
    else:
        _show(texts, known, kept, as_json)


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 at byte {error.start}") from None
    if not text or text.isspace():
        raise DataError(f"{file} is empty: legal is text with a character that is not white space")
    return text


def _show(
    texts: Sequence[tuple[Path, str]], calibration: Calibration | None, cache: Cache | None, as_json: bool
) -> None:
    from mupace.complexity import Bands, score

    for file, text in texts:
        found = score(text, calibration=calibration, cache=cache)
        factor = Bands()(found.score)
        if as_json:
            row = {"file": str(file), "kind": found.kind, "score": found.score, "factor": factor}
            print(json.dumps({**row, "features": dict(found.features), "z": dict(found.z)}, ensure_ascii=False))
            continue
        print(f"{file}   {found.kind}   score {found.score:.2f}   factor {factor:.2f}")
        for name, value in found.features.items():
            z = f"{found.z[name]:+6.2f}" if name in found.z else ""
            print(f"  {name:<24} {value:>12.6g} {z}".rstrip())
