"""What a run is: one TOML file (or a dict), checked whole before anything is built.

Every length carries its unit. Unknown keys, wrong types and impossible values are refused with one line that names
the key as it was written. What is on by default is switched off by the word "off", as TOML has no null. The checked
value is frozen; `RunConfig.to_dict()` is JSON-able and reads back equal.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from mupace.errors import ConfigError, one_of
from mupace.schedules import Curve, Schedule, batch_scaled, preset, schedule
from mupace.trainer.section import OFF, ControlSection, Length, Positive, Section, Stage, Switch, WeightsSection
from mupace.units import batch_tokens


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


class BatchRuleSection(Section):
    """`lr` was tuned at another batch: `base` samples per update. It follows by `rule`, up to the `critical` batch."""

    base: Positive
    rule: Literal["linear", "sqrt", "none"] = "sqrt"
    critical: float | None = Field(default=None, gt=0)


class ParametrizeSection(Section):
    """The model is scaled from a base on which its numbers were tuned: lr, weight decay and eps are the base's."""

    base: dict[str, Any] | str
    rules: str = "mup"
    weight_decay: Literal["constant", "sqrt", "unscaled"] = "constant"
    embedding_lr: Literal["const", "inv_sqrt"] = "const"
    explicit: list[str] = Field(default_factory=list)
    allow: list[str] = Field(default_factory=list)
    init: Literal["scale", "keep"] = "scale"
    batch: float = Field(default=1.0, gt=0)
    tokens: float = Field(default=1.0, gt=0)
    duration: Literal["none", "sde", "empirical"] = "none"

    @model_validator(mode="after")
    def _known(self) -> ParametrizeSection:
        from mupace.scaling import RULES

        if self.rules not in RULES:
            raise one_of("rules", self.rules, RULES)
        if self.duration == "none" and (self.batch, self.tokens) != (1.0, 1.0):
            raise ConfigError(
                f"batch={self.batch:g}, tokens={self.tokens:g} change nothing with duration='none'; legal are 'sde' "
                "and 'empirical'"
            )
        return self


class StartSection(Section):
    """Where a run begins that does not begin at random weights: a migrated directory, a checkpoint, or weights."""

    checkpoint: Annotated[str, Field(min_length=1)]
    optimizer: Literal["keep", "reset", "calibrate"] = "keep"
    position: Literal["fraction", "tokens", "zero"] = "fraction"
    rewarm: Length | None = None
    accept_failed_gate: bool = False


class OptimizerSection(Section):
    """An optimizer by name; `lr` is the peak. `options` are the optimizer's own arguments, `rest` those of a second."""

    name: str = "adamw"
    lr: float = Field(default=3e-3, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)
    rest: dict[str, Any] = Field(default_factory=dict)
    batch_rule: BatchRuleSection | None = None

    @model_validator(mode="after")
    def _set_once(self) -> OptimizerSection:
        for table in ("options", "rest"):
            for key in {"lr", "weight_decay"} & getattr(self, table).keys():  # the groups' own would win, silently
                raise ConfigError(f"{table}.{key}: legal is optimizer.{key}, and [[groups.rules]] for some tensors")
        return self


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
            raise ConfigError(f"{' and '.join(given) or 'nothing'} given; legal is one of text, preset, phases")
        if self.start is not None and self.phases is None:
            raise ConfigError(f"start={self.start:g} belongs to phases; {given[0]} has a start of its own")
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

    @model_validator(mode="after")
    def _does_one_thing(self) -> RuleSection:
        plain = RuleSection.model_construct(select=self.select)
        said = [k for k in RuleSection.model_fields if k != "freeze" and getattr(self, k) != getattr(plain, k)]
        if self.freeze and said:
            raise ConfigError(f"select={self.select!r}: freeze and {said[0]} are given; a frozen tensor has no rate")
        if not self.freeze and not said:
            legal = ", ".join(k for k in RuleSection.model_fields if k != "select")
            raise ConfigError(f"select={self.select!r} sets nothing; legal are {legal}")
        return self


