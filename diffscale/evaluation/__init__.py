"""Generate, extract features, compare: distances between the samples of a run and its data that can be trusted."""

from diffscale.evaluation.evaluator import Evaluation, Evaluator
from diffscale.evaluation.metrics import Measurement, parse_metric
from diffscale.evaluation.sources import ModelSource, Sampling

__all__ = ["Evaluation", "Evaluator", "Measurement", "ModelSource", "Sampling", "parse_metric"]
