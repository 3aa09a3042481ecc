"""Training: the learner (no Ray) and what makes it last: EMA, checkpoints, parallel workers, health, history."""
