"""A network of diffscale as a model of diffusers: its settings are config.json, its weights safetensors."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffscale.models.layers import Backbone

Architecture: type[nn.Module] = Backbone  # the exported file has the run's own


class Network(ModelMixin, ConfigMixin):
    """The architecture under the name `backbone`."""

    @register_to_config
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = Architecture(**settings)
        self.num_classes = settings["num_classes"]

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (prediction, state), as `Backbone` documents."""
        return self.backbone(x_in, logsnr, label, state)
