"""Every reason why a recipe cannot work on a teacher, from configurations alone."""

import dataclasses

from transformers import PreTrainedConfig

from convert.objectives import Distill
from convert.projections import refusal
from convert.recipes import OneIn, Recipe, Swap, Train, objective_of
from convert.stages import align


def refusals(config: PreTrainedConfig, recipe: Recipe) -> tuple[str, ...]:
    """Everything about this teacher and recipe that cannot work, each in a sentence."""
    found = []
    host = config.host_config() if config.model_type == "converted" else config
    if reason := refusal(host):
        return (reason,)
    latent = config.model_type == "converted" and any(mixer and mixer["name"] == "mla" for mixer in config.mixers)
    if latent:
        found.append("Latent attention is where a conversion ends: no other mixer can start from it. Take the run's own teacher.")
    if config.model_type == "converted" and config.keeps_attention and len({m["name"] for m in config.mixers if m}) > 1:
        found.append("A teacher's converted layers must share one mixer; this one has several.")
    for step in recipe.steps:
        if isinstance(step, Swap):
            found += _bad_keep(step, host.num_hidden_layers)
        if not isinstance(step, Train):
            continue
        s = step.settings
        if s.seq_len > host.max_position_embeddings:
            found.append(
                f"Step {step.name}: sequences must fit the teacher's {host.max_position_embeddings:,} positions; got --seq-len {s.seq_len:,}. Give a smaller one."
            )
        if s.seq_len < 2 or s.batch_tokens < s.seq_len or s.batch_tokens % s.seq_len:
            found.append(
                f"Step {step.name}: a batch must be whole sequences; {s.batch_tokens:,} tokens are not a multiple of --seq-len {s.seq_len:,}. Set --batch-tokens."
            )
        if s.tokens < 1:
            found.append(f"Step {step.name}: every step needs tokens; it has {s.tokens}. Raise --tokens.")
        if isinstance(s.objective, Distill) != (step.stage is not align):
            found.append(
                f"Step {step.name}: {step.stage.__name__} compares {'layers' if step.stage is align else 'distributions'}; its objective cannot be {objective_of(step)}."
            )
    for step in recipe.steps:
        found += _out_of_bounds(step)
    return tuple(found + _bad_sequence(recipe))


def _bad_sequence(recipe: Recipe) -> list[str]:
    """What is wrong between steps."""
    swaps, found = [step for step in recipe.steps if isinstance(step, Swap)], []
    longest = max((step.settings.seq_len for step in recipe.steps if isinstance(step, Train)), default=0)
    for before, after in zip(swaps, swaps[1:], strict=False):
        if before.keep != after.keep or (isinstance(before.keep, OneIn) and before.keep.measured):
            found.append(
                f"Step {after.name}: it must replace the layers that step {before.name} did; give both the same keep, by name or by pattern."
            )
    for step in swaps:
        window = getattr(step.options, "window", None)
        if window is not None and window >= longest and not step.exact:
            found.append(
                f"Step {step.name}: a window must be shorter than the training sequences, or its end is never seen; it is {window:,}, they are "
                f"{longest:,}. Lower window, or raise --seq-len."
            )
    return found


def _bad_keep(step: Swap, num_layers: int) -> list[str]:
    keep = step.keep
    if isinstance(keep, OneIn):
        if keep.measured and step.exact:
            return [
                f"Step {step.name}: an exact edit costs nothing in any layer, so there is nothing to rank. Set keep to layers or to none."
            ]
        if keep.every < 2 or (keep.measured and keep.every > num_layers):
            return [f"Step {step.name}: of {num_layers} layers one in 2 .. {num_layers} can be kept; got one in {keep.every}. Set keep."]
    elif not all(0 <= i < num_layers for i in keep) or len(set(keep)) == num_layers:
        got = ", ".join(map(str, keep))
        return [f"Step {step.name}: kept layers must be within 0 .. {num_layers - 1}, and not be all of them; got {got}. Set keep."]
    return []


BOUNDS = {  # field -> lowest, highest; of settings, objectives, mixer options and steps alike
    "lr": (0, 10), "warmup": (0, 1), "decay": (0, 1), "floor": (0, 1), "clip": (0, 1e9), "seed": (0, 2**63 - 1), "beta1": (0, 0.9999),
    "beta2": (0, 0.999999), "weight_decay": (0, 1), "noise": (0, 1), "loss_chunk": (1, 1e9), "evaluate_every": (0, 1e18), "save_every": (0, 1e12),
    "micro_tokens": (1, 1e9), "temperature": (0.01, 100), "cross_entropy": (0, 1e6), "forward_kl": (0, 1e6), "reverse_kl": (0, 1e6),
    "rate": (0, 10), "conv": (1, 64), "dt_rank": (1, 65_536),
    "window": (1, 1e7), "sinks": (0, 65_536), "gate_bias": (-10, 10), "calibration": (0, 1e9),
    "kv_rank": (1, 1e6), "q_rank": (1, 1e6), "rope_dim": (2, 1e4), "cache_budget": (0.001, 1), "feature_matching": (0, 1e3),
}  # fmt: skip
CHOICES = {
    "schedule": ("wsd", "cosine"), "precision": ("auto", "float32", "bfloat16"), "gate": ("element", "head", "none"),
    "shape": ("exact", "native"), "start": ("calibrated", "svd", "random"),
}  # fmt: skip


def _out_of_bounds(step) -> list[str]:
    homes = [step]
    if isinstance(step, Train):
        homes += [step.settings, step.settings.objective]
    if isinstance(step, Swap):
        homes.append(step.options)
    found = []
    for home in filter(dataclasses.is_dataclass, homes):
        for field in (f.name for f in dataclasses.fields(home)):
            value, (low, high), choices = getattr(home, field), BOUNDS.get(field, (0, 0)), CHOICES.get(field, ())
            if field in BOUNDS and isinstance(value, int | float) and not low <= value <= high:
                found.append(f"Step {step.name}: {field} must be within {low:g} .. {high:g}; got {value:g}.")
            if choices and value not in choices:
                found.append(f"Step {step.name}: {field} must be one of {', '.join(choices)}; got {value!r}.")
    if isinstance(homes[-1], Distill) and not (homes[-1].cross_entropy or homes[-1].forward_kl or homes[-1].reverse_kl):
        found.append(f"Step {step.name}: a loss needs a term; all three weights are 0.")
    return found
