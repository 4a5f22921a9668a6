"""A run's folder: create it, write each file whole or not at all, list the folders, read them back."""

import difflib
import errno
import fcntl
import io
import json
import os
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mbm_cli import config as configs
from mbm_cli.errors import Interrupted, RequestError, RunError

RESULTS = ("profile.json", "characterize.json", "eval.json")  # what commands leave that train nothing
PATIENCE = 1.0  # seconds for whoever looks at a run, or is just ending, to let go of it


class Fields(BaseModel):
    """What a file must have to be worth reading; it may have more."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)


Some = TypeVar("Some", bound=Fields)
Count = Annotated[int, Field(strict=True, ge=1)]


class Summary(Fields):
    """``summary.json``: accuracies are fractions, times seconds."""

    status: Literal["running", "completed", "interrupted", "failed"]
    multiplier: str
    device: str
    epochs: int
    test_accuracy: float | None
    best_test_accuracy: float | None
    epoch_seconds: list[float]
    train_seconds: list[float]
    total_seconds: float


class Environment(Fields):
    """``environment.json``: what going on with a run depends on."""

    threads: Count | None = None


class EpochMetrics(Fields):
    """A line of ``metrics.jsonl``."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    epoch_seconds: float
    train_seconds: float
    eval_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Run:
    """A run's folder and the files in it; runs/README.md says what each holds."""

    folder: Path

    @classmethod
    def create(cls, output: Path, name: str, files: Mapping[str, str] | None = None) -> "Run":
        """Make a folder of its own, ``<UTC time>-<name>-<short id>``, below ``output``.

        Args:
            files: texts by file name; the folder is seen with all of them in it or not at all.

        Raises:
            RunError: the folder cannot be made.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = output / f"{stamp}-{name}-{secrets.token_hex(2)}"
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}-", ignore_cleanup_errors=True) as temporary:
                for file, text in (files or {}).items():
                    cls(Path(temporary)).write(file, text)
                os.chmod(temporary, 0o755)
                if folder.exists():  # the id of another run of this second
                    return cls.create(output, name, files)
                os.rename(temporary, folder)
        except FileExistsError:
            raise RunError(f"cannot make a run folder: {output} is a file; name another with --output") from None
        except OSError as error:
            raise RunError(
                f"cannot make the run folder {folder} ({error.strerror}): name another with --output"
            ) from error
        return cls(folder)

    @classmethod
    def find(cls, name: str, output: Path) -> "Run":
        """The run at a path, or of that name or short id below ``output``.

        Raises:
            RequestError: there is none, or there are several of that id.
        """
        for folder in (Path(name), output / name):
            if os.path.isfile(folder / "summary.json"):  # also where nobody may look: there is none, then
                return cls(folder.resolve() if folder.name == "" else folder)
            result = next((file for file in RESULTS if os.path.isfile(folder / file)), None)
            if result is not None:
                raise RequestError(f"{folder} is no training run: its result is in {result}")
        of_id = [folder for folder in _folders(output) if folder.name.endswith(f"-{name}")]
        if len(of_id) > 1:
            raise RequestError(
                f"{len(of_id)} runs in {output} end with {name!r}, for example {of_id[0].name}: name one"
            )
        if of_id:
            return cls.find(of_id[0].name, output)
        near = difflib.get_close_matches(name, [run.name for run in list_runs(output)], n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ": mbm runs list shows those there are"
        raise RequestError(f"no run {name!r}, neither as a path nor in {output}{hint}")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def has_several(self) -> bool:
        """Whether it is a comparison or a sweep."""
        return (self.folder / "plan.json").exists()

    def refuse_several(self) -> None:
        """Where one training run is needed, a comparison's or a sweep's folder is not one.

        Raises:
            RequestError: this is such a folder.
        """
        if self.has_several:
            example = next((f", for example {run.folder}" for run in list_runs(self.folder)), "")
            raise RequestError(f"{self.folder} holds several runs: name one of them{example}")

    @contextmanager
    def kept_if_complete(self) -> Iterator[None]:
        """What is interrupted or fails before its end leaves no folder."""
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, Interrupted):
                raise Interrupted("interrupted; nothing was kept of it") from None
            raise

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file whole or not at all: under a temporary name first, then renamed.

        Raises:
            RunError: the folder cannot be written.
        """
        data = content.encode() if isinstance(content, str) else content
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f".{name}-", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.chmod(file.name, 0o644)
                    os.replace(file.name, self.folder / name)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise RunError(
                f"cannot write {self.folder / name} ({error.strerror}): free space or name --output"
            ) from error

    def write_json(self, name: str, value: object) -> None:
        self.write(name, as_json(value))

    def write_metrics(self, epochs: list[dict[str, Any]]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def write_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def config_text(self) -> str:
        """The experiment as YAML.

        Raises:
            RunError: it cannot be read, or does not end with a line's end: what was cut off would get its default.
        """
        text = self._read("config.yaml")
        if not text.endswith("\n"):
            raise RunError(f"{self.folder / 'config.yaml'} is damaged (its last line has no end)")
        return text

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds; a run that nobody computes any more is ``stopped`` and not ``running``.

        Raises:
            RunError: it cannot be read, or a field is missing or wrong.
        """
        summary = self._checked("summary.json", self.read_json("summary.json"), Summary)
        if summary["status"] == "running" and not self._is_held():
            summary["status"] = "stopped"
        return summary

    def check(self) -> None:
        """Read every file that a command may need.

        Raises:
            RunError, RequestError: one of them is missing or damaged, or contradicts another; it is named.
        """
        self.summary()
        # With a multiplier that no file is read for.
        configs.parse(self.config_text(), str(self.folder / "config.yaml"), ["model.multiplier=exact"])
        self.environment()
        metrics, checkpoint = self.metrics(), self.checkpoint()
        # As text, where NaN equals itself. Killed between the two, a run has the metrics of an epoch less.
        if checkpoint is not None and as_json(metrics) != as_json(checkpoint["metrics"][: len(metrics)]):
            raise RunError(f"{self.folder / 'metrics.jsonl'} is damaged (checkpoint.pt has other metrics)")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one who computes this run; whoever is killed holds it no more, and what it left half-written goes.

        Raises:
            RequestError: another process does.
        """
        with self._opened() as folder:
            patience = time.monotonic() + PATIENCE
            while not self._lock(folder):
                if time.monotonic() > patience:
                    raise RequestError(f"{self.folder} is being computed by another process: wait for it")
                time.sleep(0.01)
            for path in self.folder.glob(".*-*"):
                with suppress(OSError):  # the folder of a run that was not even made, or nothing may be written here
                    path.unlink()
            yield

    @staticmethod
    def _lock(folder: int) -> bool:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        return True

    def _is_held(self) -> bool:
        try:
            with self._opened() as folder:
                fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The folder itself is what is locked: no file of its own is needed."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def texts(self) -> Iterator[tuple[Path, str]]:
        """Everything that going on with the run would read as a config: its own, its plan's, and its members'."""
        members = sorted(self.folder.glob("*/config.yaml"))
        for path in (self.folder / "config.yaml", self.folder / "plan.json", *members):
            if path.exists():
                yield path, Run(path.parent)._read(path.name)

    def environment(self) -> dict[str, Any]:
        return self._checked("environment.json", self.read_json("environment.json"), Environment)

    def read_json(self, name: str) -> dict[str, Any]:
        """What a JSON file of the run holds.

        Raises:
            RunError: it cannot be read, or holds no JSON object.
        """
        return self._parse(name, self._read(name))

    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary an epoch; empty before the first epoch has ended."""
        if not (self.folder / "metrics.jsonl").exists():
            return []
        lines = self._read("metrics.jsonl").splitlines()
        return [self._checked("metrics.jsonl", self._parse("metrics.jsonl", line), EpochMetrics) for line in lines]

    def checkpoint(self) -> dict[str, Any] | None:
        """The state that the run goes on from, on the CPU; ``None`` before there is one.

        Raises:
            RunError: the file is damaged, or holds more than tensors and numbers.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it does not have its checksum")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            lists = ("metrics", "multipliers")
            if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), list) for part in lists):
                raise ValueError("it is not one of mbm's")
            return checkpoint
        except Exception as error:  # what a damaged or foreign archive raises is not one kind
            said = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"{path} is damaged ({type(error).__name__}: {said[:120]}): delete it to start again"
            ) from error

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise RunError(f"{self.folder / name} cannot be read ({reason}): the run is damaged") from error

    def plan(self, kind: str, fields: type[Some]) -> Some | None:
        """What ``plan.json`` says that this comparison or sweep is to do; ``None`` where the run is of another kind.

        Raises:
            RunError: it cannot be read, or a field is missing or wrong.
        """
        if not self.has_several:
            return None
        plan = self.read_json("plan.json")
        return self._validated("plan.json", plan, fields) if plan.get("kind") == kind else None

    def _checked(self, name: str, value: dict[str, Any], fields: type[Fields]) -> dict[str, Any]:
        self._validated(name, value, fields)
        return value

    def _validated(self, name: str, value: dict[str, Any], fields: type[Some]) -> Some:
        try:
            return fields.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RunError(f"{self.folder / name} is damaged ({where}: {first['msg']})") from None

    def _parse(self, name: str, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self.folder / name} is damaged ({error})") from error
        if not isinstance(value, dict):
            raise RunError(f"{self.folder / name} is damaged (not a JSON object)")
        return value


def as_json(value: object) -> str:
    """The text of a JSON file of a run."""
    return json.dumps(value, indent=2) + "\n"


def list_runs(output: Path) -> list[Run]:
    """The runs below ``output``, the oldest first.

    Raises:
        RunError: the folder cannot be read.
    """
    return [Run(folder) for folder in _folders(output) if os.path.isfile(folder / "summary.json")]


def _folders(output: Path) -> list[Path]:
    try:
        return sorted(folder for folder in output.iterdir() if not folder.name.startswith("."))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # there can be none
            return []
        raise RunError(f"{output} cannot be read ({error.strerror}): name another folder with --output") from None
