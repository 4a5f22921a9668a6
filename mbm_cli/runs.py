"""A run's folder: create it, write each file whole or not at all, find it, read it back."""

import difflib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from mbm_cli import config as configs
from mbm_cli.config import Config, Engine
from mbm_cli.errors import Interrupted, MbmError, RequestError, RunError

# Of commands that train nothing, and what they are called in lists.
RESULTS = {"profile.json": "profile", "characterize.json": "errors", "eval.json": "evaluation"}
PATIENCE = 1.0  # seconds that a lock may take: readers, and a run that is ending, hold it for an instant

Count = Annotated[int, Field(strict=True, ge=1)]


@dataclass(frozen=True)
class Summary:
    """``summary.json`` of a training run, and of a comparison, a sweep or a search over its members.

    Accuracies are fractions, times seconds. ``reason`` says why a run failed.
    """

    status: Literal["running", "completed", "interrupted", "failed", "stopped"]
    multiplier: str
    device: str
    epochs: int  # completed
    test_accuracy: float | None
    best_test_accuracy: float | None
    epoch_seconds: list[float]  # training and evaluation
    train_seconds: list[float]
    total_seconds: float
    peak_memory_bytes: int | None = None
    reason: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Environment:
    """What a resume needs of ``environment.json``."""

    threads: Count | None = None


