"""A student as an architecture that transformers itself has, where there is one, without code of ours: serving engines
that know the architecture can run it."""

from types import ModuleType

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from convert.exporting import deepseek_v3, qwen3_5
from convert.models.sharding import fill, is_shared_out, shared_out, unsharded, whole
from convert.models.student import ConvertedForCausalLM

# mixer -> what makes of its students a model of transformers: `obstacle`, `config`, `of_layer`, `around` and `in_full`
ARCHITECTURES: dict[str, ModuleType] = {"mla": deepseek_v3, "gdn": qwen3_5}
LAYERS = "model.layers."  # how names of weights of layers begin


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
    """The same function with the same weights (those of the mixers copied), for a student without an obstacle. What is
    made of a student that processes share out is shared out, too: a layer at a time is whole."""
    config, architecture = native_config(student), _known(student)
    layers = [f"{LAYERS}{i}." for i in range(len(student.blocks))]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=student.dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(student.device)  # its table is in no state
    model.generation_config = student.generation_config
    if not is_shared_out(student):
        found = architecture.around(_around(student))
        for layer, name in enumerate(layers):
            found |= {name + part: tensor for part, tensor in _of_layer(student, layer).items()}
        model.load_state_dict(found, strict=True, assign=True)
        return model.eval()
    made = shared_out(model.eval(), student.device)
    places = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in architecture.around(_around(student)).items():
        fill(places.pop(name), whole(tensor).__getitem__)
    for layer, name in enumerate(layers):
        with unsharded(student.blocks[layer]):
            for part, tensor in _of_layer(student, layer).items():
                fill(places.pop(name + part), tensor.__getitem__)
    if places:
        raise RuntimeError(f"the student has no weights for {', '.join(places)}")
    return made


def _around(student: ConvertedForCausalLM) -> dict[str, Tensor]:
    """The weights of the student's host that are of no layer, by its names."""
    named = student.host.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in named if not name.startswith(LAYERS)}


def _of_layer(student: ConvertedForCausalLM, layer: int) -> dict[str, Tensor]:
    """The weights of a layer of the native model, by its names."""
    named = student.blocks[layer].named_parameters(remove_duplicate=False)
    kept = {name: p.detach() for name, p in named if not name.startswith("self_attn.mixer.")}
    return _known(student).of_layer(student, layer, kept)


def in_full(student: ConvertedForCausalLM, model: PreTrainedModel) -> list[str]:
    """Names of the weights of its native model that keep their dtype on disk, whatever that of the others."""
    return _known(student).in_full(model.state_dict())


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
