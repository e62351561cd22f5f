"""Whether a stage's selector and terms, which may be the user's own, can do their part: each is tried once."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import shown
from convert.models.vision.features import Features, staged
from convert.objectives.base import BlockTerm, LayerTerm, LogitTerm, StagedOf, StageTerm, Term, build_term
from convert.objectives.stages import Scan, ScanShape
from convert.training.selectors import selected
from convert.training.settings import StageSettings

TOKENS = 2  # of the tensors that terms are tried on; images where models classify those


def problem_of_functions(settings: StageSettings, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """Why the selector and the terms of these settings cannot train this student, in a sentence; None if they can.

    Both models may be on the meta device, without memory."""
    trains = settings.trains
    try:
        chosen = list(selected(student, trains))
    except Exception as error:  # of the user's code
        return f"trains must choose parameters of a student; {shown(trains)} fails with {shown(error)}."
    own = {id(p) for p in student.parameters()}
    if not chosen or not all(id(p) in own for p in chosen):
        return f"trains must choose parameters of the student, one or more; {shown(trains)} gives {shown(chosen)}."
    staged_of = functools.cache(staged)
    for _, term in settings.objective.terms:
        if reason := _problem_of_term(term, student, teacher, staged_of):
            return reason
    return None


def _problem_of_term(term: Term, student: PreTrainedModel, teacher: PreTrainedModel, staged_of: StagedOf) -> str | None:
    try:
        owned = build_term(term, student, teacher, staged_of)
        loss = _loss(term, owned, student, teacher, staged_of)
        if owned is not None:
            term.advance(owned, 1.0, 0.0)
    except UserError as error:
        return str(error)
    except Exception as error:  # of the user's code
        return f"an objective compares {term.compares}; {shown(term)} fails with {shown(error)}."
    shape = (TOKENS,) if isinstance(term, LogitTerm) else ()
    if not (isinstance(loss, Tensor) and loss.shape == shape and loss.requires_grad):
        what = f"one number for each {'image' if _sees_images(student) else 'token'}" if shape else "one number"
        return f"an objective must give {what} to minimise, by its first argument; {shown(term)} gives {shown(loss)}."
    return None


def _loss(
    term: Any, owned: nn.Module | None, student: PreTrainedModel, teacher: PreTrainedModel, staged_of: StagedOf
) -> Tensor:
    """The term's loss of tensors of ones, where its parameters are: on the CPU if it has none."""
    parameter = None if owned is None else next(owned.parameters(), None)
    device = "cpu" if parameter is None else parameter.device

    def outputs(model: PreTrainedModel, is_student: bool) -> list[Tensor]:
        shape, depth = (1, TOKENS, model.config.hidden_size), model.config.num_hidden_layers
        return [torch.ones(shape, device=device, requires_grad=is_student) for _ in range(depth)]

    def logits(model: PreTrainedModel, is_student: bool) -> Tensor:
        classes = model.config.num_labels if _sees_images(model) else model.config.vocab_size
        return torch.ones(TOKENS, classes, device=device, requires_grad=is_student)

    def features(model: PreTrainedModel, is_student: bool) -> Features:
        def ones(*sizes: int) -> Tensor:
            return torch.ones(sizes, device=device, requires_grad=is_student)

        shapes = staged_of(model)
        stages = [
            (shape.width_of_features, shape.height, shape.width)
            if shape.is_map
            else (shape.special_tokens + shape.height * shape.width, shape.width_of_features)
            for shape in shapes.stages
        ]

        def scan(shape: ScanShape) -> Scan:
            U, V = (ones(4, shape.states, shape.rank) for _ in range(2))
            states = TOKENS, 4, shape.places, shape.channels, shape.states
            return Scan(U, ones(4, shape.rank), V, lambda: ones(*states))

        scans = tuple(map(scan, shapes.scans))
        return Features(tuple(ones(TOKENS, *sizes) for sizes in stages), logits(model, is_student), scans)

    if isinstance(term, StageTerm):
        targets = torch.eye(TOKENS, student.config.num_labels, device=device)
        return term.loss(features(student, True), features(teacher, False), targets, owned)
    if isinstance(term, LogitTerm):
        ours = logits(student, True)
        targets = torch.eye(*ours.shape, device=device) if _sees_images(student) else ours.new_zeros(TOKENS).long()
        return term.loss(ours, ours.detach() if term.needs_teacher else None, targets, owned)
    if isinstance(term, LayerTerm):
        return term.loss(outputs(student, True), outputs(teacher, False), owned)
    inputs = [torch.zeros(1, TOKENS, student.config.hidden_size, device=device)] * isinstance(term, BlockTerm)
    return term.loss(outputs(student, True)[0], outputs(teacher, False)[0], *inputs, owned)


def _sees_images(model: PreTrainedModel) -> bool:
    return model.main_input_name == "pixel_values"
