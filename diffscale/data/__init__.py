"""Arrow datasets of images: built once, read at memory speed, in an order that is a function of (seed, position)."""

from diffscale.data.format.cache import ShardCache
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.format.hf_choices import Choices
from diffscale.data.format.open import open_dataset, resolve
from diffscale.data.loading import create_loader, even_share, share_of_batch
from diffscale.data.loading.loader import Batch, Loader
from diffscale.data.loading.order import positions_to_indices

__all__ = [
    "Batch",
    "Choices",
    "Dataset",
    "Loader",
    "ShardCache",
    "ShardError",
    "create_loader",
    "even_share",
    "open_dataset",
    "positions_to_indices",
    "resolve",
    "share_of_batch",
]
