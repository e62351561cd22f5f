"""What the tests of training share: a short text, its batches, students, and where a stage's numbers go."""

import io

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convert.data.batches import Batches
from convert.data.text import Tokens
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from convert.objectives import Objective
from convert.training.loop import Silent
from convert.training.settings import Settings
from tests.conftest import tiny_teacher

SETTINGS = Settings(
    tokens=20 * 128,
    lr=1e-2,
    objective=Objective.of("cosine_distance"),
    trains="mixers",
    seq_len=32,
    batch_tokens=128,
    micro_tokens=128,
    precision="float32",
)


def tokens(length: int = 4000) -> Tokens:
    """Text with something to learn, in documents of 50 tokens."""
    ids = (torch.arange(length) * 7 % 23 + torch.arange(length) // 50 % 3).numpy()
    return Tokens(ids, torch.arange(0, length, 50).numpy())


def batches(settings: Settings = SETTINGS) -> Batches:
    return Batches(tokens(), settings.seq_len, settings.num_sequences, settings.seed)


def student_of(family: str, mixer: str = "linear") -> ConvertedForCausalLM:
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    return swap(teacher, mixer)


class Kept(Silent):
    """Keeps checkpoints in memory as a file would, and asks to stop after some steps."""

    def __init__(self, stop_after: int | None = None):
        self.states: dict[int, dict] = {}
        self.steps, self.stop_after = 0, stop_after

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        self.steps = step

    def load(self, like=None) -> dict | None:
        return self.states[max(self.states)] if self.states else None

    def save(self, step: int, state: dict) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self.states[step] = torch.load(file, weights_only=True)

    def stop_requested(self) -> bool:
        return self.stop_after is not None and self.steps >= self.stop_after


class Logged(Silent):
    """Remembers the loss and the norm of the gradients of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        self.losses.append(numbers["train/loss"])
        self.norms.append(numbers["train/grad_norm"])


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))
