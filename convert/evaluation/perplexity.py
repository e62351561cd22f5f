"""How well models predict held-out text: perplexity, perplexity by position, and a student compared with its teacher.

Logits are made for a few tokens at a time, so that memory does not grow with the vocabulary times the text.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.processes import rank, share, sum_in_place, summed
from convert.data.batches import Batch
from convert.models.access import hidden_states
from convert.objectives.divergences import cross_entropy, forward_kl

HEAD_CHUNK = 512  # tokens whose logits are held at once
SHORTEST_BUCKET = 64  # tokens before, where perplexity is told by position


def _predicted(
    models: Sequence[PreTrainedModel], batches: list[Batch]
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Yield in chunks of N target tokens, of this process's share of the batches: the logits [N, vocabulary] of each
    model, the targets [N] and their positions [N]. Models run equally often in all processes, which may share their
    weights out; of a batch that comes again nothing counts."""
    device = models[-1].device
    bar = tqdm(
        share(batches), desc="held-out text", unit="batch", dynamic_ncols=True, delay=3, leave=False, disable=rank() > 0
    )
    for _, batch, counts in bar:
        batch = (batch if counts else replace(batch, labels=torch.full_like(batch.labels, -100))).to(device)
        places = batch.target_places
        targets, positions = batch.labels.flatten()[places], batch.position_ids.flatten()[places]
        hidden = [hidden_states(model, batch).flatten(0, 1)[places].split(HEAD_CHUNK) for model in models]
        parts = zip(*hidden, targets.split(HEAD_CHUNK), positions.split(HEAD_CHUNK), strict=True)
        for *chunks, target, position in parts:
            logits = [model.get_output_embeddings()(h).float() for model, h in zip(models, chunks, strict=True)]
            yield logits, target, position


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Perplexity: exp of the mean nats per target token; inf where that overflows."""
    nats, tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for (logits,), targets, _ in _predicted([model], batches):
        nats += cross_entropy(logits, targets).sum()
        tokens += len(targets)
    total, count = summed(nats.item(), tokens)
    return _exp(total / count)


@torch.no_grad()
def perplexity_by_position(model: PreTrainedModel, batches: list[Batch]) -> dict[int, float]:
    """Perplexity by the number of tokens of the same document before the target: each key is where its range begins and
    the next key where it ends. The keys are 0 and the powers of two from 64 on."""
    found, buckets = [torch.zeros(0, device=model.device)], [torch.zeros(0, dtype=torch.long, device=model.device)]
    for (logits,), targets, positions in _predicted([model], batches):
        found.append(cross_entropy(logits, targets))
        buckets.append(positions.clamp(min=SHORTEST_BUCKET // 2).log2().floor().long())
    # on the CPU, where a sum has one order
    each, bucket = torch.cat(found).cpu().double(), torch.cat(buckets).cpu()
    nats = torch.zeros(64, dtype=torch.float64).index_add_(0, bucket, each)
    counts = torch.zeros(64, dtype=torch.float64).index_add_(0, bucket, torch.ones_like(each))
    sum_in_place(nats, counts)
    first = int(math.log2(SHORTEST_BUCKET)) - 1
    return {(1 << b if b > first else 0): _exp((nats[b] / counts[b]).item()) for b in range(first, 64) if counts[b]}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


@dataclass(frozen=True)
class Comparison:
    """Student and teacher on the same tokens."""

    perplexity_teacher: float
    perplexity_student: float
    top1: float  # share of positions where both put the same token first
    kl_nats: float  # mean KL(teacher || student) per token
    tokens: int


@torch.no_grad()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Batch]) -> Comparison:
    """Compare the next-token distributions of two models of one vocabulary, over all target tokens."""
    on_device, tokens = torch.zeros(4, dtype=torch.float64, device=student.device), 0
    for (t, s), targets, _ in _predicted([teacher, student], batches):
        terms = (
            cross_entropy(t, targets),
            cross_entropy(s, targets),
            (t.argmax(-1) == s.argmax(-1)).float(),
            forward_kl(s, t),
        )
        on_device += torch.stack([term.sum(dtype=torch.float64) for term in terms])
        tokens += len(targets)
    sums = on_device.cpu()
    sum_in_place(sums)
    tokens = int(summed(tokens)[0])
    teacher_nats, student_nats, top1, kl = (sums / tokens).tolist()
    return Comparison(_exp(teacher_nats), _exp(student_nats), top1, kl, tokens)
