"""Arrow datasets of images: built once, read at memory speed, in an order that is a function of (seed, position)."""

from diffscale.data.builtin import resolve
from diffscale.data.cache import ShardCache
from diffscale.data.dataset import Dataset, open_dataset
from diffscale.data.errors import ShardError
from diffscale.data.loader import Batch, Loader, create_loader, even_share
from diffscale.data.order import positions_to_indices

__all__ = [
    "Batch",
    "Dataset",
    "Loader",
    "ShardCache",
    "ShardError",
    "create_loader",
    "even_share",
    "open_dataset",
    "positions_to_indices",
    "resolve",
]
