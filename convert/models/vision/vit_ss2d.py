"""A vision transformer of transformers whose attention is SS2D (VMamba's mixer, arXiv 2401.10166), as an image
classifier.

B images · T tokens · S of them special (CLS, DeiT's distillation token) · H x W patches · D width · K classes
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DeiTForImageClassification,
    IJepaForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTForImageClassification,
    ViTMSNForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from convert.mixers.ss2d import SS2D

# families with one width and one grid of patches, whose blocks have the same parts
HOSTS = {
    "vit": ViTForImageClassification,
    "deit": DeiTForImageClassification,
    "vit_msn": ViTMSNForImageClassification,
    "ijepa": IJepaForImageClassification,
}
# what the configurations of all of them say, beside what attention alone needs
OF_HOST = (
    "image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "layer_norm_eps", "initializer_range",
)  # fmt: skip


class ViTSS2DConfig(PreTrainedConfig):
    """Sizes; the defaults are those of ViT-B/16. `family`: the vision transformer around the mixers. `state_size`,
    `ssm_ratio` (inner width over D) and `time_step_rank` (of delta, None for a sixteenth of D): of SS2D."""

    model_type = "vit_ss2d"

    def __init__(
        self,
        family: str = "vit",
        image_size: int | list[int] | tuple[int, int] = 224,
        patch_size: int | list[int] | tuple[int, int] = 16,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        state_size: int = 8,
        ssm_ratio: float = 1.0,
        time_step_rank: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.family = family
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.intermediate_size, self.hidden_act = intermediate_size, hidden_act
        self.hidden_dropout_prob, self.layer_norm_eps = hidden_dropout_prob, layer_norm_eps
        self.initializer_range = initializer_range
        self.state_size, self.ssm_ratio, self.time_step_rank = state_size, ssm_ratio, time_step_rank

    def host(self) -> PreTrainedConfig:
        """The configuration of the vision transformer, whose attention is never used."""
        fields = {name: getattr(self, name) for name in OF_HOST}
        return AutoConfig.for_model(self.family, **fields, num_attention_heads=1, num_labels=self.num_labels)


class TokenSS2D(nn.Module):
    """SS2D where a vision transformer's block expects its attention: the patches are scanned on their grid.

    Special tokens have no place on it. What they say is added to the input of every place, through a linear map that is
    0 at the start; each receives a linear map of its own of the mean over places of what SS2D puts out (ours)."""

    def __init__(self, config: ViTSS2DConfig, grid: tuple[int, int], special: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.grid, self.special = grid, special
        rank = config.time_step_rank or -(-width // 16)
        self.mixer = SS2D(width, max(1, int(config.ssm_ratio * width)), config.state_size, rank)
        if special:
            self.to_places = nn.Linear(special * width, width, bias=False)
            self.from_places = nn.Linear(width, special * width)

    def start(self) -> None:
        """VMamba's start, where it differs from the host's, which is that of all linear maps."""
        self.mixer.conv.reset_parameters()
        self.mixer.start()
        if self.special:
            nn.init.zeros_(self.to_places.weight)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """A block's norm of its input [B, T, D] -> what is added to that input, and no weights of attention. The other
        arguments are those of attention: images have no mask."""
        special, places = hidden_states.split([self.special, self.grid[0] * self.grid[1]], 1)
        if self.special:
            places = places + self.to_places(special.flatten(1))[:, None]
        y = self.mixer(places.unflatten(1, self.grid)).flatten(1, 2)
        if self.special:
            y = torch.cat((self.from_places(y.mean(1)).unflatten(1, (self.special, -1)), y), 1)
        return y, None


class ViTSS2DForImageClassification(PreTrainedModel):
    """A vision transformer with SS2D in each block. All but the mixers is the host's, by the host's names."""

    config_class = ViTSS2DConfig
    base_model_prefix = "host"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: ViTSS2DConfig) -> None:
        super().__init__(config)
        if config.family not in HOSTS:
            raise ValueError(f"The family of a vit_ss2d is one of {', '.join(HOSTS)}; got {config.family!r}.")
        self.host = HOSTS[config.family](config.host())
        embeddings = self.host.base_model.embeddings
        patches = embeddings.patch_embeddings
        height, width = (side // patch for side, patch in zip(patches.image_size, patches.patch_size, strict=True))
        special = embeddings.position_embeddings.shape[1] - height * width
        for block in self.blocks:
            block.attention = TokenSS2D(config, (height, width), special)
        self.post_init()  # by which the host draws what it knows, also in the mixers
        for mixer in self.slots().values():
            mixer.start()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # there is nothing beside the host

    @property
    def blocks(self) -> nn.ModuleList:
        return self.host.base_model.layers

    def slots(self) -> dict[int, TokenSS2D]:
        """Layer -> what stands where its attention was."""
        return {layer: block.attention for layer, block in enumerate(self.blocks)}

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, K] of images [B, C, height, width], their cross-entropy with labels [B] if there are any, and if
        asked the output [B, T, D] of the embedding and each block."""
        found = self.host(pixel_values, output_hidden_states=output_hidden_states)
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else cross_entropy(found.logits, labels),
            logits=found.logits,
            hidden_states=found.hidden_states,
        )


AutoConfig.register(ViTSS2DConfig.model_type, ViTSS2DConfig, exist_ok=True)
AutoModelForImageClassification.register(ViTSS2DConfig, ViTSS2DForImageClassification, exist_ok=True)
