"""`mbm resume`: continue what was interrupted, be it a training run, a comparison, a sweep or a search."""

from functools import partial

from mbm_cli.errors import RequestError
from mbm_cli.experiments import compare, members, search, sweep, train
from mbm_cli.experiments.compare import Comparison
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.experiments.search import Search
from mbm_cli.experiments.sweep import Sweep
from mbm_cli.experiments.train import Trained
from mbm_cli.runs import Run


def resume(
    run: Run,
    epochs: int | None = None,
    jobs: int | None = None,
    watch: Watch | None = None,
    stopped: Stopped = never,
    on: str | None = None,
    at_once: str | None = None,
) -> Trained | Finished[Comparison] | Finished[Sweep] | Finished[Search]:
    """Resume a run of any kind; what is complete is returned as it is.

    Args:
        epochs: of a training run, instead of its config's.
        jobs: of a comparison, a sweep or a search, instead of its plan's.
        on, at_once: the same, as the command line takes them.

    Raises:
        RequestError: the run cannot be resumed here, or takes no epochs or jobs.
        RunError, Interrupted: as the experiment does.
    """
    watch = watch or Watch()
    if not run.has_several:
        if (jobs, on, at_once) != (None, None, None):
            raise RequestError(f"--jobs, --on and --at-once are for several runs: {run.folder} is a training run")
        return train.resume(run, epochs, watch, stopped)
    kind = run.plan().kind
    if epochs is not None:
        raise RequestError(f"--epochs is for a training run, but {run.folder} is a {kind}")
    if kind == "search":
        return search.resume(run, (jobs, on, at_once), watch, stopped)
    if kind == "sweep":
        return members.resume(run, (jobs, on, at_once), watch, stopped, sweep.conclude)
    return members.resume(run, (jobs, on, at_once), watch, stopped, partial(compare.conclude, stopped))
