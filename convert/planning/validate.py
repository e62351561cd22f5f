"""Every reason why a recipe cannot work on a teacher, from configurations alone."""

import torch
from transformers import PreTrainedConfig

from convert.core.fields import shown
from convert.mixers import MIXERS
from convert.mixers.projections import refusal
from convert.models.student import ConvertedForCausalLM
from convert.objectives.divergences import Distill
from convert.recipes.base import Forget, OneIn, Recipe, Swap, Train, objective_of
from convert.training.loop import align


def refusals(config: PreTrainedConfig, recipe: Recipe) -> tuple[str, ...]:
    """Everything about this teacher and recipe that cannot work, each in a sentence."""
    found = []
    host = config.host_config() if config.model_type == "converted" else config
    if reason := refusal(host):
        return (reason,)
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
                f"Step {step.name}: sequences must fit the teacher's {host.max_position_embeddings:,} positions; got"
                f" --seq-len {s.seq_len:,}. Give a smaller one."
            )
        if s.seq_len < 2 or s.batch_tokens < s.seq_len or s.batch_tokens % s.seq_len:
            found.append(
                f"Step {step.name}: a batch must be whole sequences; {s.batch_tokens:,} tokens are not a multiple of"
                f" --seq-len {s.seq_len:,}. Set --batch-tokens."
            )
        if s.tokens < 1:
            found.append(f"Step {step.name}: every step needs tokens; it has {s.tokens}. Raise --tokens.")
        if isinstance(s.objective, Distill) != (step.stage is not align):
            found.append(
                f"Step {step.name}: {step.stage.__name__} compares"
                f" {'layers' if step.stage is align else 'distributions'}; its objective cannot be"
                f" {objective_of(step)}."
            )
        if isinstance(s.objective, Distill) and not (
            s.objective.cross_entropy or s.objective.forward_kl or s.objective.reverse_kl
        ):
            found.append(f"Step {step.name}: a loss needs a term; all three weights are 0.")
    return tuple(found + _bad_sequence(recipe, config))


def bad_functions(step: Train, student: ConvertedForCausalLM) -> str | None:
    """Why the functions of the step's settings cannot train this student, which may be without memory: both are
    tried."""
    trains, objective = step.settings.trains, step.settings.objective
    try:
        chosen = list(trains(student))
    except Exception as error:  # of the user's code
        return (
            f"Step {step.name}: trains must choose parameters of a student; {shown(trains)} fails with {shown(error)}."
        )
    own = {id(p) for p in student.parameters()}
    if not chosen or not all(id(p) in own for p in chosen):
        return (
            f"Step {step.name}: trains must choose parameters of the student, one or more; {shown(trains)} gives"
            f" {shown(chosen)}."
        )
    if isinstance(objective, Distill):
        return None
    try:
        loss = objective(torch.ones(1, 2, 4, requires_grad=True), torch.ones(1, 2, 4))
    except Exception as error:  # of the user's code
        return (
            f"Step {step.name}: an objective compares two outputs of a layer; {shown(objective)} fails with"
            f" {shown(error)}."
        )
    if not (isinstance(loss, torch.Tensor) and loss.shape == () and loss.requires_grad):
        return (
            f"Step {step.name}: an objective must give one number to minimise, by its first argument;"
            f" {shown(objective)} gives {shown(loss)}."
        )
    return None


def _bad_sequence(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    """What is wrong between steps."""
    swaps, found = [step for step in recipe.steps if isinstance(step, Swap)], []
    if not any(isinstance(step, Train) for step in recipe.steps):
        found.append("A recipe needs a step that trains, by whose sequences it is measured; this one has none.")
    mixers = {mixer["name"] for mixer in config.mixers if mixer} if config.model_type == "converted" else set()
    for step in recipe.steps:
        if isinstance(step, Swap):
            if "mla" in mixers:
                found.append(
                    f"Step {step.name}: Latent attention is where a conversion ends: no other mixer can start from it."
                    " Take the run's own teacher."
                )
            mixers = {step.mixer}
        elif isinstance(step, Train) and not mixers:
            found.append(f"Step {step.name}: a stage trains a student; swap a mixer in before it.")
        elif isinstance(step, Forget) and not any(MIXERS[name].decays for name in mixers):
            found.append(
                f"Step {step.name}: it sets decays, and no mixer has one there; swap in mamba or mamba2 before it."
            )
    longest = max((step.settings.seq_len for step in recipe.steps if isinstance(step, Train)), default=0)
    for before, after in zip(swaps, swaps[1:], strict=False):
        if before.keep != after.keep or (isinstance(before.keep, OneIn) and before.keep.measured):
            found.append(
                f"Step {after.name}: it must replace the layers that step {before.name} did; give both the same keep,"
                " by name or by pattern."
            )
    for step in swaps:
        window = getattr(step.options, "window", None)
        if window is not None and window >= longest and not step.exact:
            found.append(
                f"Step {step.name}: a window must be shorter than the training sequences, or its end is never seen; it"
                f" is {window:,}, they are {longest:,}. Lower window, or raise --seq-len."
            )
    return found


def _bad_keep(step: Swap, num_layers: int) -> list[str]:
    keep = step.keep
    if isinstance(keep, OneIn):
        if keep.measured and step.exact:
            return [
                f"Step {step.name}: an exact edit costs nothing in any layer, so there is nothing to rank. Set keep to"
                " layers or to none."
            ]
        if keep.every < 2 or (keep.measured and keep.every > num_layers):
            return [
                f"Step {step.name}: of {num_layers} layers one in 2 .. {num_layers} can be kept; got one in"
                f" {keep.every}. Set keep."
            ]
    elif not all(0 <= i < num_layers for i in keep) or len(set(keep)) == num_layers:
        got = ", ".join(map(str, keep))
        return [
            f"Step {step.name}: kept layers must be within 0 .. {num_layers - 1}, and not be all of them; got {got}."
            " Set keep."
        ]
    return []
