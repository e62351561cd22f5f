"""What is trained: functions over the parts of a student, never over the names of its parameters.

Names of parts are added and subtracted from left to right: "everything - embeddings - head - mlps", "mixers + norms".
"""

import re
from collections.abc import Callable, Iterable
from typing import Annotated

from torch import nn
from transformers import PreTrainedModel

from convert.core.fields import Written
from convert.mixers.hedgehog import FeatureMap
from convert.models.access import layers_of, replaced_attention, slots_of
from convert.models.slot import attention_of


def feature_maps(student: PreTrainedModel) -> list[nn.Parameter]:
    """The feature maps phi of linear attention alone (HedgeMamba's stage 1, arXiv 2604.14191)."""
    return [p for module in student.modules() if isinstance(module, FeatureMap) for p in module.parameters()]


def mixers(student: PreTrainedModel) -> list[nn.Parameter]:
    """All of the new mixers, the projections they inherited included."""
    return [p for mixer in replaced_attention(student).values() for p in mixer.parameters()]


def kept_attention(student: PreTrainedModel) -> list[nn.Parameter]:
    """The attention of layers that keep theirs."""
    replaced = replaced_attention(student)
    kept = (attention_of(block) for layer, block in enumerate(layers_of(student)) if layer not in replaced)
    return [p for module in kept for p in module.parameters()]


def mlps(student: PreTrainedModel) -> list[nn.Parameter]:
    """The MLPs of all layers."""
    return [p for block in layers_of(student) for p in block.mlp.parameters()]


def norms(student: PreTrainedModel) -> list[nn.Parameter]:
    """The norms before attention and MLPs, and the last one: all that is in no other part."""
    return _combined(student, "everything - embeddings - head - mixers - kept_attention - mlps")


def embeddings(student: PreTrainedModel) -> list[nn.Parameter]:
    """The input embeddings; where the head is tied to them, they are one."""
    return list(student.get_input_embeddings().parameters())


def head(student: PreTrainedModel) -> list[nn.Parameter]:
    """The output embeddings."""
    return list(student.get_output_embeddings().parameters())


def queries_and_keys(student: PreTrainedModel) -> list[nn.Parameter]:
    """What the new mixers name as making their queries and keys, and as saying what is forgotten and written
    (GenDistill's stage 1, arXiv 2603.26556)."""
    parts = [part for slot in slots_of(student).values() for part in slot.mixer.query_and_key_parts()]
    return [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


def all_but_embeddings(student: PreTrainedModel) -> list[nn.Parameter]:
    """Everything except the input and output embeddings (HedgeMamba's stage 2, arXiv 2604.14191)."""
    return _combined(student, "everything - embeddings - head")


def all_but_kept_attention(student: PreTrainedModel) -> list[nn.Parameter]:
    """Everything except the embeddings and the attention of layers that keep theirs (GenDistill's stage 3, arXiv
    2603.26556)."""
    return _combined(student, "everything - embeddings - head - kept_attention")


def everything(student: PreTrainedModel) -> list[nn.Parameter]:
    """Every parameter."""
    return list(student.parameters())


PARTS = (feature_maps, mixers, kept_attention, mlps, norms, embeddings, head)
SELECTORS = {f.__name__: f for f in (*PARTS, queries_and_keys, all_but_embeddings, all_but_kept_attention, everything)}
ONE = "|".join(SELECTORS)
# names of selectors, or a function of the user's own
Trains = (
    Annotated[
        str,
        Written(
            rf" *({ONE})( *[+-] *({ONE}))* *",
            f"one of {', '.join(SELECTORS)}, or several joined by + and -, as everything - head - mlps",
        ),
    ]
    | Callable
)


def selected(student: PreTrainedModel, trains: str | Callable) -> Iterable[nn.Parameter]:
    """The parameters that `trains` chooses: the name of a selector, several with signs between, or a function of the
    user's own."""
    if isinstance(trains, str):
        return SELECTORS[trains](student) if trains in SELECTORS else _combined(student, trains)
    return trains(student)


def _combined(student: PreTrainedModel, text: str) -> list[nn.Parameter]:
    """The parameters that names with signs between choose, in the order of the student."""
    chosen: set[int] = set()
    for sign, name in re.findall(r"([+-]?) *(\w+)", text):
        part = {id(p) for p in SELECTORS[name](student)}
        chosen = chosen - part if sign == "-" else chosen | part
    return [p for p in student.parameters() if id(p) in chosen]


def name_of(trains: str | Callable) -> str:
    """The name of a function, or names with signs, whatever white space they were written with."""
    return " ".join(re.findall(r"\w+|[+-]", trains)) if isinstance(trains, str) else trains.__name__
