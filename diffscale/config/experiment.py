"""The settings of one run: typed, overridable by dotted keys, validated before a run starts, and hashed.

`model`, `diffusion.schedule`, `diffusion.weighting` and `eval.solver` are unions chosen by `name`; their fields are
the keyword parameters of the classes that they build (diffscale/config/unions.py), so each is written once.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffscale.config.unions import choice, union_of
from diffscale.core.hashing import identify
from diffscale.core.storage import check_absolute, default_storage, join
from diffscale.diffusion import INTERPOLANTS, PREDICTIONS, SCHEDULES, SOLVERS, WEIGHTINGS
from diffscale.models import MODELS
from diffscale.records.schema import ADDED_LATER, Endpoint

GIVEN_BY_DATA = {"resolution", "channels", "num_classes"}

if TYPE_CHECKING:  # mypy does not see what pydantic.create_model returns
    from diffscale.config.unions import Choice as Model
    from diffscale.config.unions import Choice as Schedule
    from diffscale.config.unions import Choice as Solver
    from diffscale.config.unions import Choice as Weighting

    Interpolant: TypeAlias = str
    Prediction: TypeAlias = str
else:
    Model = union_of("model", MODELS, skip=GIVEN_BY_DATA)
    Schedule = union_of("schedule", SCHEDULES, skip={"resolution"})
    Weighting = union_of("weighting", WEIGHTINGS)
    Solver = union_of("solver", SOLVERS)
    Interpolant = Literal[tuple(INTERPOLANTS)]
    Prediction = Literal[tuple(PREDICTIONS)]


class HasClasses(Protocol):
    """A dataset, as far as the number of its classes goes."""

    @property
    def num_classes(self) -> int: ...


Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataSettings(Section):
    path: str = Field("builtin:emoji", description="dataset folder or its URI; builtin:emoji is in the package")
    resolution: int = Field(32, ge=4, description="side in pixels at which to train")
    class_conditional: bool = Field(True, description="give the model the labels")
    flip: bool = Field(True, description="mirror half of the images")
    augment: float = Field(0.0, ge=0, le=1, description="probability of EDM's non-leaking augmentations")
    order: Literal["rows", "blocks"] = Field("rows", description="permute rows, or blocks and rows within a window")
    loader: Literal["arrow", "ray_data"] = Field("arrow", description="memory map, or streaming through Ray Data")
    cache: str | None = Field(None, description="folder on each node for shards of a remote dataset")
    cache_gigabytes: float = Field(100.0, gt=0, description="the most that the cache may hold")
    decoder: str | None = Field(None, description="decoder of a dataset of latents; without one FID is refused")


class DiffusionSettings(Section):
    schedule: Schedule = Field(choice("simple_cosine"), description="logsnr as a function of t")
    interpolant: Interpolant = Field("vp", description="logsnr to (alpha, sigma)")
    prediction: Prediction = Field("v", description="quantity that the network predicts")
    weighting: Weighting = Field(choice("min_snr"), description="weight of the loss over logsnr")
    input_scale: float = Field(1.0, gt=0, description="Chen's b: images are multiplied by it")
    input_range: Literal["-1,1", "0,1"] = Field("-1,1", description="range of the images given to the network")
    input_std: Literal["auto", "unit", "data", "image", "none"] = Field(
        "auto", description="what the noisy input is divided by"
    )
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data, for EDM's preconditioning")
    multiscale_loss: bool = Field(False, description="simple diffusion's loss over average-pooled errors (512 and up)")
    discrete: bool = Field(False, description="train on the schedule's own steps: ddpm_linear, iddpm_cosine")
    variance: Literal["fixed", "learned_range"] = Field(
        "fixed", description="learned_range: a network with twice the channels learns it (iDDPM); needs discrete"
    )
    vlb_weight: float = Field(0.001, ge=0, description="of the variational bound in the loss, if variance is learned")
    stratified: bool = Field(True, description="spread the noise levels evenly over the global batch")
    label_drop: float = Field(0.1, ge=0, le=1, description="share of labels left out, for classifier-free guidance")
    self_condition: float = Field(0.9, ge=0, le=1, description="share of samples with carried state (RIN)")


class OptimSettings(Section):
    name: str = Field("adamw", description="optimizer, by timm's name: adamw, lamb, muon, ...")
    lr: float = Field(2e-4, gt=0, description="learning rate at its highest")
    betas: tuple[float, float] = Field((0.9, 0.99), description="momentum of gradient and of its square")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="never on norms, biases and embeddings")
    clip_grad_norm: float | None = Field(1.0, gt=0, description="longest gradient; null does not clip")
    schedule: Literal["constant", "inverse_sqrt", "cosine"] = Field("constant", description="after the warm-up")
    warmup_images: int = Field(0, ge=0, description="images over which the learning rate rises from zero")
    reference_images: int = Field(1_000_000, gt=0, description="images after which inverse_sqrt begins to fall")
    cosine_rate: float = Field(
        1.0, gt=0, le=1, description="share of the half wave that cosine runs through (RIN: 0.7 to 0.8)"
    )
    decay_images: int = Field(0, ge=0, description="linear decay to zero over the last images (a decay branch)")


class EmaSettings(Section):
    halflife_images: int | None = Field(None, gt=0, description="constant half-life in images")
    halflife_fraction: float | None = Field(0.05, gt=0, lt=1, description="half-life as a share of the images seen")
    ramp: float | None = Field(
        0.05, gt=0, le=1, description="share of the images seen that halflife_images is limited to; null: no limit"
    )
    power: tuple[float, ...] = Field((), description="EDM2's relative widths to track for post-hoc EMA: 0.05, 0.10")


class CheckpointSettings(Section):
    every_images: int | None = Field(None, gt=0, description="null: at every evaluation point and every 10 minutes")
    keep_last: int = Field(2, ge=1, description="newest ones kept")
    keep_best: int = Field(1, ge=0, description="best ones kept, by the first metric")
    keep_points: bool = Field(True, description="keep the weights at every evaluation point")


class TrainSettings(Section):
    seed: int = Field(0, ge=0)
    global_batch: int = Field(64, ge=1, description="images per optimisation step over all workers")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="images per pass on one worker; null: all at once; auto: as many as fit the GPU"
    )
    images: int | None = Field(None, gt=0, description="budget in images")
    flops: float | None = Field(None, gt=0, description="budget in training FLOPs")
    device_seconds: float | None = Field(None, gt=0, description="budget in seconds times devices")
    wall_seconds: float | None = Field(
        None, gt=0, description="seconds after which to write a checkpoint and exit (resumable)"
    )
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = Field(
        "auto", description="of matrix products; auto: bf16 if the device has instructions for it, else fp32"
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile of each block; auto: large networks on a GPU"
    )
    exact: bool = Field(
        True, description="on a GPU the same steps give the same weights to the bit; false: the fastest algorithms"
    )
    channels_last: bool | Literal["auto"] = Field("auto", description="memory format; auto: networks of convolutions")
    winograd: bool | Literal["auto"] = Field(
        "auto", description="3 x 3 convolutions by Winograd's algorithm on a CPU; auto: if channels_last is auto too"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations of each block")
    workers: int | tuple[int, int] = Field(1, description="Ray Train workers, or (fewest, most) for an elastic run")
    cpus_per_worker: int = Field(1, ge=1)
    gpu: bool | Literal["auto"] = Field("auto", description="one GPU for each worker, if the cluster has GPUs")
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    max_failures: int = Field(8, ge=-1, description="restarts after a lost worker; -1: no limit")
    nonfinite_limit: int = Field(10, ge=1, description="skipped steps in a row after which the run stops")
    init_from: str | None = Field(None, description="run or checkpoint at whose weights to begin (fine-tuning)")
    init_skip: tuple[str, ...] = Field((), description="patterns of weights that begin at random instead")
    init_weights: str | None = Field(None, description="hash of the weights of init_from; filled in")
    ema: EmaSettings = EmaSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log_every_images: int | None = Field(None, gt=0, description="null: every 50 steps")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    price_per_device_hour: float | None = Field(None, ge=0)

    @property
    def pass_images(self) -> int | None:
        """Images per pass on one worker, None for all at once. training/fit.py replaces "auto" before it is asked."""
        if self.micro_batch == "auto":
            raise ValueError("train.micro_batch=auto has not been replaced by a number")
        return self.micro_batch

    @property
    def min_workers(self) -> int:
        """Fewest workers with which the run trains."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers with which the run trains."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class EvalSettings(Section):
    metrics: tuple[str, ...] = Field(("fd_efficientnet_lite0",), description="fid, kid, fd_<network>, precision, ...")
    n_generated: int = Field(1024, ge=0, description="generated images for each evaluation; 0 does not evaluate")
    n_reference: int | None = Field(None, ge=2, description="reference images; null: all of the training set")
    n_heldout: int | None = Field(None, ge=0, description="held-out images to compare with too; null: all, 0: none")
    points: tuple[Fraction, ...] = Field((0.0625, 0.125, 0.25, 0.5, 1.0), description="when, as shares of the budget")
    points_flops: tuple[float, ...] = Field((), description="when, in training FLOPs, besides the points")
    eval_resolution: int | None = Field(None, ge=4, description="common side for comparison; null: data.resolution")
    resize: str = Field("default", description="how images reach the network's size; named in the record")
    solver: Solver = Field(choice("dpmpp_2m", steps=20), description="sampler")
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1 is none")
    guidance_interval: tuple[float, float] | None = Field(None, description="logsnr between which to guide")
    guidance_channels: int | None = Field(None, ge=1, description="the first channels alone are guided; null: all")
    ema: str = Field("halflife", description="weights to sample from: none, halflife, or a power width such as 0.05")
    seed: int = Field(0, ge=0, description="seed of the samples")
    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="images generated at a time; auto: 64, on a GPU as many as fit its memory"
    )
    workers: Literal["auto", "training", "own"] = Field("auto", description="who evaluates during training")
    grid_images: int = Field(64, ge=0, description="images in the sample grid of each evaluation")