class GroupsSection(Section):
    """Who gets which multiplier."""

    no_decay: list[str] = Field(default_factory=lambda: ["norm", "bias"])
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    preset: Literal["stability", "sharpness"] | None = None
    roles: dict[str, str] = Field(default_factory=dict)
    rules: list[RuleSection] = Field(default_factory=list)


class ClipSection(Section):
    """Gradient clipping: element by element, then by global norm; "off" leaves the latter out.

    With `adaptive`, every role (or tensor, or the whole) is clipped at a quantile of its own past norms before.
    `centralise` subtracts, before all that, the mean over inputs from the gradients of the tensors it selects.
    """

    norm: Annotated[Annotated[float, Field(gt=0)] | None, Switch] = 1.0
    value: float | None = Field(default=None, gt=0)
    adaptive: Literal["role", "tensor", "global"] | None = None
    quantile: float | None = Field(default=None, gt=0, lt=1)
    centralise: str | None = None

    @model_validator(mode="after")
    def _of_what(self) -> ClipSection:
        if self.quantile is not None and self.adaptive is None:
            raise ConfigError(f"quantile={self.quantile:g} without adaptive; legal is with adaptive='role', …")
        return self


class EvalSection(Section):
    """Evaluation on a fixed set of validation blocks, and a sample of generated text at the end."""

    every: Annotated[Length | None, Switch] = "50 steps"
    blocks: Positive = 64
    sample_tokens: int = Field(default=200, ge=0)
    prompt: str = "def "


class CheckpointSection(Section):
    """Whole directories, the last `keep` of them; the end of a run is always saved."""

    every: Annotated[Length | None, Switch] = "100 steps"
    keep: Positive = 2


