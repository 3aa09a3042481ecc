"""Metrics by name, and their values for stored features of samples against a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffscale.core.errors import UserError
from diffscale.core.text import nearest as nearest_name
from diffscale.evaluation.distribute import FINITE, LABELS, View
from diffscale.evaluation.feature_store import FeatureStore, select_rows
from diffscale.evaluation.metrics.distances import (
    Root,
    frechet_of_features,
    inception_score,
    kernel_distance,
)
from diffscale.evaluation.metrics.intervals import frechet_at_infinity, frechet_interval
from diffscale.evaluation.metrics.precision_recall import memorisation, nearest, precision_recall
from diffscale.evaluation.metrics.statistics import moments_of
from diffscale.evaluation.reference import Reference

KINDS = ("fd", "fd_inf", "kid", "precision", "recall", "f_score", "density", "coverage", "sfid", "is")
INCEPTION_NAMES = {"fid": "fd", "fid_inf": "fd_inf"}
ALIASES = {"inception_score": "is"}
NEIGHBOURS = KINDS[3:8]  # metrics of nearest neighbours, which need more images than neighbours
#: Fewest samples for which each kind has a value.
LEAST = {"fd": 2, "sfid": 2, "fd_inf": 30, "kid": 2, "is": 10} | dict.fromkeys(NEIGHBOURS, 6)
#: Fewest reference images.
LEAST_REFERENCE = {"fd": 2, "sfid": 2, "fd_inf": 2, "kid": 2, "is": 2} | dict.fromkeys(NEIGHBOURS, 6)
LEAST_HELDOUT = 2
#: Metrics that statistics of the reference images do not answer.
NEED_FEATURES = ("kid", *NEIGHBOURS)


@dataclass(frozen=True)
class Metric:
    """A metric: `fid` is always and only of the 2015 Inception; that of another network is `fd_<network>`.

    name: as recorded. `kid`, `precision`, ... without a network stand for Inception, `kid_<network>` for another.
    kind: one of KINDS.
    network: name of the feature network.
    """

    name: str
    kind: str
    network: str

    @property
    def outputs(self) -> tuple[str, ...]:
        return {"sfid": ("spatial",), "is": ("logits",)}.get(self.kind, ("features",))


def parse_metric(name: str) -> Metric:
    """Return the metric of a name; one with several names is recorded under the first. Raises UserError."""
    name = ALIASES.get(name, name)
    if name in INCEPTION_NAMES:
        return Metric(name, INCEPTION_NAMES[name], "inception")
    for kind in sorted(KINDS, key=len, reverse=True):
        if name == kind and kind not in ("fd", "fd_inf"):
            return Metric(name, kind, "inception")
        if name.startswith(f"{kind}_") and kind not in ("sfid", "is"):
            network = name.removeprefix(f"{kind}_")
            if network == "inception":
                expected = "fid: the Fréchet distance of Inception features has that name alone"
                raise UserError(setting="eval.metrics", value=name, expected=expected)
            return Metric(name, kind, network)
    named = [*INCEPTION_NAMES, *ALIASES, *(k for k in KINDS if not k.startswith("fd"))]
    expected = nearest_name(name, [*named, "fd_efficientnet_lite0", "fd_dinov2_vitl14", "fd_clip-vit-b-32"])
    expected += "; or fd_<network of timm>"
    raise UserError(setting="eval.metrics", value=name, expected=expected)


def recorded_name(name: str, resize: str) -> str:
    """Return the name under which a metric of the settings is recorded. resize: `eval.resize`."""
    return _with_resize(parse_metric(name).name, resize)


def _with_resize(name: str, resize: str) -> str:
    return name if resize == "default" else f"{name}_{resize}"


def check_counts(
    metrics: Iterable[Metric],
    generated: int,
    reference: int | None,
    settings: tuple[str, str] = ("eval.n_generated", "eval.n_reference"),
) -> None:
    """Raise UserError that says what a metric needs if there are too few samples or reference images for it.

    generated: samples; 0 evaluates nothing.
    reference: images; None where a file of statistics stands for them.
    settings: where the two numbers come from.
    """
    for metric in metrics:
        for setting, count, least, what in (
            (settings[0], generated, LEAST[metric.kind], "images to evaluate"),
            (settings[1], reference, LEAST_REFERENCE[metric.kind], "reference images"),
        ):
            if count is not None and count < least and generated:
                raise UserError(
                    setting=setting,
                    value=count,
                    expected=f"at least {least} {what} for {metric.name}",
                    fix="more images, or other metrics",
                )


@dataclass(frozen=True)
class Measurement:
    """One metric of one evaluation: the columns of a Record that the evaluation determines."""

    metric: str
    value: float
    network: str
    resize: str
    eval_resolution: int
    reference: str
    n_generated: int
    n_reference: int
    reference_file: str | None = None
    heldout: str | None = None
    n_heldout: int | None = None
    value_low: float | None = None
    value_high: float | None = None
    value_heldout: float | None = None
    value_native: float | None = None
    memorisation: float | None = None
    warning: str = ""

    def fields(self) -> dict[str, Any]:
        """Return the columns by name, as plain JSON values."""
        return dict(vars(self))


def measure(
    metric: Metric,
    view: View,
    generated: FeatureStore,
    reference: Reference,
    heldout: Reference | None = None,
    rows: NDArray | None = None,
    label: int | None = None,
) -> list[Measurement]:
    """Return the metric's value with its interval and warnings; `kid` and `is` have a second row, `<name>_std`.

    The value is nan if a sample is not finite, because the network diverged.

    rows, label: for one class only: the samples at these rows against the reference images of this label.
    """
    features = generated[view.column(metric.outputs[0])]
    if rows is not None:
        features = select_rows(features, rows)
    n = len(features)
    name = _with_resize(metric.name, view.resize)
    if label is not None:
        name = f"{name}[{label}]"
    n_reference = reference.n if label is None else int((reference.labels() == label).sum())
    kind, low, high, value_heldout, spread = metric.kind, None, None, None, None
    warning = _warnings(metric, features.shape[1], n, n_reference, reference)
    broken = _not_finite(generated, rows)
    if broken:
        value = math.nan
        warning = f"{broken} of {n} samples are not finite: the network diverged"
    elif kind in ("fd", "sfid"):
        output = metric.outputs[0]
        if label is None:
            root = reference.root(output)
        else:
            root = Root.of(moments_of(_class_features(reference, label, output)))
        if len(root.mean) != features.shape[1]:
            raise other_network(reference.file, view.network, features.shape[1], len(root.mean))
        value, low, high = frechet_interval(features, root)
        if heldout is not None and label is None:
            value_heldout = frechet_of_features(features, heldout.root(output))
    elif kind == "fd_inf":
        value, error = frechet_at_infinity(features, reference.root())
        low, high = value - 1.96 * error, value + 1.96 * error
    elif kind == "is":
        value, spread = inception_score(features)
    elif kind == "kid":
        value, spread = kernel_distance(features, _class_features(reference, label))
        if heldout is not None and label is None:
            value_heldout, _ = kernel_distance(features, heldout.features())
    else:
        key = (view.column(), reference.key, label)
        if key not in generated.known:
            generated.known[key] = precision_recall(features, _class_features(reference, label))
        value = getattr(generated.known[key], kind)
    made = Measurement(
        metric=name,
        value=float(value),
        network=view.recorded_network,
        resize=view.resize,
        eval_resolution=view.resolution,
        reference=reference.key,
        n_generated=n,
        n_reference=n_reference,
        value_low=_finite(low),
        value_high=_finite(high),
        value_heldout=value_heldout,
        reference_file=None if reference.file is None else reference.file.name,
        heldout=None if heldout is None else heldout.key,
        n_heldout=None if heldout is None else heldout.n,
        warning=warning,
    )
    out = [made]
    if spread is not None and label is None:
        out.append(Measurement(**made.fields() | {"metric": f"{name}_std", "value": spread, "value_heldout": None}))
    return out


def other_network(file: Path | None, network: str, need: int, have: int) -> UserError:
    """Return the refusal of statistics whose dimensions are not those of the network's features."""
    expected = f"statistics of {need} dimensions, those of {network}; it has {have}"
    return UserError(setting="reference", value=str(file), expected=expected)


