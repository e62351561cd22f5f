"""The interface of a mixer: a causal map with a state.

B batch · T time · D width · R rotary dimensions
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from convert.core.fields import Checked, Range

Found = TypeVar("Found")
State = tuple[Tensor, ...]  # each mixer has a NamedTuple of its own; every tensor has the batch first


@dataclass(frozen=True)
class AttentionShape(Checked):
    """What decides the sizes of an attention layer's parameters, and of the mixers that replace it."""

    width: Annotated[int, Range(1, 2**18)]
    num_heads: Annotated[int, Range(1, 2**12)]
    num_kv_heads: Annotated[int, Range(1, 2**12)]
    head_dim: Annotated[int, Range(1, 2**13)]
    # the first of a head's dimensions are rotated, in the two-halves layout
    rotary_dim: Annotated[int, Range(0, 2**13)]
    qkv_bias: bool
    out_bias: bool
    # of the RMSNorm on each head's q and k (Qwen3), or no such norm
    norm_eps: Annotated[float, Range(0, 1)] | None = None


@dataclass(frozen=True)
class StateSize:
    """Formula of the cache of one layer for one sequence.

    The cache holds `fixed_bytes`, and for each token seen, at most `window` of them, `elements_per_token` numbers in
    the dtype of the model and `bytes_per_token` bytes in dtypes that do not depend on it."""

    fixed_bytes: int = 0
    elements_per_token: int = 0
    bytes_per_token: int = 0
    window: int | None = None

    def at(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes after this many tokens, in a model of this dtype."""
        held = tokens if self.window is None else min(tokens, self.window)
        return self.fixed_bytes + held * (self.elements_per_token * dtype.itemsize + self.bytes_per_token)


@dataclass(frozen=True)
class Context:
    """Positions, padding and documents of the tokens of one call.

    cos, sin [B, T, R]: the rotary table at their positions. `padding_mask` bool [B, T]: True at real tokens, False at
    padding; None where there is no padding. `document_ids` [B, T]: states start anew where the id changes; the first
    token continues the state it is given. `found`: what layers that saw the same tokens have found out already."""

    cos: Tensor
    sin: Tensor
    padding_mask: Tensor | None = None
    document_ids: Tensor | None = None
    found: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returns, which only the first layer of a call runs: for what follows from padding and documents
        alone and makes the host wait for the device."""
        key = key, self.cos.device
        if key not in self.found:
            self.found[key] = find()
        return self.found[key]


class Mixer(nn.Module, ABC):
    """y_BTD, state = mixer(x_BTD, context, state); `state=None` is the start of a sequence.

    A mixer has `Options`, a frozen dataclass, and `State`, a NamedTuple of tensors, and is built as
    Kind(shape, options). What planning, training and evaluation need to know about a mixer is asked of it here. How it
    starts from another layer is in mixers/init, which an exported model does not have.
    """

    Options: ClassVar[type]
    State: ClassVar[type]
    model_dtype_fields: ClassVar[tuple[str, ...]] = ()  # fields of State that have the model's dtype (keys, latents)
    can_be_replaced: ClassVar[bool] = True  # whether another mixer can start from this one
    native_architecture: ClassVar[str | None] = None  # the model type in transformers that has this mixer
    dials: ClassVar[dict[str, tuple[Any, ...]]] = {}  # options, or fields of its swap, that a sweep tries -> choices
    decays: ClassVar[bool] = False  # whether its state decays at learned rates; then the last methods are its own
    lowest_rate: ClassVar[float] = 0.0  # that `set_decay` takes; more than 0 where rates are learned by their logarithm

    shape: AttentionShape
    options: Any

    @classmethod
    def tiny(cls, options: Any, seq_len: int) -> Any:
        """The options for a run on short sequences (`--tiny`), of `seq_len` tokens."""
        return options

    @classmethod
    def sequence_problem(cls, options: Any, seq_len: int) -> str | None:
        """Why training sequences of `seq_len` tokens never show what these options do, and the way out; None where
        they do."""
        return None

    @abstractmethod
    def state_size(self) -> StateSize:
        """The formula of the state's size; a test holds it against the state itself."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, context: Context, state: Any = None) -> tuple[Tensor, Any]: ...

    def set_decay(self, rate: float) -> None:
        """Set every decay rate to `rate`, in nats per unit of the time step; 0 is no decay. Raises
        ValueError below `lowest_rate`."""
        raise TypeError(f"{type(self).__name__} has no decay rate to set.")

    def check_rate(self, rate: float) -> None:
        """Raise ValueError for a rate from which decays could never learn."""
        if rate < self.lowest_rate:
            raise ValueError(
                f"The decays of {type(self).__name__} are learned by their logarithm, and none has no logarithm to"
                f" learn from: a rate must be at least {self.lowest_rate:g}; got {rate:g}."
            )

    def decay_per_token(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The mean over the tokens of x of what each state loses per token, in nats: exp(-it) is the share that is left
        after one token. One number for each decay of its own, in one dimension."""
        raise TypeError(f"{type(self).__name__} has no decay.")

    def query_and_key_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        """The parts that make queries and keys, and say what the state forgets and takes in: with them the weights
        between tokens are decided, and not what is read. A part that makes values as well is among them. None for a
        mixer that has no such division."""
        return ()

    def scan_updates(self) -> int:
        """State updates per token that each have a decay of their own: the work of an elementwise scan, which no matrix
        product does."""
        return 0

    def rule_operations(self) -> int:
        """Operations per token of a delta rule's chunks, forward: its products have sizes and a rate of their own."""
        return 0
