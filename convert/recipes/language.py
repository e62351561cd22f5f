"""Recipes: what is done to a teacher, as frozen data. A target is a function that returns one; a variant edits what it
returns."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from transformers import PreTrainedConfig

from convert.core.errors import UserError
from convert.core.fields import TEXT, Name, Text, check, checked, require, shown
from convert.mixers import MIXERS
from convert.objectives import TERMS, Objective
from convert.objectives.base import name_of as name_of_term
from convert.objectives.base import value_of
from convert.training import STAGES, selectors
from convert.training.align import align
from convert.training.distill import distill
from convert.training.selectors import SELECTORS
from convert.training.settings import Settings


@dataclass(frozen=True)
class OneIn:
    """One layer in `every`: the last of each so many, or as many of those whose replacement alone costs most, by
    measurement."""

    every: Annotated[int, (2, 1000)]
    measured: bool = False

    __post_init__ = check

    def count(self, num_layers: int) -> int:
        return num_layers // self.every

    def pattern(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(self.every - 1, num_layers, self.every))


@dataclass(frozen=True)
class Swap:
    """Replace the token mixers of all layers but those that `keep` names.

    `exact`: theory says that the function stays the same, so the run measures it and stops if it does not.
    `calibration`: tokens of training text over which the inputs of the layers are looked at first, for mixers that
    start from them."""

    name: Name
    mixer: Literal[tuple(MIXERS)]
    options: object
    keep: tuple[Annotated[int, (0, 1000)], ...] | OneIn = ()
    exact: bool = False
    calibration: Annotated[int, (0, 2**20)] = 0  # the windows looked at are held at once (the bound is ours)

    def __post_init__(self):
        check(self)
        require(MIXERS[self.mixer].Options, self.options, f"Swap: options of {self.mixer}")

    @property
    def looks_first(self) -> bool:
        return self.calibration > 0 and MIXERS[self.mixer].needs_inputs(self.options)

    def edited(self, num_layers: int) -> tuple[int, ...]:
        """The layers replaced, as far as no measurement decides."""
        kept = self.keep.pattern(num_layers) if isinstance(self.keep, OneIn) else self.keep
        return tuple(i for i in range(num_layers) if i not in kept)


@dataclass(frozen=True)
class Forget:
    """Start the decays at a small rate instead of none, after the hand-over was checked; 0 leaves them at none."""

    name: Name
    rate: Annotated[float, (0, 10)]

    __post_init__ = check


@dataclass(frozen=True)
class Train:
    name: Name
    stage: Callable
    settings: Settings

    def __post_init__(self):
        check(self)
        if self.stage not in STAGES.values():
            raise UserError(f"Train: stage must be one of {', '.join(STAGES)}; got {shown(self.stage)}.")


Step = Swap | Forget | Train


@dataclass(frozen=True)
class Recipe:
    """`questions`: of each task, that teacher and student answer at the end."""

    target: Name
    steps: tuple[Step, ...]
    questions: Annotated[int, (1, 100_000)]

    def __post_init__(self):
        check(self)
        names = [step.name for step in self.steps]
        if not self.steps or len(set(names)) < len(names):
            raise UserError(
                f"Recipe: steps must be at least one, each with a name of its own; got {', '.join(names) or 'none'}."
            )

    @property
    def tokens(self) -> int:
        return sum(step.settings.tokens for step in self.steps if isinstance(step, Train))


@dataclass(frozen=True)
class Budget:
    """What the defaults depend on. Tokens are the total over all training steps."""

    tokens: Annotated[int, (1, 1e14)]
    seq_len: Annotated[int, (2, 2**24)]
    batch_tokens: Annotated[int, (2, 2**27)]
    align_lr: Annotated[float, (0, 10)]
    distill_lr: Annotated[float, (0, 10)]
    objective: Objective
    micro_tokens: Annotated[int, (1, 2**27)]
    align_batch_tokens: Annotated[int, (2, 2**27)] | None = None  # of the first stage; None: as in the last
    checkpointing: bool = False
    trains: Callable = selectors.all_but_embeddings  # in the last stage (the paper's)
    schedule: Literal["wsd", "cosine"] = "wsd"  # of the last stage
    noise: Annotated[float, (0, 1)] = 0.0  # in the last stage
    window: Annotated[int, (1, 1e7)] = 512  # of sliding-window attention (ours)
    latent_shape: Literal["exact", "native"] = (
        "exact"  # of latent attention; native where the teacher's attention has neither biases nor q/k norm
    )
    edit_lr: Annotated[float, (0, 10)] = (
        1e-4  # of both stages of attention editing, whose students start close to their teachers (ours)
    )
    seed: Annotated[int, (0, 2**63 - 1)] = 0
    questions: Annotated[int, (1, 100_000)] = 16  # of each task at the end (ours)
    starts_linear: bool = False  # the teacher is linear attention already: nothing to align

    __post_init__ = check


KL = Objective.of("forward_kl")  # ours, better than the paper's cross-entropy: experiments/LOG.md


@checked
def budget(
    teacher: Text,
    config: PreTrainedConfig,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
) -> Budget:
    """The defaults for a teacher, by its name and configuration, but for what is given."""
    host = config.host_config() if config.model_type == "converted" else config
    size = host.num_hidden_layers * host.hidden_size**2 * 12
    if size < 2e7:  # ours, measured on neox-nano: experiments/LOG.md
        default = Budget(
            1_800_000,
            256,
            2048,
            1e-2,
            2e-3,
            KL,
            2048,
            512,
            schedule="cosine",
            noise=0.1,
            window=64,
            edit_lr=5e-4,
        )
    elif teacher.startswith(
        "pythia-"
    ):  # 10 B tokens in sequences of 1,024, about 50 k tokens a step: HedgeMamba; the rates are ours
        default = Budget(10_000_000_000, 1024, 49_152, 1e-3, 1e-4, KL, 8192)
    else:  # ours
        default = Budget(100_000_000, 1024, 16_384, 1e-3, 1e-4, KL, 4096)
    for name, value in (("tokens", tokens), ("seq_len", seq_len), ("batch_tokens", batch_tokens), ("seed", seed)):
        if value is not None:
            require(Budget.__dataclass_fields__[name].type, value, f"--{name.replace('_', '-')}")
    tokens = default.tokens if tokens is None else tokens
    if seq_len is None:  # a short budget goes into more, shorter sequences
        seq_len = min(
            default.seq_len, host.max_position_embeddings, max(256, 1 << (max(tokens // 100, 1)).bit_length() - 1)
        )
    if batch_tokens is None:
        batch_tokens = seq_len * max(1, min(default.batch_tokens, tokens // 150) // seq_len)
    micro = min(batch_tokens, max(seq_len, default.micro_tokens))
    return dataclasses.replace(
        default,
        tokens=tokens,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        micro_tokens=micro,
        checkpointing=size > 3e8,
        seed=seed,
        latent_shape=(
            "native" if host.model_type in LLAMA_SHAPED and not getattr(host, "attention_bias", False) else "exact"
        ),
        starts_linear=config.model_type == "converted"
        and all(mixer and mixer["name"] == "linear" for mixer in config.mixers),
    )


LLAMA_SHAPED = ("llama", "mistral")  # attention that deepseek_v3 can be made from
FORGET = {"mamba": 1e-3, "mamba2": 3e-3}  # ours, measured on neox-nano: experiments/LOG.md
ALIGN_SHARE = 0.1  # of the tokens (the paper's best split, 10 / 90)


def _align(budget: Budget, tokens: int) -> Train:
    """HedgeMamba's stage 1: cosine distance of each layer's attention output, the feature maps alone."""
    settings = _settings(budget, tokens, budget.align_lr, Objective.of("cosine_distance"), selectors.feature_maps, "wsd")
    return Train("align", align, _smaller_batches(budget, settings))


def _distill(budget: Budget, tokens: int) -> Train:
    """HedgeMamba's stage 2: by cross-entropy there, by forward KL here (ours: LOG.md)."""
    settings = _settings(budget, tokens, budget.distill_lr, budget.objective, budget.trains, budget.schedule)
    return Train("distill", distill, dataclasses.replace(settings, noise=budget.noise))


