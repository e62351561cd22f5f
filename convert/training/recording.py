"""What a teacher says of a batch, reduced to what a recording keeps.

N tokens with a target · V vocabulary · K most likely tokens · S drawn tokens · D width
"""

import hashlib

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.core.processes import gathered
from convert.data.batches import Batch
from convert.data.recorded import LOWEST, record_type
from convert.models.access import hidden_states
from convert.models.sharding import is_shared_out
from convert.objectives.recorded import RecordedTeacher
from convert.training.precision import autocast
from convert.training.settings import Settings


@torch.no_grad()
def records_of(
    teacher: PreTrainedModel, batch: Batch, step: int, settings: Settings, kept: dict[str, int]
) -> np.ndarray:
    """The records [N] of a batch, in the order of its tokens: logits are computed as a stage computes them.

    `kept` says how much (see `record_type`). Draws depend on the seed and the step alone."""
    digest = hashlib.sha256(f"{settings.seed} {step}".encode()).digest()
    generator = torch.Generator(teacher.device).manual_seed(int.from_bytes(digest[:7]))
    found, parts = [], list(batch.parts(settings.micro_units))
    idle = passes_of_others(teacher, len(parts))
    for part in parts:
        part = part.to(teacher.device)
        with autocast(teacher.device, settings.precision):
            hidden_ND = hidden_states(teacher, part).flatten(0, 1)[part.target_places]
            for chunk in hidden_ND.split(settings.loss_chunk):
                logits = teacher.get_output_embeddings()(chunk).float()
                found.append(recorded(logits, kept["top_k"], kept["sample"], generator))
    take_part(teacher, idle)
    records = np.zeros(sum(len(each.ids) for each in found), record_type(**kept))
    at = 0
    for each in found:
        for name, values in each._asdict().items():
            if values is not None:
                records[name][at : at + len(values)] = values.cpu().numpy()
        at += len(each.ids)
    return records


def passes_of_others(teacher: PreTrainedModel, own: int) -> int:
    """How many more passes another process makes through its batch than the `own` of this one, where they share the
    teacher out: its layers are gathered from all of them. Every process must ask."""
    return max(gathered(own)) - own if is_shared_out(teacher) else 0


@torch.no_grad()
def take_part(teacher: PreTrainedModel, passes: int) -> None:
    """Give this process's rows of a shared teacher to passes of others."""
    for _ in range(passes):
        teacher(input_ids=torch.zeros(1, 2, dtype=torch.long, device=teacher.device), use_cache=False)


def recorded(logits_NV: Tensor, top_k: int, sample: int, generator: torch.Generator) -> RecordedTeacher:
    """The K most likely tokens, what all others have together, and S drawn from those, each as likely as it is."""
    log_p = logits_NV.log_softmax(-1)
    top, ids = log_p.topk(top_k)
    rest = log_p.scatter(-1, ids, -torch.inf)
    tail = rest.logsumexp(-1, keepdim=True)
    kept = torch.cat([top, tail], -1).clamp(min=LOWEST)
    if not sample:
        return RecordedTeacher(ids, kept)
    weights = (rest - tail).exp()
    weights[tail.squeeze(-1).exp() == 0] = 1.0  # draws of no weight, whatever they are
    drawn = torch.multinomial(weights, sample, replacement=True, generator=generator)
    return RecordedTeacher(torch.cat([ids, drawn], -1), kept, -torch.special.entr(log_p.exp()).sum(-1))
