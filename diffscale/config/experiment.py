"""The settings of one run: typed, with ranges, overridable by dotted keys, and hashed.

What follows from the settings alone is refused here. What needs the dataset or the network is refused by
`training/settings_check.py`, before Ray starts.

`model`, `diffusion.schedule`, `diffusion.weighting` and `eval.solver` are unions chosen by `name`; their fields are
the keyword parameters of the classes that they build (diffscale/config/unions.py), so each is written once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from diffscale.config.unions import choice, union_of
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.ranges import Images, Seed
from diffscale.core.storage import check_absolute, default_storage, join
from diffscale.diffusion import INTERPOLANTS, PREDICTIONS, SCHEDULES, SOLVERS, WEIGHTINGS
from diffscale.models import MODELS
from diffscale.records.schema import Endpoint, is_as_before

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
BatchSize = Annotated[int, Field(ge=1, le=10**7)]
Budget = Annotated[float, Field(gt=0, le=1e30)]
Level = Annotated[float, Field(ge=-1000, le=1000)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
RelativeWidth = Annotated[float, Field(ge=0.001, le=0.2886)]  # of EDM2's averages: below √(1/12)
Workers = Annotated[int, Field(ge=1, le=65_536)]
Tag = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/ -]{0,62}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataSettings(Section):
    path: str = Field(
        "builtin:emoji",
        min_length=1,
        description="dataset folder or its URI; builtin:emoji and builtin:few-emoji are in the package",
    )
    resolution: int = Field(32, ge=4, le=16_384, description="side in pixels at which to train")
    class_conditional: bool = Field(True, description="give the model the labels")
    flip: bool = Field(True, description="mirror half of the images")
    augment: float = Field(0.0, ge=0, le=1, description="probability of EDM's non-leaking augmentations")
    order: Literal["rows", "blocks", "lanes"] = Field(
        "rows",
        description="permute rows, blocks and rows within a window, or so in lanes, of which a worker has its own",
    )
    lanes: int = Field(1024, ge=1, le=65_536, description="lanes of order=lanes; the number of workers divides it")
    loader: Literal["arrow", "ray_data"] = Field("arrow", description="memory map, or streaming through Ray Data")
    cache: str | None = Field(None, min_length=1, description="folder on each node for shards of a remote dataset")
    cache_gigabytes: float = Field(100.0, gt=0, le=1e9, description="the most that the cache may hold, in GB")
    config: str | None = Field(None, min_length=1, description="configuration of a Hugging Face dataset; * joins all")
    image_column: str | None = Field(
        None, min_length=1, description="column of images of a Hugging Face dataset; null: the only one"
    )
    label_column: str | None = Field(
        None, min_length=1, description="its column of classes; null: the only one, none: no classes"
    )
    channels: Literal[1, 3] | None = Field(None, description="3: its images as RGB, 1: as grey; null: grey if all are")
    decoder: str | None = Field(
        None, min_length=1, description="autoencoder that decodes samples of latents; null: the one that encoded them"
    )


class DiffusionSettings(Section):
    schedule: Schedule = Field(choice("simple_cosine"), description="logsnr as a function of t")
    interpolant: Interpolant = Field("vp", description="logsnr to (alpha, sigma)")
    prediction: Prediction = Field("v", description="quantity that the network predicts")
    weighting: Weighting = Field(choice("min_snr"), description="weight of the loss over logsnr")
    input_scale: float = Field(1.0, ge=1e-3, le=1e3, description="Chen's b: images are multiplied by it")
    input_range: Literal["-1,1", "0,1"] = Field("-1,1", description="range of the images given to the network")
    input_std: Literal["auto", "unit", "data", "image", "none"] = Field(
        "auto", description="what the noisy input is divided by"
    )
    sigma_data: float = Field(
        0.5, ge=1e-3, le=1e3, description="standard deviation of the data, for EDM's preconditioning"
    )
    multiscale_loss: bool = Field(False, description="simple diffusion's loss over average-pooled errors (512 and up)")
    discrete: bool = Field(False, description="train on the schedule's own steps: ddpm_linear, iddpm_cosine")
    variance: Literal["fixed", "learned_range"] = Field(
        "fixed", description="learned_range: a network with twice the channels learns it (iDDPM); needs discrete"
    )
    vlb_weight: float = Field(
        0.001, ge=0, le=1e6, description="weight of the variational bound in the loss, if variance is learned"
    )
    stratified: bool = Field(True, description="spread the noise levels evenly over the global batch")
    label_drop: float = Field(0.1, ge=0, le=1, description="share of labels left out, for classifier-free guidance")
    self_condition: float = Field(
        0.9, ge=0, le=1, description="share of samples with carried state (RIN); 0: none, also in sampling"
    )


class OptimSettings(Section):
    name: str = Field("adamw", description="optimizer, by timm's name: adamw, lamb, muon, ...")
    lr: float = Field(2e-4, gt=0, le=1e30, description="learning rate at its highest")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.99), description="momentum of gradient and of its square")
    eps: float = Field(1e-8, ge=1e-30, le=1, description="added to the root of the squared gradient's average")
    weight_decay: float = Field(0.0, ge=0, le=1e6, description="strength of weight decay")
    decay_on: Literal["weights", "matrices", "all"] = Field(
        "weights",
        description="weights (no norms, biases, embeddings, positions); matrices: embeddings and positions too; all",
    )
    trust_ratio: Literal["decayed", "always"] = Field(
        "decayed", description="LAMB and LARS adapt what decays if weight_decay > 0 (timm), or at 0 too (as published)"
    )
    clip_grad_norm: float | None = Field(1.0, ge=1e-30, le=1e30, description="longest gradient; null does not clip")
    schedule: Literal["constant", "inverse_sqrt", "cosine"] = Field("constant", description="after the warm-up")
    warmup_images: int = Field(0, ge=0, le=10**15, description="images over which the learning rate rises from zero")
    reference_images: Images = Field(1_000_000, description="images after which inverse_sqrt begins to fall")
    cosine_rate: float = Field(
        1.0, gt=0, le=1, description="share of the half wave that cosine runs through (RIN: 0.7 to 0.8)"
    )
    decay_images: int = Field(
        0, ge=0, le=10**15, description="linear decay to zero over the last images (a decay branch)"
    )


class EmaSettings(Section):
    halflife_images: Images | None = Field(None, description="constant half-life in images")
    halflife_fraction: float | None = Field(0.05, gt=0, lt=1, description="half-life as a share of the images seen")
    ramp: float | None = Field(
        0.05, gt=0, le=1, description="share of the images seen that halflife_images is limited to; null: no limit"
    )
    power: tuple[RelativeWidth, ...] = Field(
        (), description="EDM2's relative widths to track for post-hoc EMA: 0.05, 0.10"
    )

    @field_validator("power")
    @classmethod
    def _distinct(cls, power: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{width:.3f}" for width in power}) < len(power):
            raise ValueError("widths that differ in their first three decimals, which name the averages")
        return power


class CheckpointSettings(Section):
    every_images: Images | None = Field(
        None, description="images between checkpoints; null: at every evaluation point and every 10 minutes"
    )
    keep_last: int = Field(2, ge=1, le=10**6, description="newest ones kept")
    keep_best: int = Field(1, ge=0, le=10**6, description="best ones kept, by the first metric")
    keep_points: bool = Field(True, description="keep the weights at every evaluation point")
    parts: int | None = Field(
        None, ge=1, le=65_536, description="workers that each write a part of replicated weights; null: one for each GB"
    )


class TrackerSettings(Section):
    project: str = Field(
        "diffscale", min_length=1, max_length=128, description="project of W&B, and the experiment of MLflow"
    )
    group: str | None = Field(None, min_length=1, max_length=128, description="group of runs in W&B; a tag in MLflow")
    tags: tuple[Tag, ...] = Field((), description="tags of the run in W&B and MLflow")
    trajectories: int = Field(
        4, ge=0, le=64, description="samples that trackers see on their way from noise to image at each evaluation"
    )


class TrainSettings(Section):
    seed: Seed = Field(0, description="seed of the weights, the order, the noise and the augmentations")
    global_batch: int = Field(64, ge=1, le=10**7, description="images per optimisation step over all workers")
    micro_batch: BatchSize | Literal["auto"] | None = Field(
        None, description="images per pass on one worker; null: all at once; auto: as many as fit the GPU"
    )
    images: Images | None = Field(None, description="budget in images")
    flops: Budget | None = Field(None, description="budget in training FLOPs")
    device_seconds: Budget | None = Field(None, description="budget in seconds times devices")
    wall_seconds: Budget | None = Field(
        None, description="seconds after which to write a checkpoint and exit (resumable)"
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
    graph: bool | Literal["auto"] = Field(
        "auto", description="record the kernels of a step as a CUDA graph; auto: on one GPU"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations of each block")
    workers: Workers | tuple[Workers, Workers] = Field(
        1, description="Ray Train workers, or (fewest, most) for an elastic run"
    )
    cpus_per_worker: int = Field(1, ge=1, le=1024, description="CPUs, and threads, of each worker")
    gpu: bool | Literal["auto"] = Field("auto", description="one GPU for each worker, if the cluster has GPUs")
    parallel: Literal["ddp", "fsdp2", "hsdp"] = Field(
        "ddp", description="every worker has all weights, or a part of them; hsdp: a part, and every node all"
    )
    reduce_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="in which gradients are summed over workers; bf16: half the traffic, for slow networks"
    )
    max_failures: int = Field(8, ge=-1, le=10**6, description="restarts after a lost worker; -1: no limit")
    nonfinite_limit: int = Field(10, ge=1, le=10**6, description="skipped steps in a row after which the run stops")
    init_from: str | None = Field(
        None, min_length=1, description="run or checkpoint at whose weights to begin (fine-tuning)"
    )
    init_skip: tuple[str, ...] = Field((), description="patterns of weights that begin at random instead")
    init_weights: str | None = Field(None, description="hash of the weights of init_from; filled in")
    ema: EmaSettings = EmaSettings()
    shard_ema: bool = Field(
        False, description="each worker keeps a part of the averages, also where it has all weights"
    )
    checkpoint: CheckpointSettings = CheckpointSettings()
    log_every_images: Images | None = Field(
        None, description="images between rows of the history; null: every 50 steps"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="where history, pictures and settings go besides the run's folder"
    )
    tracker: TrackerSettings = TrackerSettings()
    profile: bool = Field(
        False, description="write a torch profile of ten steps and a snapshot of memory to profile/ in the run's folder"
    )
    price_per_device_hour: float | None = Field(
        None, ge=0, le=1e9, description="price in any currency; with it records have a cost"
    )

    @field_validator("workers")
    @classmethod
    def _fewest_first(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(workers, int) and workers[0] > workers[1]:
            raise ValueError("(fewest, most) workers, the smaller number first")
        return workers

    @property
    def pass_images(self) -> int | None:
        """Images per pass on one worker, None for all at once. training/fit.py replaces "auto" before it is asked."""
        if self.micro_batch == "auto":
            raise ValueError("train.micro_batch=auto has not been replaced by a number")
        return self.micro_batch

    @property
    def sharded(self) -> bool:
        """Whether a worker holds a part of the weights."""
        return self.parallel != "ddp"

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
    n_generated: int = Field(
        1024, ge=0, le=10**8, description="generated images for each evaluation; 0 does not evaluate"
    )
    reference: str | None = Field(
        None,
        min_length=1,
        description="statistics to compare with: an .npz, or published ones (cifar10, imagenet64, ...); "
        "null: the training images",
    )
    n_reference: int | None = Field(
        None, ge=2, le=10**12, description="reference images; null: all of the training set"
    )
    n_heldout: int | None = Field(
        None, ge=0, le=10**12, description="held-out images to compare with too; null: all, 0: none"
    )
    points: tuple[Fraction, ...] = Field((0.0625, 0.125, 0.25, 0.5, 1.0), description="when, as shares of the budget")
    points_flops: tuple[Budget, ...] = Field((), description="when, in training FLOPs, besides the points")
    eval_resolution: int | None = Field(
        None, ge=4, le=16_384, description="common side in pixels for comparison; null: data.resolution"
    )
    resize: str = Field("default", description="how images reach the network's size; named in the record")
    solver: Solver = Field(choice("dpmpp_2m", steps=20), description="sampler")
    guidance_scale: float = Field(1.0, ge=0, le=1e3, description="strength of guidance; 1 is none")
    guidance_interval: tuple[Level, Level] | None = Field(
        None, description="lowest and highest logsnr at which to guide; null: everywhere"
    )
    guidance_channels: int | None = Field(
        None, ge=1, le=65_536, description="the first channels alone are guided; null: all"
    )
    guidance_state: Literal["shared", "own"] = Field(
        "shared", description="latents from which a pass without labels starts (RIN): the labelled pass's, or its own"
    )
    guide: str | None = Field(
        None,
        min_length=1,
        description="run or checkpoint of a weaker network that guides instead of the unlabelled one (autoguidance)",
    )
    guide_ema: str | None = Field(
        None, coerce_numbers_to_str=True, description="its weights; null: those that its run is evaluated with"
    )
    guide_weights: str | None = Field(None, description="hash of the guide's checkpoint and weights; filled in")
    ema: str = Field(
        "halflife",
        coerce_numbers_to_str=True,
        description="weights to sample from: none, halflife, or a power width such as 0.05",
    )
    seed: Seed = Field(0, description="seed of the samples")
    batch: BatchSize | Literal["auto"] = Field(
        "auto", description="images generated at a time; auto: 64, on a GPU as many as fit its memory"
    )
    workers: Literal["auto", "training", "own"] = Field("auto", description="who evaluates during training")
    devices: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="GPUs, or CPU workers, of workers=own; null: 1, and all for the evaluate command",
    )
    grid_images: int = Field(64, ge=0, le=10**4, description="images in the sample grid of each evaluation")

    @field_validator("guidance_interval")
    @classmethod
    def _lowest_first(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError("(lowest, highest) logsnr, the smaller number first")
        return interval


class Experiment(Section):
    """The settings of one run. `run_id` identifies its weights, the rest its place, length and evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="name of the run's folder")
    storage: str = Field(default_factory=default_storage, min_length=1, description="path or URI under which runs live")
    data: DataSettings = DataSettings()
    model: Model = Field(choice("unet"), description="backbone")
    diffusion: DiffusionSettings = DiffusionSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        train, optim, evaluation = self.train, self.optim, self.eval
        if train.images is None and train.flops is None and train.device_seconds is None:
            raise ValueError("train.images, train.flops or train.device_seconds must say when the run ends")
        if (optim.schedule == "cosine" or optim.decay_images) and train.images is None:
            raise ValueError("optim.schedule=cosine and optim.decay_images need train.images: the length sets the rate")
        if train.ema.halflife_images is not None and train.ema.halflife_fraction is not None:
            raise ValueError("set one of train.ema.halflife_images and train.ema.halflife_fraction, the other to null")
        batch = f"at most {train.global_batch}, the images of train.global_batch"
        if isinstance(train.micro_batch, int) and train.micro_batch > train.global_batch:
            raise UserError(setting="train.micro_batch", value=train.micro_batch, expected=batch)
        if train.max_workers > train.global_batch:
            raise UserError(setting="train.workers", value=train.workers, expected=f"{batch}: one for each worker")
        self._refuse_workers_without_lanes()
        resolution = evaluation.eval_resolution
        if resolution is not None and resolution < self.data.resolution:
            raise UserError(
                setting="eval.eval_resolution",
                value=resolution,
                expected=f"at least data.resolution ({self.data.resolution})",
            )
        if evaluation.guide is not None and evaluation.guidance_scale == 1:
            raise UserError(
                setting="eval.guide",
                value=evaluation.guide,
                expected="an eval.guidance_scale other than 1, with which a guide has no effect",
            )
        labelled = self.data.class_conditional and self.diffusion.label_drop
        if evaluation.guidance_scale != 1 and evaluation.guide is None and not labelled:
            raise UserError(
                setting="eval.guidance_scale",
                value=evaluation.guidance_scale,
                expected="1 for a network without labels, or that always sees them",
                reason="classifier-free guidance compares the network with and without its label",
                fix="data.class_conditional=true and a diffusion.label_drop above 0, or eval.guide=RUN",
            )
        self._refuse_network_without_input()
        check_absolute(self.storage)
        return self

    def _refuse_workers_without_lanes(self) -> None:
        """Raise UserError for a possible number of workers that does not divide the lanes of the order."""
        from diffscale.data.loading.lanes import check_workers  # import cost

        if self.data.order == "lanes":
            for workers in range(self.train.min_workers, self.train.max_workers + 1):
                check_workers(self.train.global_batch, workers, self.data.lanes)

    def _refuse_network_without_input(self) -> None:
        """Raise UserError for a network that lacks an input or an output which another setting needs."""
        from diffscale.data.loading.augment import LABEL_SIZE  # import cost

        model = self.model
        if self.data.augment and getattr(model, "augment_dim", 0) != LABEL_SIZE:
            raise UserError(
                setting="data.augment",
                value=self.data.augment,
                expected="0 for this model",
                reason="a model without augmentation labels would reproduce the augmentations in its samples",
                fix=f"model.augment_dim={LABEL_SIZE} (unet and hdit have it)",
            )
        if self.diffusion.weighting.name == "learned_uncertainty" and model.name != "edm2":
            raise UserError(
                setting="diffusion.weighting.name",
                value="learned_uncertainty",
                expected="another weighting for this model",
                reason=f"{model.name} has no head that learns the uncertainty; edm2 has one",
            )

    def num_classes(self, dataset: HasClasses) -> int:
        """Return the number of classes that the model is conditioned on, 0 without labels."""
        return dataset.num_classes if self.data.class_conditional else 0

    @property
    def carries_state(self) -> bool:
        """Whether the network takes over latents from an earlier pass (RIN's self-conditioning)."""
        return bool(getattr(self.model, "self_conditioning", False)) and self.diffusion.self_condition > 0

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
        if self.data.order == "lanes":
            data["lanes"] = s["data"]["lanes"]
        keys = ("seed", "global_batch", "precision", "compile", "channels_last", "activation_checkpointing", "ema")
        train = {k: s["train"][k] for k in keys}
        if self.train.winograd is True:
            train["winograd"] = True
        if not self.train.exact:
            train["exact"] = False
        if self.train.reduce_precision != "fp32":
            train["reduce_precision"] = self.train.reduce_precision
        if self.optim.schedule == "cosine" or self.optim.decay_images:
            train["images"] = s["train"]["images"]
        if self.train.init_weights is not None:
            train |= {"init_weights": s["train"]["init_weights"], "init_skip": s["train"]["init_skip"]}
        tree = {"data": data, "model": s["model"], "diffusion": s["diffusion"], "optim": s["optim"], "train": train}
        return _as_identified(tree)

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


def _as_identified(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leave out the settings that came later and are at the default that changes nothing."""
    return {
        key: _as_identified(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if not is_as_before(f"{prefix}{key}", value)
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
