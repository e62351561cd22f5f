"""What comes before a run: everything is found, planned, loaded and checked before its folder is taken."""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from convert.core.console import console, size
from convert.core.errors import UserError
from convert.core.places import path_of, refuse_overlap
from convert.core.processes import gathered
from convert.data.recorded import Recorded
from convert.domains import domain_of
from convert.domains.base import Data, Domain, Source, Teacher
from convert.models.devices import pick_device
from convert.models.saving import fingerprint
from convert.planning import plan as planning
from convert.planning.plan import Plan, ShareTeacher
from convert.planning.validate import named_corpora, named_teachers
from convert.recipes.base import Recipe
from convert.recipes.targets import TARGETS, default_recipe
from convert.runs.ledger import check_out
from convert.steps.base import Step


@dataclass(frozen=True)
class Planned:
    """A run of which nothing is loaded yet. `corpora`: name -> data set, of the run's data `spec` and of those that
    steps name."""

    domain: Domain
    recipe: Recipe
    teacher: str
    source: Source
    plan: Plan
    device: str
    out: Path
    spec: str
    corpora: dict[str, Any]
    trust_remote_code: bool


@dataclass(frozen=True)
class Run:
    """One run: what is done to which teacher, on which data, and where.

    `load_teacher` gives the teacher of a name, and `prepare` the data of a step, for the steps that have their own;
    `load_again` the run's teacher once more."""

    domain: Domain
    recipe: Recipe
    teacher: Teacher
    data: Data
    out: Path
    plan: Plan
    settings: dict[str, Any]
    load_teacher: Callable[[str], Teacher]
    prepare: Callable[[Step], Data]
    load_again: Callable[[], Teacher]

    def held_out(self) -> list[Any]:
        """Return the batches that every headline metric of the run is measured on."""
        return self.domain.held_out(self.data, self.recipe.units, self.recipe.measured_by)


def planned(
    teacher: str,
    recipe: str | Recipe,
    out: str | Path | None,
    *,
    data: str | Path | None,
    device: str,
    fresh: bool,
    trust_remote_code: bool,
    has_rules: bool,
    share_teacher: ShareTeacher,
) -> Planned:
    """Plan a run. Raises UserError for whatever would stop it: the cheapest reasons come first."""
    domain = domain_for(teacher, recipe)
    source = domain.resolve(teacher)
    config = domain.read_config(source, trust_remote_code)
    if isinstance(recipe, str):
        recipe = default_recipe(source.name, config, recipe)
    if has_rules and not any(settings.evaluate_every for settings in recipe.trainings):
        raise UserError(
            "--stop-when is looked at when a stage measures, and none of this recipe does; set"
            " STEP.evaluate_every=TOKENS."
        )
    folder = path_of(out or f"runs/{source.name}-{recipe.target}", "--out")
    device, spec = pick_device(device), source.data if data is None else str(data)
    corpora = named_corpora(domain, recipe, spec)
    plan = _shown(domain, source, config, recipe, spec, device, folder, trust_remote_code, share_teacher)
    check_out(folder, fresh)
    named = [domain.resolve(name) for name in _named_teachers(recipe)]
    places = [("teacher", place) for each in (source, *named) for place in _places(each)]
    places += [("recording", step.recorded) for step in recipe.steps if step.recorded is not None]
    refuse_overlap(folder, places + [("data", place) for corpus in corpora.values() for place in corpus.places()])
    return Planned(domain, recipe, teacher, source, plan, device, folder, spec, corpora, trust_remote_code)


def prepared(it: Planned) -> Run:
    """Return a run that can begin: several processes load what it needs together. Raises UserError as `planned`
    does."""
    domain, recipe, corpora = it.domain, it.recipe, it.corpora
    shares = any(gathered(it.plan.shares_teacher))  # machines may differ

    def load(name: str) -> Teacher:
        return domain.load_teacher(domain.resolve(name), it.device, it.trust_remote_code, shares)

    loaded = load(it.teacher)

    def prepare(step: Step) -> Data:
        """The step's own data; its own teacher, where it has one, makes what is made."""
        if step.own_data is None or (settings := step.training) is None:
            raise ValueError(f"step {step.name} has no data of its own")
        its_teacher = loaded if step.own_teacher is None else load(step.own_teacher)
        return domain.prepare(corpora[step.own_data], its_teacher, settings.units, settings)

    data_of_run = domain.prepare(corpora[it.spec], loaded, recipe.units, recipe.measured_by)
    run = Run(
        domain, recipe, loaded, data_of_run, it.out, it.plan, {}, load, prepare, functools.partial(load, it.teacher)
    )
    run.held_out()  # too little data is said now,
    domain.check(loaded, recipe.tasks)  # and so is a teacher that cannot be asked anything
    for step in recipe.steps:
        if step.own_data is None and (settings := step.training) is not None:
            domain.batches(run.data, settings)
    return dataclasses.replace(run, settings=_settings(run, it.teacher, it.source, it.spec))


