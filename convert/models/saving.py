"""The students of finished steps on disk: weights and configuration, whether converted or of one family."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from convert.models import student as _registers  # noqa: F401  # AutoConfig knows "converted" by it


def save_student(student: PreTrainedModel, folder: Path) -> None:
    """Write the student's weights and configuration into an existing folder."""
    save_model(student, str(folder / "model.safetensors"))
    student.config.save_pretrained(folder)


def load_student(
    folder: Path, teacher: PreTrainedModel, empty: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    """Read a student back, frozen, on the teacher's device, and where they share layers with its kind of attention.
    `empty` makes the model of a configuration."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type in ("converted", teacher.config.model_type):  # another family may not have the teacher's kind
        config._attn_implementation = teacher.config._attn_implementation
    with torch.device(teacher.device):
        student = empty(config)
    load_model(student, str(folder / "model.safetensors"))
    if hasattr(teacher, "generation_config"):  # a classifier has none
        student.generation_config = teacher.generation_config
    return student.requires_grad_(False).eval()


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of all weights: a run that goes on with another teacher under the same name would mix the two."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {torch.hash_tensor(value).item()}".encode())
    return digest.hexdigest()[:16]
