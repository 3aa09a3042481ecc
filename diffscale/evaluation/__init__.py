"""Draws samples, extracts features and compares them with a dataset's."""

from diffscale.evaluation.evaluator import Evaluation, Evaluator, make_evaluator
from diffscale.evaluation.metrics.registry import Measurement, parse_metric
from diffscale.evaluation.sampling import ModelSource, Sampling

__all__ = ["Evaluation", "Evaluator", "Measurement", "ModelSource", "Sampling", "make_evaluator", "parse_metric"]
