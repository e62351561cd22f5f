"""Similarity of the representations of two image classifiers, whatever their architectures: linear centred kernel
alignment (CKA, arXiv 1905.00414) between all hidden states, estimated from minibatches (Nguyen et al. 2021, arXiv
2010.15327, section 3).

N images of a minibatch · D numbers of a representation · L layers
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.data.image_batch import ImageBatch
from convert.evaluation.classification import evaluating
from convert.models.vision.inputs import model_inputs
from convert.runs.vision_schemas import LayerSimilarity

IMAGES = 1024  # at most that the similarity is estimated from (ours)
MINIBATCH = 64  # images of a minibatch: the memory of all hidden states of both models grows with it (ours)
WIDTH = 2**16  # numbers of a representation that are held in float64 at once
FEWEST = 4  # that the unbiased estimator is defined for


def centred_gram(x_ND: Tensor) -> Tensor:
    """Gram matrix [N, N] of N >= 4 representations, U-centred: sum(A * B) / (N (N - 3)) of two such matrices is the
    unbiased estimator HSIC_1 of the paper (the two forms are equal: Szekely & Rizzo 2014, arXiv 1310.2926)."""
    x_ND = x_ND.flatten(1)
    x_ND = x_ND - x_ND.mean(0)  # changes nothing in theory, and saves digits
    n = len(x_ND)
    gram = torch.zeros(n, n, dtype=torch.float64, device=x_ND.device)
    for part in x_ND.split(WIDTH, 1):  # in float64, as untrained networks have representations of 1e-25
        gram += part.double() @ part.double().T
    gram.fill_diagonal_(0)
    rows = gram.sum(0) / (n - 2)
    centred = gram - rows[:, None] - rows[None] + gram.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


class Alignment:
    """Linear CKA [L of the first, L of the second] between the layers of two models, from minibatches that are added
    one by one: means of HSIC_1 over minibatches, then their ratio."""

    def __init__(self) -> None:
        self.cross: Tensor | float = 0.0
        self.own: list[Tensor | float] = [0.0, 0.0]

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add the representations [N, ...] of the same images in the layers of both models."""
        n = len(first[0])
        a, b = (torch.stack([centred_gram(x).flatten() for x in layers]) for layers in (first, second))
        scale = n * (n - 3)
        self.cross = self.cross + a @ b.T / scale
        self.own = [own + x.square().sum(1) / scale for own, x in zip(self.own, (a, b), strict=True)]

    def value(self) -> Tensor:
        """The similarities so far: 1 for representations equal up to rotation and scale, about 0 for unrelated ones,
        and 0 where a layer says the same of every image."""
        a, b = (torch.as_tensor(own).sqrt() for own in self.own)
        return torch.nan_to_num(torch.as_tensor(self.cross) / torch.outer(a, b), nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def similarity(teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[ImageBatch]) -> LayerSimilarity:
    """Linear CKA between every hidden state of a teacher and of a student, on at most 1,024 images: the first hidden
    state is the embedding, the last the output of the last block."""
    found, seen = Alignment(), 0
    with evaluating(teacher), evaluating(student):
        for images in minibatches(batches):
            found.add(*(_hidden(model, images) for model in (teacher, student)))
            seen += len(images)
    values = found.value().tolist() if seen else []
    return LayerSimilarity(images=seen, values=values)


def minibatches(batches: Sequence[ImageBatch]) -> Iterator[Tensor]:
    """The first images in equal minibatches; of few images one smaller one, and none of fewer than four."""
    kept, count = [], 0
    for batch in batches:
        kept.append(batch.images)
        if (count := count + len(batch.images)) >= IMAGES:
            break
    images = torch.cat(kept)[:IMAGES] if kept else torch.empty(0)
    size = min(MINIBATCH, len(images))
    if size >= FEWEST:
        yield from images[: len(images) // size * size].split(size)


def _hidden(model: PreTrainedModel, images: Tensor) -> Sequence[Tensor]:
    """Hidden states of a model for images [N, C, H, W] with values from 0 to 1."""
    inputs = model_inputs(model, images.to(model.device))
    return [state.float() for state in model(pixel_values=inputs, output_hidden_states=True).hidden_states]
