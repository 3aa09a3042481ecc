"""A small autoencoder with random weights, saved by diffusers as its users save theirs."""

from __future__ import annotations

from pathlib import Path

import torch


def save_autoencoder(folder: Path, channels: int = 4, seed: int = 0, **config: object) -> Path:
    """Write an AutoencoderKL that makes one latent of 2 x 2 pixels, and return its folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=channels,
        **config,
    )
    network.save_pretrained(folder)
    return folder
