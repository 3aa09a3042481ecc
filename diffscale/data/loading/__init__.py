"""Order, augmentation and loading of training batches."""