class Experiment(Section):
    """The settings of one run. `run_id` identifies its weights, the rest its place, length and evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="name of the run's folder")
    storage: str = Field(default_factory=default_storage, description="path or URI under which runs live")
    data: DataSettings = DataSettings()
    model: Model = Field(choice("unet"), description="backbone")
    diffusion: DiffusionSettings = DiffusionSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        train, optim = self.train, self.optim
        if train.images is None and train.flops is None and train.device_seconds is None:
            raise ValueError("train.images, train.flops or train.device_seconds must say when the run ends")
        if (optim.schedule == "cosine" or optim.decay_images) and train.images is None:
            raise ValueError("optim.schedule=cosine and optim.decay_images need train.images: the length sets the rate")
        if isinstance(train.micro_batch, int) and train.micro_batch > train.global_batch:
            raise ValueError(f"train.micro_batch is at most train.global_batch ({train.global_batch})")
        if train.ema.halflife_images is not None and train.ema.halflife_fraction is not None:
            raise ValueError("set one of train.ema.halflife_images and train.ema.halflife_fraction, the other to null")
        resolution = self.eval.eval_resolution
        if resolution is not None and resolution < self.data.resolution:
            raise ValueError(f"eval.eval_resolution is at least data.resolution ({self.data.resolution})")
        check_absolute(self.storage)
        return self

    def num_classes(self, dataset: HasClasses) -> int:
        """Return the number of classes that the model is conditioned on, 0 without labels."""
        return dataset.num_classes if self.data.class_conditional else 0

    def endpoint(self, images_seen: int) -> Endpoint:
        """Return the state of the learning rate at `images_seen` (CONTRIBUTING.md, decision 2)."""
        optim, total = self.optim, self.train.images
        if optim.schedule == "cosine" or optim.decay_images:
            assert total is not None
            if images_seen >= total:
                return "decayed"
            if optim.schedule == "cosine" or images_seen > total - optim.decay_images:
                return "mid_decay"
        return "inverse_sqrt" if optim.schedule == "inverse_sqrt" else "constant"

    def weights_settings(self) -> dict[str, Any]:
        """Return the settings that change the weights: with the data's content they determine `run_id`."""
        s = self.model_dump(mode="json")
        data = {k: s["data"][k] for k in ("resolution", "class_conditional", "flip", "augment", "order")}
        keys = ("seed", "global_batch", "precision", "compile", "channels_last", "activation_checkpointing", "ema")
        train = {k: s["train"][k] for k in keys}
        if self.train.winograd is True:
            train["winograd"] = True
        if not self.train.exact:
            train["exact"] = False
        if self.optim.schedule == "cosine" or self.optim.decay_images:
            train["images"] = s["train"]["images"]
        tree = {"data": data, "model": s["model"], "diffusion": s["diffusion"], "optim": s["optim"], "train": train}
        if self.train.init_weights is not None:
            train |= {"init_weights": s["train"]["init_weights"], "init_skip": s["train"]["init_skip"]}
        for dotted, before in ADDED_LATER.items():
            *sections, key = dotted.split(".")
            part = reduce(lambda part, section: part.get(section, {}), sections, tree)
            if key in part and part[key] == before:
                part.pop(key)
        return tree

    def run_id(self, content_hash: str) -> str:
        """Return 16 hex digits: the same for the same weights, whatever the workers, storage, evaluation or budget.

        Settings in which "auto" stands have another identity than the ones that training chooses in their place.
        """
        return identify(content_hash=content_hash, **self.weights_settings())

    def run_folder(self, content_hash: str) -> str:
        """Return the folder of the run's checkpoints, records and samples."""
        return join(check_absolute(self.storage), "runs", f"{self.name}-{self.run_id(content_hash)}")

    def dotted(self) -> dict[str, Any]:
        """Return every setting by its dotted key, as plain JSON values."""
        return _flatten(self.model_dump(mode="json"))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
