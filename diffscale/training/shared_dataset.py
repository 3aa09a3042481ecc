"""Opens the training data of a run once for all ranks: rank 0 asks the storage, the others receive the manifest.

Were every rank to list and to read, the start of a large run would be as many requests as it has ranks times shards.
"""

from __future__ import annotations

from diffscale.config.experiment import Experiment
from diffscale.config.factory import open_training_data
from diffscale.core.errors import UserError
from diffscale.data import Dataset, ShardCache
from diffscale.data.format.manifest import Manifest
from diffscale.training.parallel import World


def open_for_ranks(experiment: Experiment, world: World, content_hash: str | None = None) -> Dataset:
    """Open the dataset of `data.path` on every rank (a collective call); rank 0 alone checks its files.

    content_hash: what the command found, or None. Raises UserError if the dataset has changed since then: its run has
        another identity.
    """
    opened = open_training_data(experiment) if world.rank == 0 else None
    if opened is not None and content_hash is not None and opened.content_hash != content_hash:
        raise UserError(
            setting="data.path",
            value=experiment.data.path,
            expected=f"the dataset with the content hash {content_hash}, with which the command started",
            reason=f"the dataset was replaced since then; its content hash is {opened.content_hash}",
            fix="start the command again once the dataset is complete",
        )
    if world.size == 1 and opened is not None:
        return opened
    sent = None
    if opened is not None and type(opened) is Dataset:  # tables have no manifest on disk: each rank opens them
        sent = opened.path, opened.manifest.model_dump_json()
    sent = world.from_first(sent)
    if opened is not None:
        return opened
    if sent is None:
        return open_training_data(experiment)
    cache = ShardCache(experiment.data.cache, experiment.data.cache_gigabytes)
    return Dataset.of_manifest(sent[0], Manifest.model_validate_json(sent[1]), cache=cache)
