"""Recipes for language models: a target is a function that returns one; a variant edits what it returns."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from transformers import PreTrainedConfig

from convert.core.fields import Checked, Range, Text, checked, require
from convert.mixers import MIXERS
from convert.mixers.projections import LLAMA_SHAPED
from convert.models.from_scratch import Sizes
from convert.objectives.base import Objective
from convert.recipes import variants
from convert.recipes.base import Recipe
from convert.steps.base import Step
from convert.steps.build import Build
from convert.steps.layers import DEFAULT_N, EveryNth, Keep
from convert.steps.set_decay import SetDecay
from convert.steps.swap import Swap
from convert.steps.train import Train
from convert.training.settings import Settings

DECAY_RATE = {"mamba": 1e-3, "mamba2": 3e-3}  # ours, measured on neox-nano: experiments/LOG.md
ALIGN_SHARE = 0.1  # of the tokens (the paper's best split, 10 / 90)
CALIBRATION = 32_768  # tokens (TransMLA's 128 samples of 256)
HYBRID_N = 4  # one layer in four keeps attention (7 of 28: When Perplexity Lies, arXiv 2603.26556)
INSTRUCT_SHARE = 1 / 3  # of the tokens after alignment (250 M beside 500 M: When Perplexity Lies)
INSTRUCT_LR = 1 / 8  # of the rate before it (ours: the whole rate undoes much of what text has taught; LOG.md)
INSTRUCT_SEQ_LEN = 4096  # tokens (When Perplexity Lies), but at most four times those before it (ours)
# (family, layers, width) -> the layers of that model that keep attention in hybrids: Qwen3-0.6B (When Perplexity Lies,
# which found them by a beam search on associative recall and has the same ones for every mixer)
HYBRID_LAYERS = {("qwen3", 28, 1024): (0, 2, 6, 11, 13, 18, 21)}
SCRATCH_LR = 2e-3  # what the embedded teacher was trained at (ours)


@dataclass(frozen=True)
class Budget(Checked):
    """What the defaults depend on. Tokens are the total over all training steps."""

    tokens: Annotated[int, Range(1, 1e14)]
    seq_len: Annotated[int, Range(2, 2**24)]
    batch_tokens: Annotated[int, Range(2, 2**27)]
    align_lr: Annotated[float, Range(0, 10)]
    distill_lr: Annotated[float, Range(0, 10)]
    objective: Objective
    micro_tokens: Annotated[int, Range(1, 2**27)]
    align_batch_tokens: Annotated[int, Range(2, 2**27)] | None = None  # of the first stage; None: as in the last
    checkpointing: bool = False
    trains: Callable | str = "all_but_embeddings"  # in the last stage (the paper's)
    schedule: Literal["wsd", "cosine"] = "wsd"  # of the last stage
    noise: Annotated[float, Range(0, 1)] = 0.0  # in the last stage
    window: Annotated[int, Range(1, 1e7)] = 512  # of sliding-window attention (ours)
    # of latent attention; native where the teacher's attention has neither biases nor q/k norm
    latent_shape: Literal["exact", "native"] = "exact"
    # of both stages of attention editing, whose students start close to their teachers (ours)
    edit_lr: Annotated[float, Range(0, 10)] = 1e-4
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    examples: Annotated[int, Range(1, 100_000)] = 16  # of each task at the end (ours)
    instruct_seq_len: Annotated[int, Range(2, 2**24)] | None = None  # of instruction distillation; None: as before it
    starts_linear: bool = False  # the teacher is linear attention already: nothing to align
    hybrid_keep: Keep = EveryNth(HYBRID_N)  # which layers of a hybrid keep attention


@checked
def budget(
    teacher: Text,
    config: PreTrainedConfig,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
) -> Budget:
    """Return the defaults for a teacher, by its name and configuration, but for what is given."""
    host = config.host if config.model_type == "converted" else config
    size = host.num_hidden_layers * host.hidden_size**2 * 12
    kl = Objective.of("forward_kl")
    if size < 2e7:  # ours, measured on neox-nano: experiments/LOG.md
        default = Budget(
            1_800_000, 256, 2048, 1e-2, 2e-3, kl, 2048, 512, schedule="cosine", noise=0.1, window=64, edit_lr=5e-4
        )
    elif teacher.startswith("pythia-"):
        # 10 B tokens in sequences of 1,024, about 50 k tokens a step: HedgeMamba; the rates are ours
        default = Budget(10_000_000_000, 1024, 49_152, 1e-3, 1e-4, kl, 8192)
    else:  # ours
        default = Budget(100_000_000, 1024, 16_384, 1e-3, 1e-4, kl, 4096)
    for name, value in (("tokens", tokens), ("seq_len", seq_len), ("batch_tokens", batch_tokens), ("seed", seed)):
        if value is not None:
            require(Budget.__dataclass_fields__[name].type, value, f"--{name.replace('_', '-')}")
    tokens = default.tokens if tokens is None else tokens
    enough = 1 << (max(tokens // 100, 1)).bit_length() - 1  # a short budget goes into more, shorter sequences
    if seq_len is None:
        seq_len = min(default.seq_len, host.max_position_embeddings, max(256, enough))
    if batch_tokens is None:
        batch_tokens = seq_len * max(1, min(default.batch_tokens, tokens // 150) // seq_len)
    is_native = host.model_type in LLAMA_SHAPED and not getattr(host, "attention_bias", False)
    is_linear = config.model_type == "converted" and all(mixer and mixer["name"] == "linear" for mixer in config.mixers)
    return dataclasses.replace(
        default,
        tokens=tokens,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        micro_tokens=min(batch_tokens, max(seq_len, default.micro_tokens)),
        checkpointing=size > 3e8,
        seed=seed,
        latent_shape="native" if is_native else "exact",
        instruct_seq_len=max(seq_len, min(INSTRUCT_SEQ_LEN, 4 * seq_len, host.max_position_embeddings, enough)),
        starts_linear=is_linear,
        hybrid_keep=HYBRID_LAYERS.get((host.model_type, host.num_hidden_layers, host.hidden_size), default.hybrid_keep),
    )


def _align(budget: Budget, tokens: int) -> Train:
    """HedgeMamba's stage 1: the cosine distance of each layer's attention output trains the feature maps alone."""
    settings = _settings(budget, tokens, budget.align_lr, Objective.of("cosine_distance"), "feature_maps", "wsd")
    return Train("align", "align", _smaller_batches(budget, settings))


def _distill(budget: Budget, tokens: int) -> Train:
    """HedgeMamba's stage 2, which is by cross-entropy there and by forward KL here (ours: LOG.md)."""
    settings = _settings(budget, tokens, budget.distill_lr, budget.objective, budget.trains, budget.schedule)
    return Train("distill", "distill", dataclasses.replace(settings, noise=budget.noise))


