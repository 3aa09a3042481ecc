"""Feature networks, their weights, and how images reach them."""
