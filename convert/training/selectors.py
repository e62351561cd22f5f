"""What is trained: functions over the parts of a student, never over the names of its parameters."""

from collections.abc import Callable, Iterable

from torch import nn
from transformers import PreTrainedModel

from convert.mixers.hedgehog import FeatureMap
from convert.models.access import layers_of, slots_of
from convert.models.slot import Slot, attention_of


def feature_maps(student: PreTrainedModel) -> list[nn.Parameter]:
    """The feature maps phi of linear attention alone (HedgeMamba's stage 1, arXiv 2604.14191)."""
    return [p for module in student.modules() if isinstance(module, FeatureMap) for p in module.parameters()]


def mixers(student: PreTrainedModel) -> list[nn.Parameter]:
    """All of the new mixers, the projections they inherited included."""
    return [p for slot in slots_of(student).values() for p in slot.parameters()]


def all_but_embeddings(student: PreTrainedModel) -> list[nn.Parameter]:
    """Everything except the input and output embeddings (HedgeMamba's stage 2, arXiv 2604.14191)."""
    embeddings = (student.get_input_embeddings(), student.get_output_embeddings())
    ends = {id(p) for module in embeddings for p in module.parameters()}
    return [p for p in student.parameters() if id(p) not in ends]


def all_but_kept_attention(student: PreTrainedModel) -> list[nn.Parameter]:
    """Everything except the embeddings and the attention of layers that keep theirs (GenDistill's stage 3, arXiv
    2603.26556)."""
    kept = (attention_of(block) for block in layers_of(student))
    frozen = {id(p) for module in kept if not isinstance(module, Slot) for p in module.parameters()}
    return [p for p in all_but_embeddings(student) if id(p) not in frozen]


def everything(student: PreTrainedModel) -> list[nn.Parameter]:
    """Every parameter."""
    return list(student.parameters())


SELECTORS = {f.__name__: f for f in (feature_maps, mixers, all_but_embeddings, all_but_kept_attention, everything)}


def selected(student: PreTrainedModel, trains: str | Callable) -> Iterable[nn.Parameter]:
    """The parameters that a selector, given by its name here or as a function of the user's own, chooses."""
    return (SELECTORS[trains] if isinstance(trains, str) else trains)(student)


def name_of(trains: str | Callable) -> str:
    """The name of a selector."""
    return trains if isinstance(trains, str) else trains.__name__
