"""What `python -m diffscale.doctor` checks: facts gathered on each node, and what they mean."""
