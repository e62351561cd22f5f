"""VMamba (arXiv 2401.10166) as an image classifier of transformers, which has none.

B images · C channels · H height · W width · D width of a stage · K classes
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from convert.mixers.low_rank import convolution, factor_std, kept_rank, linear
from convert.mixers.ss2d import SS2D
from convert.mixers.ss2d_lowrank import LowRankSS2D


class VMambaConfig(PreTrainedConfig):
    """Sizes of a VMamba; the defaults are those of VMamba-T (s1l8). `ssm_ratio` and `mlp_ratio`: inner widths of
    scans and MLPs over D; `time_step_rank`: rank of delta, None for a sixteenth of D.

    `rank_ratio`: None for VMamba's scan, whose decays differ by channel, state and place. Otherwise a scan has a matrix
    of `transition_rank` (None: by the ratio) as transition (DLRMamba, arXiv 2603.06920), and the matrices of blocks and
    downsampling have this share of their numbers, as two factors; 1: all of full rank."""

    model_type = "vmamba"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 4,
        num_channels: int = 3,
        hidden_sizes: list[int] | tuple[int, ...] = (96, 192, 384, 768),
        depths: list[int] | tuple[int, ...] = (2, 2, 8, 2),
        state_size: int = 1,
        ssm_ratio: float = 1.0,
        time_step_rank: int | None = None,
        mlp_ratio: float = 4.0,
        conv_bias: bool = False,
        initializer_range: float = 0.02,
        rank_ratio: float | None = None,
        transition_rank: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_sizes, self.depths = list(hidden_sizes), list(depths)
        self.state_size, self.ssm_ratio, self.time_step_rank = state_size, ssm_ratio, time_step_rank
        self.mlp_ratio, self.conv_bias, self.initializer_range = mlp_ratio, conv_bias, initializer_range
        self.rank_ratio, self.transition_rank = rank_ratio, transition_rank

    @property
    def rank_of_transition(self) -> int:
        """The rank of the transitions of a model with a `rank_ratio`."""
        if self.transition_rank is not None:
            return self.transition_rank
        return kept_rank(self.state_size, self.state_size, 1.0 if self.rank_ratio is None else self.rank_ratio)


class VSSBlock(GradientCheckpointingLayer):
    """SS2D, then an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, config: VMambaConfig) -> None:
        super().__init__()
        inner, ratio = int(config.mlp_ratio * width), config.rank_ratio
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        rank = config.time_step_rank or math.ceil(width / 16)
        sizes = width, int(config.ssm_ratio * width), config.state_size, rank, config.conv_bias
        self.mixer = SS2D(*sizes) if ratio is None else LowRankSS2D(*sizes, ratio, config.rank_of_transition)
        kept = 1.0 if ratio is None else ratio
        self.mlp = nn.Sequential(linear(width, inner, kept), nn.GELU(), linear(inner, width, kept))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        x_BHWD = x_BHWD + self.mixer(self.norm1(x_BHWD))
        return x_BHWD + self.mlp(self.norm2(x_BHWD))


class Convolution(nn.Module):
    """A convolution of [B, H, W, C] to [B, H', W', D], and a norm."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, ratio: float = 1.0) -> None:
        super().__init__()
        self.conv = convolution(channels, width, kernel, stride, 1, ratio)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(self.conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VMambaStage(nn.Module):
    """Blocks of one width, behind a convolution that halves the sides (but in the first stage)."""

    def __init__(self, config: VMambaConfig, number: int) -> None:
        super().__init__()
        width, kept = config.hidden_sizes[number], 1.0 if config.rank_ratio is None else config.rank_ratio
        self.downsample = Convolution(config.hidden_sizes[number - 1], width, 3, 2, kept) if number else nn.Identity()
        self.blocks = nn.Sequential(*(VSSBlock(width, config) for _ in range(config.depths[number])))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        return self.blocks(self.downsample(x_BHWD))


class VMambaForImageClassification(PreTrainedModel):
    """Two convolutions, stages of blocks, the mean over places, a linear classifier."""

    config_class = VMambaConfig
    base_model_prefix = "vmamba"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__(config)
        if not config.depths or len(config.depths) != len(config.hidden_sizes) or config.patch_size % 2:
            raise ValueError(
                f"A VMamba has a width for each stage, and patches of an even size; got depths {config.depths},"
                f" hidden_sizes {config.hidden_sizes} and patch_size {config.patch_size}."
            )
        if config.rank_ratio is not None and not (
            0 < config.rank_ratio <= 1 and 1 <= config.rank_of_transition <= config.state_size
        ):
            raise ValueError(
                "A VMamba of low rank has a rank_ratio above 0 and at most 1, and a transition_rank within 1 and its"
                f" state_size, {config.state_size}; got {config.rank_ratio} and {config.transition_rank}."
            )
        first, stride = config.hidden_sizes[0], config.patch_size // 2
        self.embed = nn.Sequential(
            Convolution(config.num_channels, first // 2, stride + 1, stride),
            nn.GELU(),
            Convolution(first // 2, first, stride + 1, stride),
        )
        self.stages = nn.ModuleList(VMambaStage(config, number) for number in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.hidden_sizes[-1])
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=factor_std(module, self.config.initializer_range))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SS2D | LowRankSS2D):
            module.start()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, K] of images [B, C, H, W], their cross-entropy with labels [B] if there are any, and if asked the
        output [B, D, H', W'] of the embedding and each stage."""
        hidden = [self.embed(pixel_values.permute(0, 2, 3, 1))]
        for stage in self.stages:
            hidden.append(stage(hidden[-1]))
        logits = self.classifier(self.norm(hidden[-1]).mean((1, 2)))
        maps = tuple(state.permute(0, 3, 1, 2) for state in hidden)
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=maps if output_hidden_states else None,
        )


AutoConfig.register(VMambaConfig.model_type, VMambaConfig, exist_ok=True)
AutoModelForImageClassification.register(VMambaConfig, VMambaForImageClassification, exist_ok=True)
