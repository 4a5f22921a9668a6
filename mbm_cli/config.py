"""The typed experiment: YAML in, checked, overridden, written out again."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from mbm_cli.data import DATASETS
from mbm_cli.documents import explain, read_yaml, show, write_yaml
from mbm_cli.errors import RequestError, did_you_mean
from mbm_cli.multipliers.names import Backward, LayerMultipliers, Multiplier, multiplier_of
from mbm_cli.shipped import shipped_text

_COUNT = 2**31 - 1  # what PyTorch takes as a size on every platform


def _whole(least: int, most: int, null: str = "", shown: str = "") -> Any:
    """Describe whole numbers in a range; ``null`` says what ``null`` means where it is allowed."""
    meaning = f"null ({null}) or " if null else ""
    return Field(ge=least, le=most, description=f"{meaning}a whole number from {least} to {shown or most}")


# A type's description completes the sentence "<field> must be ...".
Count = Annotated[int, _whole(1, _COUNT)]
Limit = Annotated[int | None, _whole(1, _COUNT, null="all")]
Steps = Annotated[int | None, _whole(1, _COUNT, null="never")]
Threads = Annotated[int | None, _whole(1, 4096, null="PyTorch's choice")]
Seed = Annotated[int, _whole(0, 2**63 - 1, shown="2^63 - 1")]
MOST_AT_ONCE = 1024  # runs that take turns
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a finite number above 0")]
Width = Annotated[float, Field(gt=0, le=100, description="a number above 0, at most 100")]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a finite number, at least 0")]
Fraction = Annotated[float, Field(ge=0, lt=1, description="a number, at least 0 and below 1")]
Switch = Annotated[bool, Field(description="true or false")]
Folder = Annotated[
    str | None, Field(min_length=1, pattern=r"^[^\x00]*$", description="null (the user's cache folder) or a folder")
]
Note = Annotated[str | None, Field(description="null or a text")]
Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$", description="auto, cpu, cuda or cuda:N, for example cuda:1")
]
InitFile = Annotated[str | None, Field(min_length=1, pattern=r"^[^\x00]*$", description="null or a file")]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$",  # a part of the run folder's name
        description="a text of at most 64 letters, digits, '.', '_' or '-' that does not begin with '.'",
    ),
]


class _Section(BaseModel):
    # Strict: 3.0, "3" and true are not whole numbers, "yes" is not a switch.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_T = TypeVar("_T")


def _read(convert: Callable[[object], _T]) -> Callable[[object], _T]:
    """Return the conversion for a value that can also be a mapping as text."""

    def read(value: object) -> _T:
        try:
            return convert(read_yaml(value, "it") if isinstance(value, str) and value.startswith("{") else value)
        except RequestError as error:
            raise ValueError(str(error)) from None

    return read


_to_multiplier, _to_backward = _read(multiplier_of), _read(Backward.of)


# Written with absolute paths, so that a run can be resumed from another folder.
MultiplierField = Annotated[
    Multiplier | LayerMultipliers, PlainValidator(_to_multiplier), PlainSerializer(lambda one: one.located)
]
BackwardField = Annotated[Backward, PlainValidator(_to_backward), PlainSerializer(lambda one: one.located)]


NETWORKS = ("lenet", "cnn3", "mlp", "resnet20")  # of mbm_cli.models.MODELS, which needs PyTorch


@dataclass(frozen=True)
class Network:
    """A network by its name, ``lenet`` or ``python:FILE.py:function``.

    Attributes:
        content: of a function, what ``mbm_cli.multipliers.code.python.read_network`` returns. It stays in its process.

    Raises:
        ValueError: not a name of a network.
    """

    name: str
    content: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.name not in NETWORKS and not (self.runs_code and self.file and self.function):
            hint = did_you_mean(self.name, NETWORKS)
            raise ValueError(f"must be {' | '.join(NETWORKS)} or python:FILE.py:function, not {show(self.name)}{hint}")

    @classmethod
    def of(cls, value: object) -> "Network":
        return value if isinstance(value, cls) else cls(value)  # type: ignore[arg-type]

    @property
    def runs_code(self) -> bool:
        """Whether a user's file is run."""
        return isinstance(self.name, str) and self.name.startswith("python:")

    @property
    def file(self) -> str:
        return self.name.removeprefix("python:").rpartition(":")[0]

    @property
    def function(self) -> str:
        return self.name.rpartition(":")[2]

    @property
    def located(self) -> str:
        """The name with the file's absolute path."""
        return f"python:{_absolute(self.file)}:{self.function}" if self.runs_code else self.name

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[type["Network"], tuple[str]]:
        return Network, (self.name,)


def _absolute(file: str) -> str:
    return os.path.abspath(os.path.expanduser(file))