@dataclass(frozen=True)
class _EpochMetrics:
    """A line of ``metrics.jsonl``: an epoch's number, and what `mbm_cli.training.Epoch` says."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    epoch_seconds: float
    train_seconds: float
    eval_seconds: float
    images_per_second: float


class Combination(BaseModel):
    """Values of the varied fields, the config that has them, the content keys of its multipliers, and its cost."""

    values: dict[str, Any]
    config: dict[str, Any]
    keys: list[str]
    cost: float | None = None


class SearchPlan(BaseModel):
    """What a search evaluates before it trains.

    Attributes:
        trials: evaluations, at most.
        max_drop: points of accuracy that the chosen assignment may lose; ``None`` chooses none.
        candidates: multipliers by their names with absolute paths, and their costs.
        study: the file with the evaluations, in the run's folder or shared.
        held_out: images of an evaluation, once everything is evaluated and the combinations are what is trained.
    """

    strategy: Literal["sensitivity", "nsga2"]
    trials: Count
    max_drop: Annotated[float, Field(ge=0)] | None
    candidates: Annotated[dict[str, float], Field(min_length=2)]
    study: str
    held_out: Count | None = None


class Plan(Engine):
    """``plan.json``: what a comparison, a sweep or a search trains, and where; ``costs`` says what the costs are."""

    kind: Literal["comparison", "sweep", "search"]
    vary: dict[str, list[str]]
    seeds: Count
    combinations: Annotated[list[Combination], Field(min_length=1)]
    costs: str | None = None
    search: SearchPlan | None = None


@dataclass(frozen=True)
class Run:
    """A run's folder and the files in it; runs/README.md says what each holds."""

    folder: Path

    @classmethod
    def create(cls, output: Path, name: str, files: Mapping[str, str | bytes] | None = None) -> "Run":
        """Create a folder ``<UTC time>-<name>-<short id>`` below ``output``.

        Args:
            files: contents by file name; the folder appears with all of them or not at all.

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
    def find(cls, name: str, output: Path, any_kind: bool = False) -> "Run":
        """Find the run at a path, or below ``output`` by its name, by that of its config, or by its last part.

        Args:
            any_kind: also evaluations, profiles and characterizations.

        Raises:
            RequestError: there is none, or several are called so.
        """
        for folder in (Path(name), output / name):
            if os.path.isfile(folder / "summary.json"):  # false in a folder without permission, too
                return cls(folder.resolve() if folder.name == "" else folder)
            result = next((file for file in RESULTS if os.path.isfile(folder / file)), None)
            if result is not None and any_kind:
                return cls(folder)
            if result is not None:
                raise RequestError(f"{folder} is not a training run: its result is in {result}")
        called = re.compile(rf".*Z-{re.escape(name)}-[0-9a-f]{{4}}|.*-{re.escape(name)}")
        found = [folder.name for folder in _folders(output) if called.fullmatch(folder.name)]
        if len(found) > 1:
            raise RequestError(f"{len(found)} runs in {output} are called {name!r}, for example {found[0]}: name one")
        if found:
            return cls.find(found[0], output, any_kind)
        near = difflib.get_close_matches(name, [run.name for run in list_runs(output)], n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ": mbm runs list shows those there are"
        raise RequestError(f"no run {name!r}, neither as a path nor in {output}{hint}")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def has_several(self) -> bool:
        """Whether this is a comparison, a sweep or a search."""
        return (self.folder / "plan.json").exists()

    def refuse_several(self) -> None:
        """Raise a RequestError for the folder of a comparison or a sweep, where one training run is needed."""
        if self.has_several:
            example = next((f", for example {run.folder}" for run in list_runs(self.folder)), "")
            raise RequestError(f"{self.folder} holds several runs: name one of them{example}")

    @contextmanager
    def kept_if_complete(self) -> Iterator[None]:
        """Remove the folder of what is interrupted or fails."""
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, Interrupted):
                raise Interrupted("interrupted; nothing was kept") from None
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
        import torch

        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def config_text(self) -> str:
        """Read the experiment as YAML.

        Raises:
            RunError: it cannot be read, or its last line is cut off, so that fields could be missing unnoticed.
        """
        text = self._read("config.yaml")
        if not text.endswith("\n"):
            raise RunError(f"{self.folder / 'config.yaml'} is damaged (its last line is cut off)")
        return text

    def config(self) -> Config:
        """Read the experiment, with the number of threads that it was begun with.

        Raises:
            RunError, RequestError: it cannot be read, or something in it is wrong.
        """
        config = configs.parse(self.config_text(), str(self.folder / "config.yaml"))
        # Configs written before train.threads existed.
        threads = config.train.threads or self.environment().get("threads")
        return config.with_train(threads=threads)

    def summary(self) -> Summary:
        """Read ``summary.json``; a run that says ``running`` but is computed by no process is ``stopped``.

        Raises:
            RunError: it cannot be read, or a field is missing or wrong.
        """
        summary: Summary = self.read(Summary, "summary.json")
        return replace(summary, status="stopped") if summary.status == "running" and not self._is_held() else summary

    def check(self) -> None:
        """Read every file that a command may need.

        Raises:
            RunError, RequestError: one of them is missing or damaged, or contradicts another.
        """
        self.summary()
        self.config()
        metrics, checkpoint = self.metrics(), self.checkpoint()
        # Compared as text, in which NaN equals itself. A run killed between the two files lacks the last metrics.
        if checkpoint is not None and as_json(metrics) != as_json(checkpoint["metrics"][: len(metrics)]):
            raise RunError(f"{self.folder / 'metrics.jsonl'} is damaged (checkpoint.pt has other metrics)")

    def row(self) -> dict[str, Any]:
        """Return the run for a list: its summary and kind; of a damaged run its fault. Import no PyTorch."""
        try:
            summary = asdict(self.summary())
            kind = self.read_json("plan.json").get("kind") if self.has_several else "training"
            self.config()
            self.metrics()
            self._check_archive()
            return {"run": str(self.folder), "kind": kind, **summary}
        except MbmError as error:
            return {"run": str(self.folder), "status": "damaged", "reason": str(error)}

    def _check_archive(self) -> None:
        """Check the sums of the checkpoint's archive, which ``torch.load`` ignores."""
        path = self.folder / "checkpoint.pt"
        try:
            if path.exists():
                with zipfile.ZipFile(path) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise ValueError(f"{damaged} in it has another checksum")
        except (ValueError, zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            raise RunError(f"{path} is damaged ({error}): delete it to start again") from error

    def delete(self) -> None:
        """Delete the run's folder.

        Raises:
            RequestError: another process computes the run.
            RunError: something cannot be deleted.
        """
        with self.hold():
            try:
                shutil.rmtree(self.folder)
            except OSError as error:
                raise RunError(f"cannot delete {error.filename or self.folder} ({error.strerror})") from error

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the run exclusively and remove half-written files; the OS releases the lock when the process dies.

        Raises:
            RequestError: another process holds it.
        """
        with self._opened() as folder:
            patience = time.monotonic() + PATIENCE
            while not self._lock(folder):
                if time.monotonic() > patience:
                    raise RequestError(f"{self.folder} is being computed by another process: wait for it")
                time.sleep(0.01)
            for path in self.folder.glob(".*-*"):
                with suppress(OSError):  # a folder of a member that was being created, or no permission
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
        """Open the folder, which is what is locked, so that no lock file is needed."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def trusted(self, trust: bool) -> "Run":
        """Return the run, if resuming it would execute no file, or the user trusts it. Execute nothing.

        Raises:
            RequestError: its config, its plan or a member's config names code.
            RunError: a config or the plan cannot be read.
        """
        if trust:
            return self
        named = [self.config(), *(Run(path.parent).config() for path in sorted(self.folder.glob("*/config.yaml")))]
        if self.has_several:
            planned = self.read(list[Combination], "plan.json", self.read_json("plan.json").get("combinations") or [])
            named += [configs.validate(one.config, str(self.folder / "plan.json")) for one in planned]
        for code in (code for config in named for code in config.model.code()):
            raise RequestError(f"{self.folder} names code, {code}: read it, then run it with --trust")
        return self

    def plan(self) -> Plan:
        """Read what a comparison or a sweep trains.

        Raises:
            RequestError: it is a comparison of version 0.1.0, which had another form.
            RunError: it cannot be read, or a field is missing or wrong.
        """
        plan = self.read_json("plan.json")
        if "columns" in plan:
            version = self.environment().get("mbm", "0.1.0")
            raise RequestError(f"{self.folder} is a comparison of mbm {version}: resume it with that version")
        return self.read(Plan, "plan.json", plan)

    def environment(self) -> dict[str, Any]:
        environment = self.read_json("environment.json")
        self.read(_Environment, "environment.json", environment)
        return environment

    def read(self, kind: Any, name: str, value: object = None) -> Any:
        """Read a JSON file, or check its ``value``, as a dataclass or a model; ignore unknown fields.

        Raises:
            RunError: it cannot be read, or a field is missing or wrong.
        """
        value = self.read_json(name) if value is None else value
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RunError(f"{self.folder / name} is damaged ({where}: {first['msg']})") from None

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run.

        Raises:
            RunError: it cannot be read, or is not a JSON object.
        """
        return self._parse(name, self._read(name))

    def metrics(self) -> list[dict[str, Any]]:
        """Read a dictionary an epoch; empty before the first epoch has ended."""
        if not (self.folder / "metrics.jsonl").exists():
            return []
        lines = self._read("metrics.jsonl").splitlines()
        metrics = [self._parse("metrics.jsonl", line) for line in lines]
        self.read(list[_EpochMetrics], "metrics.jsonl", metrics)
        return metrics

    @property
    def has_checkpoint(self) -> bool:
        return (self.folder / "checkpoint.pt").exists()

    def checkpoint(self) -> dict[str, Any] | None:
        """Read the state that a resume continues from, on the CPU; ``None`` before there is one.

        Raises:
            RunError: the file is damaged, or holds more than tensors and numbers.
        """
        import torch

        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            self._check_archive()
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            lists = ("metrics", "multipliers")
            if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), list) for part in lists):
                raise ValueError("not a checkpoint of mbm")
            return checkpoint
        except RunError:
            raise
        except Exception as error:  # a damaged or foreign archive raises errors of many kinds
            first = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"{path} is damaged ({type(error).__name__}: {first[:120]}): delete it to start again"
            ) from error

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise RunError(f"{self.folder / name} cannot be read ({reason}): the run is damaged") from error

    def _parse(self, name: str, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self.folder / name} is damaged ({error})") from error
        if not isinstance(value, dict):
            raise RunError(f"{self.folder / name} is damaged (not a JSON object)")
        return value


def weights_of(name: str, output: Path, config: str | None, has_multiplier: bool) -> tuple[str, str]:
    """Find the weights that ``--init`` names: a run's checkpoint, or a file.

    Returns:
        The config to start from (of the run, unless another is given), and the path of the weights.

    Raises:
        RequestError: there is no such run or file, or the run's multipliers would execute a file.
    """
    if os.path.isfile(name):
        return config or "lenet-mbm", os.path.abspath(name)
    run = Run.find(name, output)
    run.refuse_several()
    if not run.has_checkpoint:
        raise RequestError(f"{run.folder} has no checkpoint yet: mbm resume {run.folder}")
    if config is None:
        model = run.config().model
        if not has_multiplier or model.name.runs_code or any(one.runs_code for one in model.backward.distinct()):
            run.trusted(False)
    return config or str(run.folder / "config.yaml"), os.path.abspath(run.folder / "checkpoint.pt")


def as_json(value: Any) -> str:
    """Return the text of a JSON file of a run; ``value`` may be a dataclass."""
    return json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value, indent=2) + "\n"


def rows(output: Path) -> list[dict[str, Any]]:
    """Return a row for each run, evaluation, profile and characterization below ``output``, the oldest first.

    Raises:
        RunError, RequestError: the folder cannot be read.
    """
    found = []
    for folder in _folders(output):
        result = next((name for name in RESULTS if (folder / name).is_file()), None)
        if (folder / "summary.json").is_file():
            found.append(Run(folder).row())
        elif result is not None:
            found.append(_result_row(Run(folder), result))
    return found


def _result_row(run: Run, name: str) -> dict[str, Any]:
    row = {"run": str(run.folder), "kind": RESULTS[name], "status": "completed"}
    try:
        result = run.read_json(name)
        several = [
            one.get("multiplier", one.get("name"))
            for key in ("evaluations", "multipliers")
            for one in result.get(key, [])
        ]
        row["multiplier"] = result.get("multiplier") or ", ".join(map(str, several))
        row["device"] = result.get("device") or str(run.environment().get("device", "-")).partition(":")[0]
    except (MbmError, AttributeError) as error:
        row |= {"status": "damaged", "reason": str(error)}
    return row


def list_runs(output: Path) -> list[Run]:
    """List the runs below ``output``, the oldest first.

    Raises:
        RunError: the folder cannot be read.
    """
    return [Run(folder) for folder in _folders(output) if os.path.isfile(folder / "summary.json")]


def _folders(output: Path) -> list[Path]:
    try:
        return sorted(folder for folder in output.iterdir() if not folder.name.startswith("."))
    except NotADirectoryError:
        raise RequestError(f"{output} is not a folder: name the one that holds the runs") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):  # there are none
            return []
        raise RunError(f"{output} cannot be read ({error.strerror}): name another folder with --output") from None
