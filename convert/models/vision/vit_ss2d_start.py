"""A vision transformer with SS2D that starts from one with attention: all but the mixers is the teacher's."""

import copy

from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.models.vision.families import OUTPUTS
from convert.models.vision.inputs import FIELD
from convert.models.vision.vit_ss2d import HOSTS, OF_HOST, ViTSS2DConfig


def ss2d_config(
    teacher: PreTrainedConfig, state_size: int, ssm_ratio: float, time_step_rank: int | None
) -> ViTSS2DConfig:
    """Configuration of the student that has an SS2D block of the same width in place of each attention.

    Raises UserError for a teacher that is no vision transformer of one width and one grid."""
    if teacher.model_type not in HOSTS:
        raise UserError(
            f"Attention is replaced by SS2D in vision transformers of one width and one grid of patches, the families"
            f" {', '.join(HOSTS)}; this teacher is a {teacher.model_type}. Take --to vmamba, which learns from any"
            " classifier."
        )
    known = HOSTS[teacher.model_type].__name__
    if other := set(teacher.architectures or ()) - {known}:
        raise UserError(
            f"A {teacher.model_type} whose attention is replaced is a {known}; this teacher is a {min(other)}. Take"
            " --to vmamba, which learns from any classifier."
        )
    fields = (*OF_HOST, *OUTPUTS, FIELD)
    return ViTSS2DConfig(
        family=teacher.model_type, state_size=state_size, ssm_ratio=ssm_ratio, time_step_rank=time_step_rank,
        **{name: copy.deepcopy(getattr(teacher, name)) for name in fields},
    )  # fmt: skip


def without_attention(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """The student, of a configuration by `ss2d_config`, with all of the teacher's weights but those of attention; its
    mixers are left as they are."""
    kept = {name: weight for name, weight in teacher.state_dict().items() if ".attention." not in name}
    found = student.host.load_state_dict(kept, strict=False)
    left = [name for name in found.missing_keys if ".attention." not in name]
    if left or found.unexpected_keys:
        raise ValueError(f"all but the mixers must come from the teacher; {[*left, *found.unexpected_keys]} do not fit")
    return student
