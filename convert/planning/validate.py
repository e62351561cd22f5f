"""Every reason why a recipe cannot work on a teacher, from configurations alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from convert.core.errors import UserError
from convert.core.processes import launched
from convert.domains.base import Domain
from convert.recipes.base import Recipe
from convert.steps.base import Outline


def outline(
    domain: Domain, config: PreTrainedConfig, recipe: Recipe, teachers: Mapping[str, PreTrainedConfig]
) -> Outline:
    """Return what is known of the student before the first step: it is the teacher."""
    host, mixers = domain.outline(config)
    longest = max((settings.longest for settings in recipe.trainings), default=0)
    return Outline(domain, host, host, mixers, is_student=False, is_measured=False, longest=longest, teachers=teachers)


def problems(
    domain: Domain, config: PreTrainedConfig, recipe: Recipe, teachers: Mapping[str, PreTrainedConfig]
) -> tuple[str, ...]:
    """Return everything about this teacher and recipe that cannot work, each in a sentence. `teachers` are the
    configurations of the teachers that steps name."""
    if reason := domain.problem(config):
        return (reason,)
    found, at = [], outline(domain, config, recipe, teachers)
    if not recipe.trainings:
        found.append("A recipe needs a step that trains, by whose sequences it is measured; this one has none.")
    for step in recipe.steps:
        if wrong := step.problems(at):
            found += wrong
        at = step.after(at)
    return (*found, *_too_many_processes(recipe))


def _too_many_processes(recipe: Recipe) -> Iterator[str]:
    """Steps of whose batches some processes that torchrun started would get nothing."""
    for step in recipe.steps:
        if (settings := step.training) is None:
            continue
        rows, what = settings.batch_units // max(1, settings.longest), "sequences" if settings.longest else "images"
        if rows < launched():
            yield (
                f"Step {step.name}: each process takes a part of every batch; a batch has {rows} {what}, and torchrun"
                f" started {launched()} processes. Start fewer, or make batches larger."
            )


def named_corpora(domain: Domain, recipe: Recipe, data: str) -> dict[str, Any]:
    """Find the run's data and those that training steps name. Raises UserError where there are none, or where a step
    cannot use its own."""
    names = [data, *(step.own_data for step in recipe.steps if step.own_data is not None)]
    corpora = {name: domain.corpus(name) for name in dict.fromkeys(names)}
    for step in recipe.steps:
        if step.training is not None:
            try:
                domain.check_data(corpora[step.own_data or data], step.training)
            except UserError as error:
                raise UserError(f"Step {step.name}: {error}") from None
    return corpora


def named_teachers(domain: Domain, recipe: Recipe, trust_remote_code: bool) -> dict[str, PreTrainedConfig]:
    """Read the configurations of the teachers that training steps name. Raises UserError for a wrong name."""
    names = {step.own_teacher for step in recipe.steps if step.own_teacher is not None}
    return {name: domain.read_config(domain.resolve(name), trust_remote_code) for name in sorted(names)}
