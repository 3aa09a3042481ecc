"""Generate, extract features, compare: distances between the samples of a run and its data that can be trusted."""

from diffscale.evaluation.evaluator import Evaluation, Evaluator, make_evaluator
from diffscale.evaluation.metrics.registry import Measurement, parse_metric
from diffscale.evaluation.sampling import ModelSource, Sampling

__all__ = ["Evaluation", "Evaluator", "Measurement", "ModelSource", "Sampling", "make_evaluator", "parse_metric"]