class RunSection(Section):
    """Everything else about the run."""

    stage: Stage = "pretrain"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
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
    parametrize: ParametrizeSection | None = None
    start: StartSection | None = None
    groups: GroupsSection = Field(default_factory=GroupsSection)
    clip: ClipSection = Field(default_factory=ClipSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    control: ControlSection | None = None
    weights: WeightsSection | None = None
    run: RunSection = Field(default_factory=RunSection)

    @model_validator(mode="before")
    @classmethod
    def _model_of_start(cls, values: Any) -> Any:
        """A run that begins from a directory and names no model has that directory's."""
        start, model = values.get("start"), values.get("model", {})
        where = start.get("checkpoint") if isinstance(start, Mapping) else None
        if isinstance(where, str) and isinstance(model, Mapping) and "name" not in model:
            return {**values, "model": {**model, "name": where}}
        return values

    @model_validator(mode="after")
    def _factors_once(self) -> RunConfig:
        if self.start is not None and self.parametrize is not None:
            raise ConfigError(
                f"parametrize with start.checkpoint={self.start.checkpoint!r}: the weights are trained, and the "
                "factors of their rates come with them; legal is one of the two sections"
            )
        return self

    @model_validator(mode="after")
    def _same_preset(self) -> RunConfig:
        if self.control is None or "layer" not in self.control.policies:
            return self
        preset = self.control.policy.get("layer", {}).get("preset", "stability")
        if self.groups.preset != preset:
            given = "not given" if self.groups.preset is None else repr(self.groups.preset)
            raise ConfigError(
                f"groups.preset is {given}: the policy 'layer' moves rates inside the ranges of {preset!r}; "
                f"legal is groups.preset={preset!r}"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_used(self) -> RunConfig:
        reads = self.control is not None and "data" in self.control.policies
        if reads and self.weights is None:
            raise ConfigError(
                "control.policies has 'data', which reads what [weights] gives; legal is with that section"
            )
        if self.weights is not None and self.weights.apply == "lr" and not reads:
            raise ConfigError(
                "weights.apply='lr' is for the policy 'data', which does not run; legal is with it in "
                "control.policies, or apply='loss'"
            )
        return self

    @model_validator(mode="after")
    def _batch_once(self) -> RunConfig:
        rule, plan = self.optimizer.batch_rule, self.parametrize
        if rule is not None and rule.rule != "none" and plan is not None and plan.batch != 1.0:
            raise ConfigError(
                f"optimizer.batch_rule and parametrize.batch={plan.batch:g} both move lr with the batch; legal is one"
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check a dict.

        Raises:
            ConfigError: one line naming the first key that is wrong.
        """
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            raise _one_line(error) from None
        try:
            json.dumps(config.to_dict(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config: a value cannot be written as JSON: {error}") from None
        return config

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read and check a TOML file."""
        return cls.parse(read_toml(path))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `parse` reads it back equal."""
        plain: dict[str, Any] = json.loads(json.dumps(_plain(self)))  # a tuple becomes the list that is read back
        if self.start is not None and self.model.name == self.start.checkpoint:
            del plain["model"]["name"]  # it follows the start, also where that is changed
        return plain

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

    @property
    def peak(self) -> float:
        """The peak at this run's batch: `optimizer.lr`, moved from the base's batch by `optimizer.batch_rule`.

        Raises:
            ConfigError: a rule for a rate of 0.
        """
        o, batch = self.optimizer, self.batch.micro * self.batch.accumulate
        if o.batch_rule is None:
            return o.lr
        rule = o.batch_rule
        try:
            return batch_scaled(o.lr, base=rule.base, batch=batch, rule=rule.rule, critical=rule.critical)
        except ConfigError as error:
            raise ConfigError(f"optimizer.batch_rule: {error}") from None

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
    try:
        return parse_toml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except ValueError as error:  # of the text, or of its encoding
        raise ConfigError(f"config {path}: not TOML: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML text as a dict.

    Raises:
        ValueError: it is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _plain(section: Section) -> dict[str, Any]:
    """Every key that has a value; what is on by default and was switched off is "off"."""
    out: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            value = _plain(value)
        elif isinstance(value, list):
            value = [_plain(v) if isinstance(v, Section) else v for v in value]
        elif value is None and field.default is not None:
            value = OFF
        if value is not None:
            out[name] = value
    return out


def _one_line(error: ValidationError) -> ConfigError:
    """The first thing that is wrong, with the key as it was written; a misspelt key goes before a missing one."""
    problems = error.errors()
    first = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    where = _written(first["loc"])
    if first["type"] == "extra_forbidden":
        *section, key = first["loc"]
        return one_of(f"key in [{'.'.join(map(str, section))}]" if section else "section", key, _legal(section))
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        text = str(inner)
        if "span=" in text:
            return ConfigError(text.replace("span=", f"{where}=", 1))
        return ConfigError(f"{where}: {text}" if where else text)  # of two sections: it names its keys itself
    if first["type"] == "missing":
        return ConfigError(f"{where}: missing; it is required")
    if first["type"] == "model_type":
        return ConfigError(f"{where}={reprlib.repr(first['input'])}: legal is a table, [{where}]")
    legal = dict.fromkeys(p["msg"].removeprefix("Input should be ") for p in problems if _written(p["loc"]) == where)
    return ConfigError(f"{where}={reprlib.repr(first['input'])}: legal is {' or '.join(legal)}")


def _written(place: Sequence[int | str]) -> str:
    """The place of an error as keys, without the names of pydantic's own union branches."""
    model: Any = RunConfig
    keys: list[str] = []
    for part in place:
        model = _given(model)
        if isinstance(model, type) and issubclass(model, Section):
            model = model.model_fields[str(part)].annotation if part in model.model_fields else None
        elif isinstance(part, int) and getattr(model, "__origin__", None) is list:
            model = model.__args__[0]
        elif getattr(model, "__origin__", None) is not dict:
            break
        keys.append(str(part))
    return ".".join(keys)


def _legal(section: Sequence[int | str]) -> list[str]:
    """The legal keys of a section, found by walking the models."""
    model: Any = RunConfig
    for part in section:
        model = model.model_fields[part].annotation if isinstance(part, str) else model.__args__[0]  # of a list
        model = _given(model)
    return list(model.model_fields)


def _given(model: Any) -> Any:
    """The section where one may be left out."""
    optional = [part for part in get_args(model) if isinstance(part, type) and issubclass(part, Section)]
    return optional[0] if optional and type(None) in get_args(model) else model
