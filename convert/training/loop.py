"""Stages of training over one private loop. The loop is shared; each stage spells out its loss.

A stage is stage(student, teacher, batches, settings, ...) -> student; `batches(step)` is the batch of a step.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.errors import Interrupted, UserError
from convert.core.fields import Range, check
from convert.data.batches import Batch
from convert.mixers.base import Context
from convert.mixers.parts import FeatureMap, project_gradients
from convert.models.positions import documents_of
from convert.models.student import ConvertedForCausalLM, attention_of
from convert.objectives.divergences import Distill, backward, backward_through_head, cosine_distance

NORMS = 50  # times in a stage that the sizes of weights and gradients are logged, layer by layer (ours)
BAD_STEPS_IN_A_ROW = 5  # non-finite gradients before a stage gives up (ours)


# --- what is trained: functions over the student's parts, never over names


def feature_maps(student: ConvertedForCausalLM) -> list[nn.Parameter]:
    """Only the maps phi (HedgeMamba's stage 1)."""
    return [p for module in student.modules() if isinstance(module, FeatureMap) for p in module.parameters()]


def mixers(student: ConvertedForCausalLM) -> list[nn.Parameter]:
    """All of the new mixers, the projections they inherited included."""
    return [p for slot in student.slots().values() for p in slot.parameters()]


def all_but_embeddings(student: ConvertedForCausalLM) -> list[nn.Parameter]:
    """Everything except the input and output embeddings (HedgeMamba's stage 2)."""
    ends = {
        id(p)
        for module in (student.get_input_embeddings(), student.get_output_embeddings())
        for p in module.parameters()
    }
    return [p for p in student.parameters() if id(p) not in ends]


def everything(student: ConvertedForCausalLM) -> list[nn.Parameter]:
    return list(student.parameters())


SELECTORS = {f.__name__: f for f in (feature_maps, mixers, all_but_embeddings, everything)}


@dataclass(frozen=True)
class Settings:
    """Of one stage. Sizes are in tokens; shares are of the stage's steps."""

    tokens: Annotated[int, Range(0, 1e14)]  # more than any text holds (ours)
    lr: Annotated[float, Range(0, 10)]
    objective: Distill | Callable
    trains: Callable
    seq_len: Annotated[int, Range(2, 2**24)]
    batch_tokens: Annotated[int, Range(2, 2**27)]
    micro_tokens: Annotated[int, Range(1, 2**27)]  # of one forward and backward; the rest of a batch is accumulated
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: Annotated[float, Range(0, 1)] = 0.1  # 10 / 80 / 10: MOHAWK's and GenDistill's
    decay: Annotated[float, Range(0, 1)] = 0.1
    floor: Annotated[float, Range(0, 1)] = 0.02  # of the peak rate, at the end (GenDistill)
    beta1: Annotated[float, Range(0, 0.9999)] = 0.9
    beta2: Annotated[float, Range(0, 0.999999)] = 0.95
    weight_decay: Annotated[float, Range(0, 1)] = (
        0.1  # of the matrices of linear layers (MOHAWK, GenDistill); everything else has none
    )
    clip: Annotated[float, Range(0, 1e9)] = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of matrix products; auto: bfloat16 where the device is fast at it
    )
    noise: Annotated[float, Range(0, 1)] = (
        0.0  # share of the input tokens replaced by others of the batch, for teacher and student alike
    )
    checkpointing: bool = False  # recompute each layer in the backward pass: less memory, a third more time
    loss_chunk: Annotated[int, Range(1, 2**27)] = (
        512  # tokens whose logits are held at once; they fit a CPU's cache, 1.4 times the speed of 2,048
    )
    evaluate_every: Annotated[int, Range(0, 1e18)] = (
        0  # tokens between two measurements of held-out perplexity; 0: none
    )
    save_every: Annotated[float, Range(0, 1e12)] = 60.0  # seconds between two checkpoints

    __post_init__ = check

    @property
    def num_steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def num_sequences(self) -> int:
        return self.batch_tokens // self.seq_len

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        at, warmup = (step + 1) / self.num_steps, max(self.warmup, 1 / self.num_steps)
        if at <= warmup:
            return self.lr * at / warmup
        if self.schedule == "cosine":
            return self.lr * (
                self.floor + (1 - self.floor) * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup))) / 2
            )
        return self.lr * min(1.0, max(self.floor, (1 - step / self.num_steps) / self.decay if self.decay else 1.0))


class Silent:
    """Tracks and keeps nothing: the default of a stage that is called by itself."""

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        pass

    def resume(self, step: int) -> None:
        pass

    def load(self) -> dict | None:
        return None

    def save(self, step: int, state: dict) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