def _to_dataset(value: object) -> str:
    if not isinstance(value, str) or not (value in DATASETS or (value.endswith(".npz") and "\0" not in value)):
        raise ValueError(
            f"must be {' | '.join(DATASETS)} or FILE.npz, not {show(value)}{did_you_mean(value, DATASETS)}"
        )
    return value


NetworkField = Annotated[Network, PlainValidator(Network.of), PlainSerializer(lambda one: one.located)]
DatasetField = Annotated[
    str,
    PlainValidator(_to_dataset),
    PlainSerializer(lambda name: name if name in DATASETS else _absolute(name)),
]


class DataConfig(_Section):
    """The images.

    Attributes:
        dataset: a name in `DATASETS`, or an ``.npz`` file, which `mbm_cli.data.OwnFile` describes.
        root: folder that holds ``MNIST/raw``; ``None`` is the user's cache folder.
        batch_size: images in a training step.
        eval_batch_size: images in an evaluation step; the result does not depend on it.
        train_limit: use only that many training images; ``None`` is all, and so is more than there are.
        test_limit: the same for the test images.
        validation: hold out that many of the last training images; they take the place of the test images.
        crop: shift each training image by up to that many pixels in both directions, at random.
        flip: mirror half of the training images, drawn at random.
    """

    dataset: DatasetField = "mnist"
    root: Folder = None
    batch_size: Count = 64
    eval_batch_size: Count = 1000
    train_limit: Limit = None
    test_limit: Limit = None
    validation: Annotated[int | None, _whole(1, _COUNT, null="none")] = None
    crop: Annotated[int, _whole(0, 1024)] = 0
    flip: Switch = False


