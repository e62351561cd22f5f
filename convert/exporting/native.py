"""A student as an architecture that transformers itself has, where there is one, without code of ours: serving engines
that know the architecture can run it."""

from types import ModuleType

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from convert.exporting import deepseek_v3, qwen3_5
from convert.models.student import ConvertedForCausalLM

# mixer -> what makes of its students a model of transformers: `obstacle`, `config`, `weights` and `in_full`
ARCHITECTURES: dict[str, ModuleType] = {"mla": deepseek_v3, "gdn": qwen3_5}


def obstacle(student: ConvertedForCausalLM) -> str | None:
    """Why no architecture of transformers computes what this student does, or None."""
    architecture = _architecture(student)
    if architecture is None:
        return f"its layers are {' and '.join(sorted(mixer or 'attention' for mixer in _names(student)))}"
    return architecture.obstacle(student)


def native_config(student: ConvertedForCausalLM) -> PreTrainedConfig:
    """The configuration of the same model as the architecture of transformers, for a student without an obstacle."""
    return _known(student).config(student)


@torch.no_grad()
def to_native(student: ConvertedForCausalLM) -> PreTrainedModel:
    """The same function with the same weights (those of the mixers copied), for a student without an obstacle."""
    config = native_config(student)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(_known(student).weights(student), strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(student.device)  # its table is in no state
    model.generation_config = student.generation_config
    return model.eval()


def in_full(student: ConvertedForCausalLM) -> list[str]:
    """Names of the weights of the native model that keep their dtype on disk, whatever that of the others."""
    return _known(student).in_full(_known(student).weights(student))


def _names(student: ConvertedForCausalLM) -> set[str | None]:
    return {mixer and mixer["name"] for mixer in student.config.mixers}


def _architecture(student: ConvertedForCausalLM) -> ModuleType | None:
    names = [name for name in _names(student) if name is not None]
    return ARCHITECTURES.get(names[0]) if len(names) == 1 else None


def _known(student: ConvertedForCausalLM) -> ModuleType:
    architecture = _architecture(student)
    if architecture is None:
        raise ValueError(f"No architecture of transformers is this student: {obstacle(student)}.")
    return architecture
