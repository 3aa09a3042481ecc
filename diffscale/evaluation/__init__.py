"""Generate, extract features, compare: distances between the samples of a run and its data that can be trusted."""

from diffscale.evaluation.evaluator import Evaluation, Evaluator
from diffscale.evaluation.image_sources import ModelSource, Sampling
from diffscale.evaluation.metrics.registry import Measurement, parse_metric

__all__ = ["Evaluation", "Evaluator", "Measurement", "ModelSource", "Sampling", "parse_metric"]