def domain_for(teacher: str, recipe: str | Recipe) -> Domain:
    """The domain of a run. Raises UserError for a target of another domain than its teacher's."""
    target = TARGETS.get(recipe if isinstance(recipe, str) else recipe.target)
    return domain_of(teacher, None if target is None else target.domain)


def _shown(
    domain: Domain,
    source: Source,
    config: PreTrainedConfig,
    recipe: Recipe,
    data: str,
    device: str,
    out: Path,
    trust_remote_code: bool,
    share_teacher: ShareTeacher,
) -> Plan:
    """Print the plan. Raises UserError where it cannot work, or has too little room on the disk."""
    teachers = named_teachers(domain, recipe, trust_remote_code)
    plan = planning.make_plan(domain, source.name, config, recipe, data, device, teachers, share_teacher)
    planning.show(plan, console)
    if reason := planning.check_space(plan, out):
        raise UserError(reason)
    peak, there = max((step.peak_bytes for step in plan.steps), default=0), planning.physical_memory()
    if device == "cpu" and peak > there:
        console.print(f"This may not fit: about {size(peak)} needed, {size(there)} here.", style="yellow")
    return plan


def _named_teachers(recipe: Recipe) -> list[str]:
    """The teachers that training steps name, each once."""
    return list(dict.fromkeys(step.own_teacher for step in recipe.steps if step.own_teacher is not None))


def _settings(run: Run, teacher: str, source: Source, data: str) -> dict[str, Any]:
    """What the ledger compares: a run goes on only with the same teacher, data and steps."""
    steps = whole_steps(run.domain, run.recipe)
    for step, described in zip(run.recipe.steps, steps, strict=True):
        described |= _own_fingerprints(run, step)
    found = {
        "teacher": whole_name(teacher, source),
        "teacher_fingerprint": fingerprint(run.teacher.model),
        "domain": run.domain.name,
        "target": run.recipe.target,
        "data": data,
        "data_fingerprint": run.data.fingerprint,
        "steps": steps,
    }
    return json.loads(json.dumps(found))


def _own_fingerprints(run: Run, step: Step) -> dict[str, str]:
    """Fingerprints of the data and the teacher that a training step names. Raises UserError for a teacher that cannot
    teach in this run, for a recording of others, and for data that are too short."""
    found: dict[str, str] = {}
    if step.own_data is not None and (settings := step.training) is not None:
        data = run.prepare(step)
        run.domain.batches(data, settings)
        found["data_fingerprint"] = data.fingerprint
    if step.recorded is not None:
        recorded, data = Recorded(step.recorded), run.data if step.own_data is None else run.prepare(step)
        recorded.check("of", run.domain.origins(run.teacher, data))
        found["teacher_fingerprint"] = recorded.fingerprint
    if step.own_teacher is not None:
        teacher = run.load_teacher(step.own_teacher)
        if reason := run.domain.problem_of_loaded_pair(run.teacher, teacher):
            raise UserError(f"Step {step.name}: {step.own_teacher} cannot be its teacher. {reason}")
        found["teacher_fingerprint"] = fingerprint(teacher.model)
    return found


def _places(source: Source) -> list[Path]:
    """Places of the teacher on this machine: its file or folder (of a run all of it), and what links in there lead
    to."""
    if source.is_remote:
        return []
    where = Path(source.where)
    links = [file for file in where.rglob("*") if file.is_symlink()]
    return [where.parent if source.kind == "run" else where, *links]


def whole_name(teacher: str, source: Source) -> str:
    """Return the teacher's name as the settings of a run hold it, from wherever it is repeated."""
    return str(Path(teacher).expanduser().absolute()) if source.kind in ("folder", "run", "gguf") else teacher


def whole_steps(domain: Domain, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the described steps with the data and teachers of their own named likewise, from wherever they are
    repeated."""
    steps = recipe.describe()
    for step, described in zip(recipe.steps, steps, strict=True):
        if step.own_data is not None:
            described["data"] = domain.whole_data(step.own_data)
        if step.own_teacher is not None:
            described["teacher"] = whole_name(step.own_teacher, domain.resolve(step.own_teacher))
    return steps
