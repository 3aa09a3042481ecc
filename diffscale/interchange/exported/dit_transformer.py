"""DiTTransformer2DModel with the frequencies that DiT's authors embed the step's number with.

diffusers' class divides the exponents by one less, and has no setting for it.
"""

from diffusers import DiTTransformer2DModel


class DiT(DiTTransformer2DModel):
    @classmethod
    def from_config(cls, *args, **kwargs):
        found = super().from_config(*args, **kwargs)
        for block in (found[0] if isinstance(found, tuple) else found).transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        return found
