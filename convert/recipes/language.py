"""Recipes for language models: a target is a function that returns one; a variant edits what it returns."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from transformers import PreTrainedConfig

from convert.core.fields import Text, checked, require
from convert.mixers import MIXERS
from convert.objectives import divergences as objectives
from convert.objectives.divergences import Distill
from convert.recipes.base import Budget, Forget, OneIn, Recipe, Swap, Train
from convert.training import loop as stages
from convert.training.loop import Settings


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
            Distill(),
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
        default = Budget(10_000_000_000, 1024, 49_152, 1e-3, 1e-4, Distill(), 8192)
    else:  # ours
        default = Budget(100_000_000, 1024, 16_384, 1e-3, 1e-4, Distill(), 4096)
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
    settings = _settings(budget, tokens, budget.align_lr, objectives.cosine_distance, stages.feature_maps, "wsd")
    return Train("align", stages.align, _smaller_batches(budget, settings))


def _distill(budget: Budget, tokens: int) -> Train:
    """HedgeMamba's stage 2: by cross-entropy there, by forward KL here (ours: LOG.md)."""
    settings = _settings(budget, tokens, budget.distill_lr, budget.objective, budget.trains, budget.schedule)
    return Train("distill", stages.distill, dataclasses.replace(settings, noise=budget.noise))


def _smaller_batches(budget: Budget, settings: Settings) -> Settings:
    """Few tokens are worth more as many small steps: each layer has a problem of its own, and an easy one (ours:
    LOG.md)."""
    if budget.align_batch_tokens is None:
        return settings
    size = budget.seq_len * max(1, min(budget.align_batch_tokens, budget.batch_tokens) // budget.seq_len)
    return dataclasses.replace(settings, batch_tokens=size, micro_tokens=min(size, settings.micro_tokens))


def _settings(budget: Budget, tokens: int, lr: float, objective: Callable, trains: Callable, schedule: str) -> Settings:
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
    align = _settings(budget, first, budget.edit_lr, objectives.energy_mse, stages.mixers, "wsd")
    distill = _distill(dataclasses.replace(budget, distill_lr=budget.edit_lr), budget.tokens - first)
    return Recipe(
        target, (edit, Train("align", stages.align, _smaller_batches(budget, align)), distill), budget.questions
    )


RECIPES: dict[str, Callable[[Budget], Recipe]] = {
    "linear": to_linear, "mamba": to_mamba, "mamba2": to_mamba2, "gate-swa": to_gate_swa, "mla": to_mla
}  # fmt: skip
