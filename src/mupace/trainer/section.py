"""What every section of a run file is made of, and the sections of the controller and of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mupace.errors import ConfigError, one_of
from mupace.units import Span

if TYPE_CHECKING:
    from mupace.complexity import Bands

OFF = "off"


def _length(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"span={value!r} has no unit: write a length as text, such as '500 steps' or '2%'")
    return str(Span.parse(value))


def _switched(value: Any) -> Any:
    return None if value == OFF else value


Length = Annotated[str, BeforeValidator(_length)]
Switch = BeforeValidator(_switched)  # the word "off" is None
Stage = Literal["pretrain", "continue", "sft", "lora", "preference", "rl"]
Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ControlSection(Section):
    """The closed loop: policies that read the run's own measurements, and how far they may go.

    `bounds` are factors of the plan; `policy.<name>` has the options of a policy, `options` those of the arbiter.
    """

    mode: Literal["off", "observe", "advise", "act"] = "advise"
    policies: list[str] = Field(default_factory=lambda: ["guard", "time", "rate"])
    bounds: list[float] | None = None
    every: Length = "10 steps"
    probe: Annotated[Length | None, Switch] = None
    average: bool = True
    overhead: float | None = Field(default=None, gt=0, lt=1)
    options: dict[str, Any] = Field(default_factory=dict)
    policy: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> ControlSection:
        self.made()
        self.arbiter(every=1, seed=0)
        return self

    def made(self) -> tuple[Any, ...]:
        """The policies."""
        from mupace.policies import policy_of

        for name in self.policy:
            if name not in self.policies:
                raise ConfigError(
                    f"policy.{name} has options, but policies={self.policies}: legal is a policy that runs"
                )
        if len(set(self.policies)) < len(self.policies):
            raise ConfigError(f"policies={self.policies}: legal is each once")
        return tuple(policy_of(name, self.policy.get(name)) for name in self.policies)

    def arbiter(self, *, every: int, seed: int) -> dict[str, Any]:
        """The options of the arbiter."""
        from mupace.control.options import Options

        own = {"mode", "bounds", "every", "seed"} & self.options.keys()
        if own:
            raise ConfigError(
                f"options.{min(own)}: legal is control.{min(own)}"
                if "seed" not in own
                else "options.seed: legal is run.seed"
            )
        bounds = {} if self.bounds is None else {"bounds": self.bounds}
        return Options.from_dict({"mode": self.mode, "every": every, "seed": seed, **bounds, **self.options}).to_dict()


class WeightsSection(Section):
    """What samples count, by the document that they are from: its source, and how complex its text is.

    `sources`: pattern of document names to factor, the first that matches; `bands`: from complexity to factor.
    """

    sources: dict[str, Factor] = Field(default_factory=dict)
    default: Factor = 1.0
    complexity: bool = False
    bands: dict[str, float] | None = None
    low: float = Field(default=0.25, gt=0, le=1)
    high: float = Field(default=1.5, ge=1)
    apply: Literal["loss", "lr"] = "loss"

    @model_validator(mode="after")
    def _does_something(self) -> WeightsSection:
        if not self.sources and not self.complexity:
            raise ConfigError("nothing is weighted; legal is with sources, or complexity=true")
        if self.bands is not None and not self.complexity:
            raise ConfigError("bands are factors of a score; legal is with complexity=true")
        named = {f"sources.{pattern!r}": factor for pattern, factor in self.sources.items()}
        for name, factor in {**named, "default": self.default}.items():
            if not self.low <= factor <= self.high:
                raise ConfigError(f"{name}={factor:g}: legal is from low={self.low:g} to high={self.high:g}")
        self.made_bands()
        return self

    def made_bands(self) -> Bands:
        """From a complexity score to a factor."""
        from mupace.complexity import Bands

        given = self.bands or {}
        for key in given:
            if key not in Bands.__dataclass_fields__:
                raise one_of("key in bands", key, Bands.__dataclass_fields__)
        return Bands(**given)