def _smaller_batches(budget: Budget, settings: Settings) -> Settings:
    """Few tokens are worth more as many small steps: each layer has a problem of its own, and an easy one (ours:
    LOG.md)."""
    if budget.align_batch_tokens is None:
        return settings
    size = budget.seq_len * max(1, min(budget.align_batch_tokens, budget.batch_tokens) // budget.seq_len)
    return dataclasses.replace(settings, batch_tokens=size, micro_tokens=min(size, settings.micro_tokens))


def _settings(budget: Budget, tokens: int, lr: float, objective: Objective, trains: Callable, schedule: str) -> Settings:
    return Settings(
        tokens, lr, objective, trains, budget.seq_len, budget.batch_tokens, budget.micro_tokens, budget.seed, schedule,
        checkpointing=budget.checkpointing, evaluate_every=budget.tokens // 4,
    )  # fmt: skip


@checked
def to_linear(budget: Budget) -> Recipe:
    """Attention -> Hedgehog linear attention."""
    first = int(budget.tokens * ALIGN_SHARE)
    return Recipe(
        "linear",
        (
            Swap("linear", "linear", MIXERS["linear"].Options()),
            _align(budget, first),
            _distill(budget, budget.tokens - first),
        ),
        budget.questions,
    )


@checked
def to_mamba(budget: Budget, mixer: Literal["mamba", "mamba2"] = "mamba") -> Recipe:
    """Attention -> Hedgehog linear attention -> Mamba, which starts as exactly that (HedgeMamba, arXiv 2604.14191)."""
    first = 0 if budget.starts_linear else int(budget.tokens * ALIGN_SHARE)
    aligned = (
        () if budget.starts_linear else (Swap("linear", "linear", MIXERS["linear"].Options()), _align(budget, first))
    )
    handover = Swap("handover", mixer, MIXERS[mixer].Options(), exact=True)
    forget = Forget("forget", FORGET[mixer])
    return Recipe(mixer, (*aligned, handover, forget, _distill(budget, budget.tokens - first)), budget.questions)


@checked
def to_mamba2(budget: Budget) -> Recipe:
    """As to_mamba, with one decay per head: the scan becomes matrix products."""
    return to_mamba(budget, "mamba2")


FULL = OneIn(
    5
)  # layers that keep full attention (a fifth of the cache: Attention Editing's 80 % less, its windows not counted)
CALIBRATION = 32_768  # tokens (TransMLA's 128 samples of 256)
HANDOVER_TOKENS = 2048  # over which an exact swap is checked (ours)
RANKING_TOKENS = 2048  # of training text, for each layer (ours)


@checked
def to_gate_swa(budget: Budget) -> Recipe:
    """Attention -> gated sliding-window attention with sinks, but for every fifth layer (Attention Editing, arXiv
    2604.05688): first each edited layer learns the attention output of its own, then the whole model the teacher's
    distribution."""
    window = min(budget.window, budget.seq_len // 2)  # or training would never see its end
    edit = Swap("edit", "gate-swa", MIXERS["gate-swa"].Options(window=window), FULL)
    return _edited("gate-swa", edit, budget)


@checked
def to_mla(budget: Budget) -> Recipe:
    """Attention -> multi-head latent attention with half of the cache (Attention Editing, arXiv 2604.05688, from a
    calibrated start)."""
    edit = Swap(
        "edit",
        "mla",
        MIXERS["mla"].Options(budget.latent_shape, cache_budget=0.5, start="calibrated"),
        calibration=min(CALIBRATION, budget.tokens),
    )
    return _edited("mla", edit, budget)


def _edited(target: str, edit: Swap, budget: Budget) -> Recipe:
    """Attention Editing's two stages: the error of each edited layer's attention output over its energy, all of the new
    mixers trained; then the whole model."""
    first = int(budget.tokens * ALIGN_SHARE)
    first_stage = _settings(budget, first, budget.edit_lr, Objective.of("energy_mse"), selectors.mixers, "wsd")
    last_stage = _distill(dataclasses.replace(budget, distill_lr=budget.edit_lr), budget.tokens - first)
    return Recipe(
        target, (edit, Train("align", align, _smaller_batches(budget, first_stage)), last_stage), budget.questions
    )


RECIPES: dict[str, Callable[[Budget], Recipe]] = {
    "linear": to_linear, "mamba": to_mamba, "mamba2": to_mamba2, "gate-swa": to_gate_swa, "mla": to_mla
}  # fmt: skip


@checked
def tiny(recipe: Recipe) -> Recipe:
    """The same path in seconds: three small steps of each stage."""

    def shrink(step: Step) -> Step:
        if isinstance(step, Swap):
            options = step.options
            if step.mixer == "gate-swa":
                options = dataclasses.replace(options, window=min(options.window, 64 // 2))
            return dataclasses.replace(step, options=options, calibration=min(step.calibration, 3 * 128))
        if not isinstance(step, Train):
            return step
        small = dataclasses.replace(
            step.settings, tokens=3 * 128, seq_len=64, batch_tokens=128, micro_tokens=128, evaluate_every=0
        )
        return dataclasses.replace(step, settings=small)

    return dataclasses.replace(recipe, steps=tuple(shrink(step) for step in recipe.steps), questions=2)


def describe(step: Step) -> dict:
    """A step as plain data, functions by their names: what the ledger compares and the report prints."""
    plain = dataclasses.asdict(step)
    if isinstance(step, Train):
        plain["stage"] = step.stage.__name__
        plain["settings"] |= {
            "objective": step.settings.objective.plain(),
            "trains": selectors.name_of(step.settings.trains),
        }
    return {"kind": type(step).__name__} | plain


@checked
def with_setting(recipe: Recipe, assignment: str) -> Recipe:
    """`STEP.FIELD=VALUE` applied: the field of the step itself, of its settings, of its objective or of its mixer's
    options."""
    path, equals, value = assignment.partition("=")
    name, dot, field = path.partition(".")
    if not TEXT.holds(assignment) or not equals or not dot:
        raise UserError(f"--set takes STEP.FIELD=VALUE; got {shown(assignment)}.")
    names = [step.name for step in recipe.steps]
    if name not in names:
        raise UserError(f"--set {assignment}: this recipe's steps are {', '.join(names)}; there is no {name!r}.")
    step = recipe.steps[names.index(name)]
    changed = _replace(step, field, value, assignment)
    return dataclasses.replace(recipe, steps=tuple(changed if s is step else s for s in recipe.steps))


FIXED = ("name", "mixer", "options", "stage", "settings")  # what makes a step the step it is


def _replace(step: Step, field: str, value: str, assignment: str) -> Step:
    homes = {"": step}  # where a field may live, nearest first
    if isinstance(step, Train):
        homes["settings"] = step.settings
    if isinstance(step, Swap):
        homes["options"] = step.options
    for home, holder in homes.items():
        kinds = {f.name: f.type for f in dataclasses.fields(holder) if f.name not in FIXED}
        if field in kinds:
            parsed = (
                _keep(step.keep, value, assignment)
                if field == "keep"
                else _parse(kinds[field], field, value, assignment)
            )
            new = dataclasses.replace(holder, **{field: parsed})
            if home == "":
                return new
            return dataclasses.replace(step, **{home: new})
    fields = [f.name for h in homes.values() for f in dataclasses.fields(h) if f.name not in FIXED]
    if isinstance(step, Train):
        objective = step.settings.objective
        names = [name_of_term(term) for term in TERMS] + [term.name for _, term in objective.terms]
        if field in names:  # its weight
            new = objective.with_weight(field, _literal(float, value, assignment))
            return dataclasses.replace(step, settings=dataclasses.replace(step.settings, objective=new))
        if field in objective.field_names():
            new = objective.with_field(field, value_of(value))
            return dataclasses.replace(step, settings=dataclasses.replace(step.settings, objective=new))
        fields += [*dict.fromkeys(names), *objective.field_names()]
    raise UserError(f"--set {assignment}: step {step.name!r} has no field {field!r}; it has {', '.join(fields)}.")


def _parse(kind, field: str, value: str, assignment: str):
    """By the annotation of the field; what it then holds must fit that, too."""
    if field == "trains":
        return _named(SELECTORS, value, assignment)
    if field == "objective":
        return Objective.of(value)
    parsed = _literal(kind, value, assignment)
    require(kind, parsed, f"--set {assignment}: {field}")
    return parsed


def _literal(kind, value: str, assignment: str):
    kinds = set(_plain(kind))
    if type(None) in kinds and value.lower() == "none":
        return None
    if bool in kinds:
        return _named({"true": True, "false": False}, value.lower(), assignment)
    if kinds & {int, float}:
        return _number(float if float in kinds else int, value, assignment)
    return value


def _plain(kind) -> Iterator[type]:
    """The types in an annotation."""
    if isinstance(kind, type) and not get_args(kind):
        yield kind
    for part in get_args(kind):
        yield from _plain(part)


def _keep(now: tuple[int, ...] | OneIn, value: str, assignment: str) -> tuple[int, ...] | OneIn:
    """none, layers, or one in so many: every:6 by pattern, auto:6 by measurement, auto as many as by default."""
    kind, _, number = value.partition(":")
    if value == "none":
        return ()
    if kind in ("auto", "every"):
        every = _number(int, number, assignment) if number else now.every if isinstance(now, OneIn) else FULL.every
        return OneIn(every, measured=kind == "auto")
    if not re.fullmatch(r"\s*[0-9]{1,4}\s*(,\s*[0-9]{1,4}\s*)*", value):
        raise UserError(f"--set {assignment}: keep takes none, layers as 4,9, every:6, auto or auto:6; got {value!r}.")
    return tuple(int(part) for part in value.split(","))


def _named(table: dict, value: str, assignment: str):
    if value not in table:
        raise UserError(f"--set {assignment}: the value must be one of {', '.join(table)}; got {value!r}.")
    return table[value]


def _number(kind: type, value: str, assignment: str):
    """A whole number may be written as 2e5."""
    try:
        if kind is int and re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
            return int(value)  # a float would round a seed
        number = float(value if value.isascii() else "digits of another script")
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        rule = "a whole number" if kind is int else "a number"
        raise UserError(f"--set {assignment}: the value must be {rule}; got {value!r}.") from None
