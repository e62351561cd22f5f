"""MLP-Mixer (arXiv 2105.01601) as an image classifier of transformers, which has none.

B images · C channels · P patches · D width of a patch · K classes
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class MlpMixerConfig(PreTrainedConfig):
    """Sizes of an MLP-Mixer; the defaults are those of Mixer-B/16. `token_size` and `channel_size` are the widths of
    the MLPs over patches and over channels."""

    model_type = "mlp_mixer"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        token_size: int = 384,
        channel_size: int = 3072,
        initializer_range: float = 0.02,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.token_size, self.channel_size = token_size, channel_size
        self.initializer_range = initializer_range


def _mlp(size: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))


class MlpMixerLayer(GradientCheckpointingLayer):
    """An MLP over the patches of each channel, then one over the channels of each patch."""

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.token_norm, self.channel_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.token_mlp = _mlp(num_patches, config.token_size)
        self.channel_mlp = _mlp(config.hidden_size, config.channel_size)

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self.token_mlp(self.token_norm(x_BPD).transpose(1, 2)).transpose(1, 2)
        return x_BPD + self.channel_mlp(self.channel_norm(x_BPD))


class MlpMixerForImageClassification(PreTrainedModel):
    """Patches, layers, the mean over patches, a linear classifier."""

    config_class = MlpMixerConfig
    base_model_prefix = "mixer"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.layers = nn.ModuleList(MlpMixerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, K] of images [B, C, H, W], their cross-entropy with labels [B] if there are any, and if asked the
        output [B, P, D] of the embedding and each layer."""
        hidden = [self.patches(pixel_values).flatten(2).transpose(1, 2)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]))
        logits = self.classifier(self.norm(hidden[-1]).mean(1))
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )


AutoConfig.register(MlpMixerConfig.model_type, MlpMixerConfig, exist_ok=True)
AutoModelForImageClassification.register(MlpMixerConfig, MlpMixerForImageClassification, exist_ok=True)