def align(
    student, teacher, batches, settings: Settings, *, track=Silent(), keep=Silent(), measure=None
) -> ConvertedForCausalLM:  # noqa: B008
    """Each new mixer learns its layer's attention output from the teacher's own input to it.

    One pass of the teacher trains all layers; each layer's graph is freed before the next one's is made."""
    slots = student.slots()
    blocks = list(layers_of(teacher))

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        share = batch.input_ids.numel() / whole.input_ids.numel()
        documents, losses = documents_of(batch.position_ids), []

        def learn(layer: int):
            def hook(module, args, kwargs, output):
                x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                with torch.enable_grad(), autocast(x.device, settings.precision):
                    y, _ = slots[layer].mixer(x, Context(*kwargs["position_embeddings"], None, documents))
                    loss = settings.objective(y.float(), output[0].float()) * (share / len(slots))
                backward(loss)
                losses.append(loss.detach())

            return hook

        hooks = [attention_of(blocks[layer]).register_forward_hook(learn(layer), with_kwargs=True) for layer in slots]
        try:
            with torch.no_grad(), autocast(batch.input_ids.device, settings.precision):
                hidden_states(teacher, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(losses).sum()

    return _train(student, learn_from, batches, settings, track, keep, measure)


def distill(
    student, teacher, batches, settings: Settings, *, track=Silent(), keep=Silent(), measure=None
) -> ConvertedForCausalLM:  # noqa: B008
    """The whole student learns the teacher's next-token distribution, or the text, as the objective says."""
    objective: Distill = settings.objective

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        targets = batch.labels.flatten()
        real = targets != -100
        teacher_hidden = None
        with autocast(batch.input_ids.device, settings.precision):
            features = objective.feature_matching
            if objective.needs_teacher:
                with torch.no_grad(), layer_outputs(teacher, bool(features)) as wanted_outputs:
                    teacher_hidden = hidden_states(teacher, batch).flatten(0, 1)[real]
            with layer_outputs(student, bool(features)) as outputs:
                hidden = hidden_states(student, batch).flatten(0, 1)[real]
            targets = targets[real]
            scale = 1 / max(1, whole.num_targets)
            also = None
            if features:
                distances = [
                    cosine_distance(y.float(), wanted.float())
                    for y, wanted in zip(outputs, wanted_outputs, strict=True)
                ]
                also = features * torch.stack(distances).mean() * (batch.input_ids.numel() / whole.input_ids.numel())

            def loss(logits: Tensor, rows: slice) -> Tensor:
                if teacher_hidden is None:
                    return objective(logits, None, targets[rows]) * scale
                with torch.no_grad():
                    wanted = teacher.get_output_embeddings()(teacher_hidden[rows]).float()
                return objective(logits, wanted, targets[rows]) * scale

            return backward_through_head(hidden, student.get_output_embeddings(), loss, settings.loss_chunk, also)

    return _train(student, learn_from, batches, settings, track, keep, measure)


@contextmanager
def layer_outputs(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[Tensor]]:
    """What each decoder layer returns [B, T, D], as the model runs. (transformers' own list of these ends behind the
    final norm.)"""
    seen: list[Tensor] = []

    def hook(module, args, output) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(hook) for block in layers_of(model)] if wanted else []
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()


STAGES = {f.__name__: f for f in (align, distill)}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a teacher or a student."""
    return model.blocks if isinstance(model, ConvertedForCausalLM) else model.base_model.layers


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The last hidden states [B, T, D], before the output embeddings."""
    if isinstance(model, ConvertedForCausalLM):
        return model.hidden_states(batch.input_ids, position_ids=batch.position_ids)
    return model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether matrix products are in bfloat16. "auto": where the device is fast at them."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say: float32 then
    fast = device.type != "cpu" or known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return precision == "bfloat16" or (precision == "auto" and fast)