class ModelConfig(_Section):
    """The network.

    Attributes:
        name: one of `NETWORKS`, or ``python:FILE.py:function``, a function that takes the shape of an image and the
            number of classes and returns a ``torch.nn.Module``.
        width: times as many channels and hidden units; for `NETWORKS` only.
        multiplier: of its convolutions: a `Multiplier`, its name or its mapping, or a mapping from layers' names,
            patterns or kinds to multipliers.
        backward: of the gradients of each layer whose multiplier is not exact: a `Multiplier` or its name, ``same``, or
            ``{input: ..., weight: ...}``.
    """

    name: NetworkField = Network("lenet")
    width: Width = 1.0
    multiplier: MultiplierField = Multiplier("mbm")
    backward: BackwardField = Backward()

    @field_validator("width")
    @classmethod
    def _belongs_to_networks(cls, value: float, info: ValidationInfo) -> float:
        if value != 1 and "name" in info.data and info.data["name"].runs_code:
            raise ValueError(
                f"is for {', '.join(NETWORKS)}; {info.data['name'].function} decides its own: leave it out"
            )
        return value

    @model_validator(mode="after")
    def _keep_meaning(self) -> Self:
        """Keep what a config meant that was written before ``backward`` existed: patterns match convolutions only."""
        if "backward" in self.model_fields_set or not isinstance(self.multiplier, LayerMultipliers):
            return self
        return self.model_copy(update={"multiplier": replace(self.multiplier, dense_patterns=False)})

    @model_serializer(mode="wrap")
    def _without_new_field(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not getattr(self.multiplier, "dense_patterns", True) and self.backward.is_exact:
            del fields["backward"]
        return fields

    @property
    def products(self) -> str:
        """All multipliers in words, for tables and lists."""
        return f"{self.multiplier}" + ("" if self.backward.is_exact else f", backward {self.backward}")

    def code(self) -> list[str]:
        """Return the names of the network and the multipliers that run a user's file."""
        named: list[Network | Multiplier] = [self.name, *self.distinct()]
        return [str(one) for one in named if one.runs_code]

    def distinct(self) -> list[Multiplier]:
        """Return each multiplier of a forward pass, then each other one of a gradient that is not exact, once."""
        gradients = [one for one in self.backward.distinct() if not one.is_exact]
        return list(dict.fromkeys([*self.multiplier.distinct(), *gradients]))


class QuantizeConfig(_Section):
    """How the scales of layers with an integer multiplier are found; other layers have none.

    Attributes:
        activations: ``max``, ``percentile`` (99.9) or ``mse``, whose ranges training averages; or ``lsq``, learned.
        weights: ``max`` or ``mse`` of the current weights, for each output channel; or ``lsq``, learned.
        calibration_images: so many of the first training images, for the scales of activations before training, and in
            the evaluation of a float run.
    """

    activations: Literal["max", "percentile", "mse", "lsq"] = "max"
    weights: Literal["max", "mse", "lsq"] = "max"
    calibration_images: Count = 1024


class OptimizerConfig(_Section):
    """The optimizer and its learning rate over time.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd``.
        lr: the highest learning rate, at the first step or at the end of the warm-up.
        weight_decay: as ``torch.optim`` defines it for that optimizer.
        warmup: the part of all steps in which the learning rate rises in a straight line; with ``linear`` the whole is
            a one-cycle schedule.
        schedule: then it falls in a straight line (``linear``) or half a cosine (``cosine``) to zero at the last step,
            or stays constant (``none``).
        momentum: for ``sgd`` only.
        nesterov: for ``sgd`` with a momentum above 0 only.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 0.001
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "none"] = "linear"
    warmup: Fraction = 0.0
    momentum: Fraction = 0.0
    nesterov: Switch = False

    @field_validator("momentum", "nesterov")
    @classmethod
    def _belongs_to_sgd(cls, value: float, info: ValidationInfo) -> float:
        # Runs only for a value that was given; a field that was itself rejected is missing from info.data.
        name = info.data.get("name", "sgd")
        if name != "sgd":
            raise ValueError(f"belongs to the optimizer sgd, not to {name}: leave it out")
        if info.field_name == "nesterov" and value and info.data.get("momentum") == 0:
            raise ValueError("needs a momentum above 0")
        return value

    @model_serializer(mode="wrap")
    def _only_own_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = serialize(self)
        return fields if self.name == "sgd" else {k: v for k, v in fields.items() if k not in ("momentum", "nesterov")}


class TrainConfig(_Section):
    """The run.

    Attributes:
        epochs: passes over the training images.
        init: file with the weights to start from, a checkpoint or a plain ``state_dict``; ``None`` draws them.
        threads: CPU threads, which decide the last bits of sums; ``None`` is PyTorch's choice, and a run records it.
        deterministic: the same seed and device give the same weights, bit for bit; can cost speed on a GPU.
        checkpoint_every: steps between two checkpoints within an epoch; ``None`` writes them at the ends of epochs.
        cuda_graph: ``auto`` replays a step as a CUDA graph where that is possible, ``off`` never does.
        matrix_units: let a GPU compute forward passes on bfloat16 matrix units, where the multiplier's products allow
            it; sums are then rounded as these units do.
        label_smoothing: of the cross-entropy that is minimised: the part of a label that all classes share.
    """

    epochs: Count = 3
    init: InitFile = None
    threads: Threads = None
    deterministic: Switch = True
    checkpoint_every: Steps = None
    # YAML 1.1 reads off as false.
    cuda_graph: Annotated[Literal["auto", "off"], BeforeValidator(lambda x: "off" if x is False else x)] = "auto"
    matrix_units: Switch = False
    label_smoothing: Fraction = 0.0


class Cluster(_Section):
    """Where the runs of a sweep are computed on Slurm: a partition, and what each lane gets of it.

    Attributes:
        partition: the cluster's default, if it has no name.
        gpus, cpus: of a lane.
        time: minutes of a lane; a run that takes longer goes on in the next.
    """

    partition: str = ""
    gpus: Annotated[int, _whole(0, 1024)] = 0
    cpus: Annotated[int, _whole(1, 4096)] = 1
    time: Annotated[int, _whole(1, _COUNT)] = 60


class Engine(BaseModel):
    """Where runs are computed, and how many at once.

    Attributes:
        jobs: processes, or lanes of a cluster.
        on: the cluster.
        at_once: runs that take turns in a process; ``None`` is one on a CPU, and up to 16 on a GPU, as many as fit.
    """

    jobs: Annotated[int, _whole(1, _COUNT)] = 1
    on: Cluster | None = None
    at_once: Annotated[int, _whole(1, _COUNT)] | None = 1

    def with_flags(self, jobs: int | None, on: str | None, at_once: str | None) -> Self:
        """Return the engine with what the command line names.

        Raises:
            RequestError: it names something else than there is.
        """
        named: dict[str, Any] = {"jobs": jobs or self.jobs, "on": cluster(on) if on else self.on}
        if at_once is not None:
            if at_once != "auto" and not (at_once.isdecimal() and 1 <= int(at_once) <= MOST_AT_ONCE):
                raise RequestError(f"--at-once {at_once}: write auto, or a number from 1 to {MOST_AT_ONCE}")
            named["at_once"] = None if at_once == "auto" else int(at_once)
        return self.model_copy(update=named)


class Config(_Section):
    """One experiment, complete: what ``config.yaml`` in a run's folder holds."""

    name: Name
    note: Note = None
    seed: Seed = 0
    device: Device = "auto"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    def flat(self) -> dict[str, Any]:
        """Return every field by its path."""
        document = self.model_dump()
        sections = {name: fields for name, fields in document.items() if isinstance(fields, dict)}
        fields = {f"{name}.{field}": value for name, section in sections.items() for field, value in section.items()}
        return {name: value for name, value in document.items() if name not in sections} | fields

    def with_model(self, **fields: Any) -> "Config":
        """Return the config with other values in ``model``; they are not checked."""
        model = self.model.model_copy(update=fields)
        if isinstance(model.multiplier, LayerMultipliers) and not model.backward.is_exact:
            # As when a config with this `backward` is read.
            model = model.model_copy(update={"multiplier": replace(model.multiplier, dense_patterns=True)})
        return self.model_copy(update={"model": model})

    def with_train(self, **fields: Any) -> "Config":
        """Return the config with other values in ``train``; they are not checked."""
        return self.model_copy(update={"train": self.train.model_copy(update=fields)})


def load(source: str, overrides: Sequence[str] = (), flags: Mapping[str, str] | None = None) -> Config:
    """Read an experiment.

    Args:
        source: path of a YAML file, or the name of a shipped config, with or without ``.yaml``; a file wins.
        overrides: ``section.field=value``, the value as YAML; a later one wins over an earlier one.
        flags: what errors call overrides of these fields, instead of ``--set``.

    Raises:
        RequestError: there is no such config, or something in it or in an override is wrong.
    """
    try:
        with open(source, encoding="utf-8-sig") as file:
            text = file.read()
    except (FileNotFoundError, IsADirectoryError):
        text = shipped_text(source)
    except UnicodeDecodeError as error:
        raise RequestError(f"config {show(source)} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"config {show(source)} cannot be read: {getattr(error, 'strerror', error)}") from None
    return validate(read_yaml(text, source), source, overrides, flags=flags)


def multiplier(name: str) -> Multiplier | LayerMultipliers:
    """Parse a multiplier's name of the command line, or ``{layer: name, default: name}`` as text.

    Raises:
        RequestError: it is neither.
    """
    try:
        return _to_multiplier(name)
    except ValueError as error:
        several = " (several at once are for mbm compare, eval and sweep)" if "," in name else ""
        raise RequestError(f"--multiplier: {error}{several}") from None


def backward(name: str) -> Backward:
    """Parse the multiplier of gradients of the command line, or ``{input: name, weight: name}`` as text.

    Raises:
        RequestError: it is neither.
    """
    try:
        return _to_backward(name)
    except ValueError as error:
        raise RequestError(f"--backward: {error}") from None


def cluster(on: str) -> Cluster | None:
    """Parse ``slurm://PARTITION?gpus=1&cpus=4&time=60`` of the command line; ``local`` means this machine.

    Raises:
        RequestError: it is neither.
    """
    if on == "local":
        return None
    with suppress(ValueError):
        url = urlsplit(on)
        fields = {name: int(value) for name, value in parse_qsl(url.query, keep_blank_values=True)}
        if (url.scheme, url.path, url.fragment) == ("slurm", "", ""):
            return Cluster.model_validate({"partition": url.netloc, **fields})
    raise RequestError(
        f"--on {on}: write local, or slurm://PARTITION?gpus=1&cpus=4&time=60, a lane's share, in minutes"
    )


def parse(text: str, where: str, overrides: Sequence[str] = (), flag: str = "--set") -> Config:
    """Check an experiment in YAML; errors call the text ``where`` and an override ``flag``. Otherwise as `load`."""
    return validate(read_yaml(text, where), where, overrides, flag)


def validate(
    document: object,
    where: str,
    overrides: Sequence[str] = (),
    flag: str = "--set",
    flags: Mapping[str, str] | None = None,
) -> Config:
    """Check an experiment given as nested mappings; otherwise as `parse` and `load`."""
    if not isinstance(document, dict):
        found = "is empty" if document is None else f"is {show(document)}"
        raise RequestError(f"{where} {found}: a config is a mapping with the fields {', '.join(Config.model_fields)}")
    overridden = [_override(document, override, flag) for override in overrides]
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        path, problem = explain(error, Config)
        set_there = any(path == one or one.startswith(f"{path}.") for one in overridden)
        raise RequestError(f"{(flags or {}).get(path, flag) if set_there else where}: {problem}") from None


def dump(config: Config) -> str:
    """Write the complete experiment as YAML, which `load` reads back as the same config."""
    return write_yaml(config.model_dump())


def _override(document: dict[str, Any], override: str, flag: str) -> str:
    """Put one ``section.field=value`` into the document; return ``section.field``."""
    path, equals, text = (part.strip() for part in override.partition("="))
    if not equals:
        raise RequestError(f"{flag} {show(override)}: write section.field=value, for example optimizer.lr=0.002")
    *sections, name = path.split(".")
    target = document
    for depth, section in enumerate(sections, 1):
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            whole = ".".join(sections[:depth])
            found = f"{whole} is {show(target)}, which has no fields"
            raise RequestError(f"{flag} {show(path)}: {found}; set it as a whole, {whole}=...")
    target[name] = read_yaml(text, f"the value of {flag} {path}")
    return path