def _instruct(budget: Budget, tokens: int) -> Train:
    """GenDistill's stage 3b: what the teacher writes, in longer sequences; only its completions are learnt."""
    seq_len = budget.instruct_seq_len or budget.seq_len
    batch = seq_len * max(1, budget.batch_tokens // seq_len)
    longer = dataclasses.replace(
        budget,
        seq_len=seq_len,
        batch_tokens=batch,
        micro_tokens=min(batch, max(seq_len, budget.micro_tokens)),
        distill_lr=INSTRUCT_LR * budget.distill_lr,
        noise=0.0,
    )
    step = _distill(longer, tokens)
    settings = dataclasses.replace(step.settings, masking="completions")
    return dataclasses.replace(step, name="instruct", settings=settings, data="teacher")


def _smaller_batches(budget: Budget, settings: Settings) -> Settings:
    """Few tokens are worth more as many small steps: each layer has a problem of its own, and an easy one (ours:
    LOG.md)."""
    if budget.align_batch_tokens is None:
        return settings
    size = budget.seq_len * max(1, min(budget.align_batch_tokens, budget.batch_tokens) // budget.seq_len)
    return dataclasses.replace(settings, batch_tokens=size, micro_tokens=min(size, settings.micro_tokens))


def _settings(
    budget: Budget, tokens: int, lr: float, objective: Objective, trains: Any, schedule: Literal["wsd", "cosine"]
) -> Settings:
    return Settings(
        tokens=tokens,
        lr=lr,
        objective=objective,
        trains=trains,
        seq_len=budget.seq_len,
        batch_tokens=budget.batch_tokens,
        micro_tokens=budget.micro_tokens,
        seed=budget.seed,
        schedule=schedule,
        checkpointing=budget.checkpointing,
        evaluate_every=budget.tokens // 4,
    )


@checked
def to_linear(budget: Budget) -> Recipe:
    """Attention -> Hedgehog linear attention."""
    first = int(budget.tokens * ALIGN_SHARE)
    swap = Swap("linear", "linear", MIXERS["linear"].Options())
    return Recipe("linear", (swap, _align(budget, first), _distill(budget, budget.tokens - first)), budget.examples)


@checked
def to_mamba(budget: Budget, mixer: Literal["mamba", "mamba2"] = "mamba") -> Recipe:
    """Attention -> Hedgehog linear attention -> Mamba, which starts as exactly that (HedgeMamba, arXiv 2604.14191)."""
    first = 0 if budget.starts_linear else int(budget.tokens * ALIGN_SHARE)
    aligned: tuple[Step, ...] = (Swap("linear", "linear", MIXERS["linear"].Options()), _align(budget, first))
    handover = Swap("handover", mixer, MIXERS[mixer].Options(), exact=True)
    decay = SetDecay("forget", DECAY_RATE[mixer])
    steps = (*(() if budget.starts_linear else aligned), handover, decay, _distill(budget, budget.tokens - first))
    return Recipe(mixer, steps, budget.examples)


@checked
def to_mamba2(budget: Budget) -> Recipe:
    """The recipe of to_mamba with one decay per head: the scan becomes matrix products."""
    return to_mamba(budget, "mamba2")


@checked
def to_gate_swa(budget: Budget) -> Recipe:
    """Attention -> gated sliding-window attention with sinks, but for every fifth layer (Attention Editing, arXiv
    2604.05688): first each edited layer learns the attention output of its own, then the whole model the teacher's
    distribution. A variant chooses the layers that keep attention after alignment."""
    window = min(budget.window, budget.seq_len // 2)  # or training would never see its end
    edit = Swap("edit", "gate-swa", MIXERS["gate-swa"].Options(window=window), EveryNth(DEFAULT_N))
    added = {"select": variants.selection("edit", edit.keep, DEFAULT_N)}
    return dataclasses.replace(_edited("gate-swa", edit, budget), variants=added)


@checked
def to_mla(budget: Budget) -> Recipe:
    """Attention -> multi-head latent attention with half of the cache (Attention Editing, arXiv 2604.05688, from a
    calibrated start)."""
    options = MIXERS["mla"].Options(budget.latent_shape, cache_budget=0.5, start="calibrated")
    return _edited("mla", Swap("edit", "mla", options, calibration=min(CALIBRATION, budget.tokens)), budget)


@checked
def to_hybrid_kda(budget: Budget) -> Recipe:
    """Attention -> Kimi Delta Attention in three layers of four (When Perplexity Lies, arXiv 2603.26556)."""
    return _hybrid("hybrid-kda", "kda", MIXERS["kda"].Options(), budget)


@checked
def to_hybrid_gdn(budget: Budget) -> Recipe:
    """Attention -> Gated DeltaNet (arXiv 2412.06464) in three layers of four, as Qwen3.5 has it."""
    options = MIXERS["gdn"].Options(decay_start="calibrated")  # measured on neox-nano
    return _hybrid("hybrid-gdn", "gdn", options, budget)


def _hybrid(target: str, mixer: str, options: Any, budget: Budget) -> Recipe:
    """GenDistill's stages, for a mixer in all layers but one in four: alignment by layer, then forward KL without
    cross-entropy, with embeddings, head and kept attention frozen, on text and at last on the teacher's completions.
    Variants align queries and keys first, or choose the layers that keep attention after alignment."""
    first = int(budget.tokens * ALIGN_SHARE)
    last = int((budget.tokens - first) * INSTRUCT_SHARE)
    seen = min(CALIBRATION, budget.tokens)
    edit = Swap("edit", mixer, options, budget.hybrid_keep, calibration=seen)
    align = _settings(budget, first, budget.distill_lr, Objective.of("energy_mse"), "mixers", "wsd")
    budget = dataclasses.replace(budget, trains="all_but_kept_attention")
    distill = _distill(budget, budget.tokens - first - last)
    steps = edit, Train("align", "align", _smaller_batches(budget, align)), distill, _instruct(budget, last)
    added = {"align_qk": variants.align_qk, "select": variants.selection("edit", edit.keep, HYBRID_N)}
    return Recipe(target, steps, budget.examples, variants=added)


def _edited(target: str, edit: Swap, budget: Budget) -> Recipe:
    """Attention Editing's two stages: the error of each edited layer's attention output over its energy trains all of
    the new mixers; then the whole model is distilled."""
    first = int(budget.tokens * ALIGN_SHARE)
    align = _settings(budget, first, budget.edit_lr, Objective.of("energy_mse"), "mixers", "wsd")
    distill = _distill(dataclasses.replace(budget, distill_lr=budget.edit_lr), budget.tokens - first)
    steps = edit, Train("align", "align", _smaller_batches(budget, align)), distill
    return Recipe(target, steps, budget.examples)


@checked
def to_scratch(budget: Budget) -> Recipe:
    """A Llama of two thirds of the teacher's layers and width, from random weights: why convert at all?

    It learns the teacher's distribution and, through projectors that are dropped at the end, its layers' outputs. The
    sizes and the weights of the terms are ours."""
    distill = _distill(
        dataclasses.replace(
            budget,
            distill_lr=SCRATCH_LR,
            objective=Objective.of("forward_kl + 0.1*hidden_projection"),
            trains="everything",
            noise=0.0,
        ),
        budget.tokens,
    )
    return Recipe("scratch", (Build("build", "llama", Sizes()), distill), budget.examples)