def autocast(device: torch.device, precision: str):
    """Products in bfloat16, or not; parameters, states and losses stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(device, precision))


def _optimizer(student: ConvertedForCausalLM, settings: Settings) -> torch.optim.AdamW:
    chosen = {id(p) for p in settings.trains(student)}
    if not chosen:
        raise UserError(
            f"The stage has nothing to train: {settings.trains.__name__} selects no parameter of this student."
        )
    for p in student.parameters():
        p.requires_grad_(id(p) in chosen)
    matrices = {id(module.weight) for module in student.modules() if isinstance(module, nn.Linear)}
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True
    )


@dataclass
class _Progress:
    """Of a stage: the counts that its checkpoints keep."""

    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    seconds: float = 0.0  # of training, in all processes so far


def _train(student, learn_from, batches, settings: Settings, track, keep, measure) -> ConvertedForCausalLM:
    """The loop. `learn_from(batch, whole)` accumulates the gradients of a micro-batch's part of the whole batch's loss,
    and returns it."""
    optimizer = _optimizer(student, settings)
    trained = [p for p in student.parameters() if p.requires_grad]
    at = _restore(keep.load(), trained, optimizer)
    track.resume(at.step)
    first_step, first_second, started = at.step, at.seconds, time.monotonic()
    saved_at = started
    student.train()
    with _recomputing(student, settings.checkpointing), _progress_bar(at.step, settings) as bar:
        while at.step < settings.num_steps:
            rate = settings.rate(at.step)
            batch = batches(at.step).with_noise(settings.noise, (settings.seed, at.step))
            loss = _accumulate(learn_from, student, batch, settings)
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip).item()
            if math.isfinite(loss) and math.isfinite(norm):
                _update(optimizer, rate)
                at.bad_in_a_row = 0
            else:
                at.skipped, at.bad_in_a_row = at.skipped + 1, at.bad_in_a_row + 1
            sizes = _norms(student) if at.step % max(1, settings.num_steps // NORMS) == 0 else {}
            optimizer.zero_grad()
            at.step += 1
            at.seconds = first_second + time.monotonic() - started
            speed = (at.step - first_step) * settings.batch_tokens / (at.seconds - first_second)
            numbers = {
                "train/loss": loss, "train/grad_norm": norm, "train/lr": rate, "speed/tokens_per_s": speed,
                "train/skipped": at.skipped, "train/seconds": at.seconds,
            } | sizes  # fmt: skip
            _show(bar, loss, at, settings)
            if measure and _is_measurement_due(at.step, settings):
                numbers |= measure(student)
                student.train()
            track.log(at.step, at.step * settings.batch_tokens, numbers)
            _refuse_hopeless(at, rate)
            is_last, is_stopped = at.step == settings.num_steps, keep.stop_requested()
            if is_stopped or (time.monotonic() - saved_at > settings.save_every and not is_last):
                keep.save(at.step, _state(at, trained, optimizer))
                saved_at = time.monotonic()
            if is_stopped:
                raise Interrupted(
                    f"Stopped at step {at.step} of {settings.num_steps}; it is saved. The same command goes on from"
                    " there."
                )
    if at.skipped == settings.num_steps:
        raise UserError(
            f"A stage must take steps; all {at.skipped} had gradients that are not finite. Lower the rate with --set"
            " STEP.lr=...."
        )
    for p in student.parameters():
        p.requires_grad_(False)
        p.grad = None
    return student.eval()


def _state(at: _Progress, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict:
    """What a checkpoint holds."""
    parameters = [p.detach() for p in trained]
    return asdict(at) | {
        "rng": _generators(trained[0].device),
        "parameters": parameters,
        "optimizer": optimizer.state_dict(),
    }


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The state of the CPU's random numbers, and of the device's."""
    found = {"cpu": torch.get_rng_state()}
    return (
        found if device.type == "cpu" else found | {device.type: torch.get_device_module(device).get_rng_state(device)}
    )


@torch.no_grad()
def _restore(state: dict | None, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> _Progress:
    """Go on from a checkpoint, or from the start where there is none."""
    if state is None:
        return _Progress()
    for p, saved in zip(trained, state["parameters"], strict=True):
        p.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    device = trained[0].device
    for kind, generator in state["rng"].items():  # of a device that is not used here: nothing is left to continue
        if kind == "cpu":
            torch.set_rng_state(generator.cpu())
        elif kind == device.type:
            torch.get_device_module(device).set_rng_state(generator.cpu(), device)
    return _Progress(state["step"], state["skipped"], state["bad_in_a_row"], state["seconds"])


@contextmanager
def _recomputing(student: ConvertedForCausalLM, wanted: bool) -> Iterator[None]:
    """Each layer is computed again in the backward pass, where that is wanted."""
    if wanted:
        student.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            student.activation_checkpointing_disable()


def _accumulate(learn_from, student: ConvertedForCausalLM, batch: Batch, settings: Settings) -> float:
    """The gradients of a batch, micro-batch by micro-batch; its loss."""
    parts = batch.split(max(1, settings.micro_tokens // settings.seq_len))
    loss = sum(learn_from(part.to(student.device), batch).item() for part in parts)
    project_gradients(student)
    return loss


@torch.no_grad()
def _norms(student: ConvertedForCausalLM) -> dict[str, float]:
    """Of the trained parameters of each new mixer and of their gradients, as clipped; read from the device at once."""
    found = {}
    for layer, slot in student.slots().items():
        trained = [p for p in slot.parameters() if p.grad is not None]
        if trained:
            found[f"weights/layer_{layer:02}"] = torch.nn.utils.get_total_norm([p.detach() for p in trained])
            found[f"gradients/layer_{layer:02}"] = torch.nn.utils.get_total_norm([p.grad for p in trained])
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}


def _update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _is_measurement_due(step: int, settings: Settings) -> bool:
    """Whether this step's tokens completed another `evaluate_every`."""
    tokens, every = step * settings.batch_tokens, settings.evaluate_every
    return bool(every) and tokens // every > (tokens - settings.batch_tokens) // every


def _refuse_hopeless(at: _Progress, rate: float) -> None:
    if at.bad_in_a_row == BAD_STEPS_IN_A_ROW:
        raise UserError(
            f"Training must have finite gradients; {at.bad_in_a_row} steps in a row had none (step {at.step}, learning"
            f" rate {rate:.2g}). Lower the rate with --set STEP.lr=..., then start again with --fresh."
        )


def _progress_bar(step: int, settings: Settings) -> tqdm:
    total, done = settings.num_steps * settings.batch_tokens, step * settings.batch_tokens
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, dynamic_ncols=True)


def _show(bar: tqdm, loss: float, at: _Progress, settings: Settings) -> None:
    bar.update(settings.batch_tokens)
    bar.set_postfix_str(f"loss {loss:.4f}" + (f", {at.skipped} skipped" if at.skipped else ""), refresh=False)
