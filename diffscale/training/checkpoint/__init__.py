"""Checkpoints: layout on disk, tensor files, optimizer state, saving in the background."""
