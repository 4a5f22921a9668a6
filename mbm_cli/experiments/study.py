"""The evaluations of a search, in Optuna's storage: resumed, shared by processes, and continued by NSGA-II."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbm_cli.errors import Interrupted, RequestError

Assignment = dict[str, str]  # layers to candidates
POPULATION = 20
# NSGA-II ends when it has suggested so many assignments in turn that are known already.
PATIENCE = 10 * POPULATION
# What is kept beside Optuna's own: of a trial its run and its evaluation (cost, accuracy, seconds), and of the study.
_RUN, _RESULT, _NETWORK, _SENSITIVITIES = "run", "result", "network", "sensitivities"


@dataclass(frozen=True)
class Evaluation:
    """An assignment, its cost, its accuracy (a fraction), and the seconds that its evaluation took."""

    multipliers: Assignment
    cost: float
    accuracy: float
    seconds: float


class Study:
    """A study of the assignments of candidates to layers, in a file that several processes and machines may share.

    Args:
        file: of the study; made if it is missing.
        network: what has to be the same for all that share the study: plain data.
        layers, candidates: the names.
        run: the name of the run that evaluates.
        seed: decides what NSGA-II suggests in a new study.

    Raises:
        RequestError: Optuna is not installed, or the file cannot be used or is the study of another network.
    """

    def __init__(
        self,
        file: Path,
        network: Mapping[str, Any],
        layers: Sequence[str],
        candidates: Sequence[str],
        run: str,
        seed: int,
    ) -> None:
        optuna = load_optuna()
        self.study = _open(file)
        refuse_other(self.study, network, file)
        if _NETWORK not in self.study.user_attrs:
            self.study.set_user_attr(_NETWORK, dict(network))
        # Those that join a study suggest other assignments than the one that began it.
        sampler_seed = (seed + len(self.study.get_trials(deepcopy=False))) % 2**32
        self.study.sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=sampler_seed)
        choices = optuna.distributions.CategoricalDistribution(tuple(candidates))
        self.layers, self.space = list(layers), dict.fromkeys(layers, choices)
        self.run = run
        self.states = optuna.trial.TrialState

    @property
    def sensitivities(self) -> list[dict[str, Any]]:
        """What a layer's multiplier does alone, as far as it is known: plain data."""
        known: list[dict[str, Any]] = self.study.user_attrs.get(_SENSITIVITIES, [])
        return known

    def keep_sensitivities(self, known: list[dict[str, Any]]) -> None:
        self.study.set_user_attr(_SENSITIVITIES, known)

    def evaluations(self) -> list[Evaluation]:
        """Return each assignment that was evaluated, by any process, in the order of the study."""
        complete = self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,))
        found: dict[tuple[str, ...], Evaluation] = {}
        for trial in complete:
            if _RESULT in trial.user_attrs:
                one = Evaluation(self._assignment(trial.params), *trial.user_attrs[_RESULT])
                found.setdefault(tuple(one.multipliers.values()), one)
        return list(found.values())

    def evaluate(
        self,
        planned: Sequence[Assignment],
        trials: int,
        go_on: bool,
        evaluate: Callable[[Assignment], tuple[float, float]],
        report: Callable[[Evaluation, int], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Evaluate up to ``trials`` assignments in this run, those of its past included, none of them twice.

        Args:
            planned: what is evaluated first.
            go_on: evaluate what NSGA-II suggests, too.
            evaluate: returns cost and accuracy of an assignment.
            report: called with each evaluation, and their number.
            stopped: called before each evaluation.

        Raises:
            Interrupted: ``stopped`` returned true.
        """
        self._settle_unfinished()
        known = {self._key(self._fixed(trial)) for trial in self._trials_but_failed()}
        for assignment in planned:
            if self._key(assignment) not in known:
                self.study.enqueue_trial(assignment)
        repeated, count = 0, self.count
        while count < trials and repeated < PATIENCE:
            if not go_on and not self.study.get_trials(deepcopy=False, states=(self.states.WAITING,)):
                return
            if stopped():
                raise Interrupted("interrupted")
            trial = self.study.ask(self.space)
            trial.set_user_attr(_RUN, self.run)
            assignment = self._assignment(trial.params)
            others = [one for one in self._trials_but_failed() if one.number != trial.number]
            same = [one for one in others if self._key(one.params) == self._key(assignment)]
            if done := next((one for one in same if one.values), None):
                self.study.tell(trial, done.values)  # the algorithm learns from it; nothing was evaluated
                repeated += 1
            elif same:  # another process evaluates it
                self.study.tell(trial, state=self.states.FAIL)
                repeated += 1
            else:
                started = time.perf_counter()
                values = evaluate(assignment)
                seconds = time.perf_counter() - started
                trial.set_user_attr(_RESULT, [*values, seconds])  # first: a killed run keeps it
                self.study.tell(trial, values)
                repeated, count = 0, count + 1
                report(Evaluation(assignment, *values, seconds), count)

    def complete(
        self, assignments: Sequence[Assignment], evaluate: Callable[[Assignment], tuple[float, float]]
    ) -> None:
        """Evaluate those of some assignments that another process has begun and not finished."""
        known = [one.multipliers for one in self.evaluations()]
        for assignment in assignments:
            if assignment not in known:
                values = evaluate(assignment)
                self.study.add_trial(
                    load_optuna().trial.create_trial(
                        params=assignment,
                        distributions=self.space,
                        values=values,
                        user_attrs={_RESULT: [*values, 0.0]},
                    )
                )

    @property
    def count(self) -> int:
        """How many assignments this run has evaluated."""
        complete = self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,))
        return sum(one.user_attrs.get(_RUN) == self.run and _RESULT in one.user_attrs for one in complete)

    def _trials_but_failed(self) -> list[Any]:
        return [one for one in self.study.get_trials(deepcopy=False) if one.state != self.states.FAIL]

    def _settle_unfinished(self) -> None:
        """Settle what this run was evaluating when it was killed."""
        for one in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            if one.user_attrs.get(_RUN) == self.run:
                result = one.user_attrs.get(_RESULT)
                if result:
                    self.study.tell(one.number, result[:2])
                else:
                    self.study.tell(one.number, state=self.states.FAIL)

    @staticmethod
    def _fixed(trial: Any) -> Mapping[str, str]:
        """Return the assignment of a trial, also of one that waits."""
        fixed: Mapping[str, str] = trial.params or trial.system_attrs.get("fixed_params", {})
        return fixed

    def _assignment(self, params: Mapping[str, str]) -> Assignment:
        return {layer: params[layer] for layer in self.layers}

    def _key(self, assignment: Mapping[str, str]) -> tuple[str | None, ...]:
        return tuple(assignment.get(layer) for layer in self.layers)


def load_optuna() -> Any:
    """Import Optuna, which takes a while, and is not installed everywhere.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise RequestError("mbm search needs Optuna: pip install 'mbm-cli[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def check(file: Path, network: Mapping[str, Any]) -> None:
    """Check that a study can be shared, before anything is computed.

    Raises:
        RequestError: the file cannot be used, or is the study of another network.
    """
    if file.exists():
        refuse_other(_open(file), network, file)
    elif not file.parent.is_dir():
        raise RequestError(f"--study {file}: there is no folder {file.parent}")


def refuse_other(study: Any, network: Mapping[str, Any], file: Path) -> None:
    """Refuse a study of another network. Only fields of both are compared.

    Raises:
        RequestError: a field differs.
    """
    known = study.user_attrs.get(_NETWORK, network)
    differing = [name for name in network if name in known and known[name] != network[name]]
    if differing:
        raise RequestError(f"{file} is the study of another network: its {', '.join(differing)} differ")


def _open(file: Path) -> Any:
    optuna = load_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    class Journal(JournalFileBackend):
        """Optuna's file, without waiting for the disk at each of an evaluation's dozen entries: 15 s in 200."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            lock.acquire()
            try:
                with file.open("ab") as journal:
                    journal.write(lines.encode())
            finally:
                lock.release()

    lock = JournalFileSymlinkLock(str(file))
    try:
        return optuna.create_study(
            storage=JournalStorage(Journal(str(file))),
            study_name="search",
            directions=["minimize", "maximize"],
            load_if_exists=True,
        )
    except Exception as error:  # a foreign file raises errors of many kinds
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(f"{file} cannot be used as a study ({type(error).__name__}: {first[:120]})") from None