LEAST_OF_CLASS = 8


def per_class(metric: Metric, view: View, generated: FeatureStore, reference: Reference) -> list[Measurement]:
    """Return `<metric>[label]` of each class with enough samples and reference images.

    `is` and `fd_inf` have no values of classes.
    """
    if metric.kind in ("is", "fd_inf"):
        return []
    ours, theirs = generated[LABELS][:], reference.labels()
    out: list[Measurement] = []
    for label in np.unique(theirs):
        rows = np.flatnonzero(ours == label)
        if min(len(rows), (theirs == label).sum()) >= LEAST_OF_CLASS:
            out += measure(metric, view, generated, reference, rows=rows, label=int(label))
    return out


def memorised(view: View, generated: FeatureStore, reference: Reference, heldout: Reference | None) -> float | None:
    """Return the share of samples nearer to a training image than 1 % of unseen images; None without features."""
    if not reference.has_features or reference.n < 3 or _not_finite(generated):
        return None
    return memorisation(generated[view.column()], reference.features(), reference.usual(heldout))


@dataclass(frozen=True)
class Nearest:
    """Samples and the reference images nearest to them in feature space, the nearest pair first."""

    samples: NDArray  # (count,) indices of samples
    rows: NDArray  # (count,) indices of reference features
    captions: list[str]  # each distance in units of usual_distance


