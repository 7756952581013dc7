"""What a run is: one TOML file (or a dict), checked whole before anything is built.

Every length carries its unit. Unknown keys, wrong types and impossible values are refused with one line that names
the key as it was written. The checked value is frozen; `RunConfig.to_dict()` is JSON-able and reads back equal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mupace.errors import ConfigError, one_of
from mupace.schedules import Curve, Schedule, preset, schedule
from mupace.schedules.presets import PRESETS
from mupace.units import Span, batch_tokens


def _span(text: str) -> str:
    return str(Span.parse(text))


Length = Annotated[str, AfterValidator(_span)]
Stage = Literal["pretrain", "continue", "sft", "lora", "preference", "rl"]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The model: a short name, a folder with a config.json, and keys of its configuration class."""

    name: str = "llama"
    config: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    attention: Literal["sdpa", "eager"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False


class DataSection(Section):
    """The text: "stdlib", files, folders, patterns; how it is tokenized and cut."""

    text: str | list[str] = "stdlib"
    field: str = "text"
    tokenizer: str = "bytes"
    seq_len: Positive = 128
    valid_fraction: float = Field(default=0.015, gt=0, le=0.5)
    cache: str | None = None


class BatchSection(Section):
    """B_global = micro · accumulate samples per update (one process)."""

    micro: Positive = 16
    accumulate: Positive = 1


class OptimizerSection(Section):
    """An optimizer by name; `lr` is the peak. `options` are the optimizer's own arguments, `rest` those of a second."""

    name: str = "adamw"
    lr: float = Field(default=3e-3, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)
    rest: dict[str, Any] = Field(default_factory=dict)


class ScheduleSection(Section):
    """The curve: `text`, or `preset`, or `phases` with `start`; and the length of the run."""

    total: Length
    text: str | None = None
    preset: str | None = None
    phases: list[dict[str, Any]] | None = None
    start: float | None = None
    sample: Literal["midpoint", "start", "end"] | None = None
    floor: float | None = None
    fields: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> ScheduleSection:
        given = [k for k in ("text", "preset", "phases") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"schedule: {' and '.join(given) or 'nothing'} given; legal is one of text, preset, phases"
            )
        self.schedule()
        return self

    def schedule(self) -> Schedule:
        """The schedule this section describes."""
        if self.preset is not None:
            return preset(self.preset).schedule
        if self.text is not None:
            return Schedule.parse(self.text)
        state = {"phases": self.phases, "start": self.start}
        return Schedule.from_dict({k: v for k, v in state.items() if v is not None})


class RuleSection(Section):
    """One rule over the tensors that `select` names: factors, a pace of their own, or frozen."""

    select: str
    lr: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=1.0, ge=0)
    eps: float = Field(default=1.0, ge=0)
    schedule: str | None = None
    floor: float | None = None
    unfreeze: Length | None = None
    freeze: bool = False


class GroupsSection(Section):
    """Who gets which multiplier."""

    no_decay: list[str] = Field(default_factory=lambda: ["norm", "bias"])
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    roles: dict[str, str] = Field(default_factory=dict)
    rules: list[RuleSection] = Field(default_factory=list)


class ClipSection(Section):
    """Gradient clipping: by global norm, or element by element; null leaves it out."""

    norm: float | None = Field(default=1.0, gt=0)
    value: float | None = Field(default=None, gt=0)


class EvalSection(Section):
    """Evaluation on a fixed set of validation blocks, and a sample of generated text at the end."""

    every: Length | None = "50 steps"
    blocks: Positive = 64
    sample_tokens: int = Field(default=200, ge=0)
    prompt: str = "def "


class CheckpointSection(Section):
    """Whole directories, the last `keep` of them."""

    every: Length | None = "100 steps"
    keep: Positive = 2


class RunSection(Section):
    """Everything else about the run."""

    stage: Stage = "pretrain"
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: Positive | None = None
    tensorboard: bool = False
    on_mismatch: Literal["error", "checkpoint", "config"] = "error"


class RunConfig(Section):
    """A whole run."""

    schedule: ScheduleSection
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    batch: BatchSection = Field(default_factory=BatchSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    groups: GroupsSection = Field(default_factory=GroupsSection)
    clip: ClipSection = Field(default_factory=ClipSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    run: RunSection = Field(default_factory=RunSection)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check a dict.

        Raises:
            ConfigError: one line naming the first key that is wrong.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _one_line(error) from None

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read and check a TOML file."""
        return cls.parse(read_toml(path))

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)

    def replace(self, changes: Mapping[str, Any]) -> RunConfig:
        """The config with dotted keys set, checked again: {"optimizer.lr": 1e-3}."""
        values = self.to_dict()
        for dotted, value in changes.items():
            *path, last = dotted.split(".")
            place = values
            for key in path:
                place = place.setdefault(key, {})
                if not isinstance(place, dict):
                    raise ConfigError(f"{dotted}: {key} is a value, not a section")
            place[last] = value
        return RunConfig.parse(values)

    def curve(self, samples_per_epoch: int | None) -> Curve:
        """The learning-rate curve on this run's batch, and so its number of updates."""
        samples, _ = batch_tokens(
            micro=self.batch.micro, accumulate=self.batch.accumulate, workers=1, seq_len=self.data.seq_len
        )
        return schedule(
            self.schedule.schedule(),
            total=self.schedule.total,
            samples_per_step=samples,
            tokens_per_sample=self.data.seq_len,
            samples_per_epoch=samples_per_epoch,
            floor=self.schedule.floor,
            sample=self.schedule.sample,
        )


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        ConfigError: the file cannot be read or is not TOML; the message has the line.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not TOML: {error}") from None


def _one_line(error: ValidationError) -> ConfigError:
    """The first thing that is wrong, with the key as it was written."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *section, key = first["loc"]
        return one_of(f"key in [{'.'.join(map(str, section))}]" if section else "section", key, _legal(section))
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return ConfigError(f"{where}: {inner}")
    if first["type"] == "missing":
        return ConfigError(f"{where}: missing; it is required")
    return ConfigError(f"{where}={first['input']!r}: {first['msg']}")


def _legal(section: list[Any]) -> list[str]:
    """The legal keys of a section, found by walking the models."""
    model: Any = RunConfig
    for part in section:
        if isinstance(part, str):
            model = model.model_fields[part].annotation
        else:
            model = model.__args__[0]  # an element of a list
    return list(model.model_fields)


STAGES = tuple(sorted({p.stage for p in PRESETS.values()}))
