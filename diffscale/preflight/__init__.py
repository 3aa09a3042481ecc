"""The checks of `python -m diffscale.doctor`: facts gathered on each node, and the findings that follow from them."""