def nearest_samples(
    view: View, generated: FeatureStore, reference: Reference, heldout: Reference | None, count: int
) -> Nearest:
    """Return the `count` samples nearest to a reference image. Raises UserError for a reference without features."""
    usual = max(reference.usual(heldout), 1e-12)
    distances, rows = nearest(generated[view.column()], reference.features())
    chosen = distances[:, 0].argsort()[:count]
    return Nearest(chosen, rows[chosen, 0], [f"{d:.2f} x usual" for d in distances[chosen, 0] / usual])


def views_of(metrics: Iterable[Metric], resolution: int, resize: str) -> dict[str, View]:
    """Return the view of each network that the metrics need, by network."""
    outputs: dict[str, set[str]] = {}
    for metric in metrics:
        outputs.setdefault(metric.network, {"features"}).update(metric.outputs)
    return {net: View(net, resolution, resize, tuple(sorted(names))) for net, names in outputs.items()}


def _class_features(reference: Reference, label: int | None, output: str = "features") -> NDArray:
    features = reference.features(output)
    return features if label is None else select_rows(features, np.flatnonzero(reference.labels() == label))


def _not_finite(generated: FeatureStore, rows: NDArray | None = None) -> int:
    """Return how many of the samples (at `rows`) are not finite."""
    if FINITE not in generated:  # images that no model drew
        return 0
    finite = generated[FINITE][:] if rows is None else generated[FINITE][rows]
    return int((finite == 0).sum())


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _warnings(metric: Metric, dim: int, n: int, n_reference: int, reference: Reference) -> str:
    found = []
    if metric.kind in ("fd", "sfid", "fd_inf"):
        if n <= dim:
            found.append(f"{n} generated images for {dim} feature dimensions: biased up, compare at this n only")
        if 0 < n_reference <= dim:
            found.append(f"{n_reference} reference images for {dim} feature dimensions")
    if metric.kind != "is" and n < n_reference:
        found.append(f"fewer generated ({n}) than reference images ({n_reference})")
    if reference.n == 0:
        found.append("the reference file does not say how many images it has")
    if reference.lossy:
        found.append("a source of the reference images was lossy (JPEG)")
    return "; ".join(found)
