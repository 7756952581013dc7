"""How complex a text is, in numbers that need no model: computed beside the training, kept under the text's hash.

scored = complexity.score(text, cache=complexity.Cache("scores.jsonl"))
weight = complexity.Bands()(scored.score)
"""

from mupace.complexity.bands import Bands
from mupace.complexity.cache import Cache, text_hash
from mupace.complexity.features import FEATURES, VERSION, features
from mupace.complexity.score import Calibration, Scored, calibrate, default_calibration, score
from mupace.complexity.scorers import ReferenceLoss, Scorer, SpacyDepth, TextFeatures, WordnetSenses
from mupace.complexity.text import KINDS, kind_of, tokens_of, windows

__all__ = [
    "FEATURES",
    "KINDS",
    "VERSION",
    "Bands",
    "Cache",
    "Calibration",
    "ReferenceLoss",
    "Scored",
    "Scorer",
    "SpacyDepth",
    "TextFeatures",
    "WordnetSenses",
    "calibrate",
    "default_calibration",
    "features",
    "kind_of",
    "score",
    "text_hash",
    "tokens_of",
    "windows",
]
