"""Repeat the experiment of docs/integers.md: `.venv/bin/python docs/integers.py CIRCUITS RUNS`.

CIRCUITS is a folder with files of 8-bit multipliers, for example EvoApproxLib's C sources or tables: mul8s_*.c,
mul8u_*.npy. Trains each network in floats, quantises it with each multiplier in every layer, evaluates it after
calibration and again after one epoch of retraining, and prints the tables of the document. Runs go into the folder
RUNS; what is there already is not repeated.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from mbm_cli import config as configs
from mbm_cli.experiments.evaluate import evaluate
from mbm_cli.experiments.train import train
from mbm_cli.runs import Run, list_runs

SEEDS = {"lenet": 5, "cnn3": 3}
PUBLISHED = ("mul8s_1L2H", "mul8s_1KVL", "mul8s_1L1G", "mul8u_2AC", "mul8u_150Q", "mul8u_17KS", "mul8u_JV3")


def multipliers(circuits: Path) -> dict[str, str]:
    """Return the multipliers by what the tables call them, each in every layer of a network."""
    found = {"exact-int8": "exact-int8", "exact-uint8": "exact-uint8"}
    for name in PUBLISHED:
        for path in sorted(circuits.glob(f"{name}.*")):
            found[name] = f"{'int8' if name.startswith('mul8s') else 'uint8'}:{path}"
    return {name: f"{{conv2d: {one}, linear: {one}}}" for name, one in found.items()}


def trained(folder: Path, config: str, *overrides: str) -> Run:
    """Return the run in a folder, trained now unless it is there."""
    runs = list_runs(folder) if folder.is_dir() else []
    return runs[0] if runs else train(configs.load(config, overrides), folder).run


def calibrated(run: Run, folder: Path, names: dict[str, str]) -> dict[str, float]:
    """Evaluate a float run with each multiplier after calibration; return test accuracies."""
    if not list(folder.glob("*/eval.json")):
        evaluate(run, [*names.values()], folder)
    (path,) = folder.glob("*/eval.json")
    exact, *others = (row["test_accuracy"] for row in json.loads(path.read_text())["evaluations"])
    return {"float32": exact, **dict(zip(names, others, strict=True))}


def shown(accuracies: list[float], than: list[float]) -> str:
    """Write the mean of some seeds' accuracies, and the mean difference to others with its standard deviation."""
    differences = [100 * (a - b) for a, b in zip(accuracies, than, strict=True)]
    return f"{100 * mean(accuracies):.2f} ({mean(differences):+.2f} ± {stdev(differences):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("circuits", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--networks", nargs="+", default=[*SEEDS], choices=[*SEEDS])
    parser.add_argument("--epochs", type=int, default=3, help="of training in floats")
    parser.add_argument("--set", nargs="*", default=[], help="further fields of the configs")
    options = parser.parse_args()
    names = multipliers(options.circuits)
    for network in options.networks:
        before: list[dict[str, float]] = []
        after: list[dict[str, float]] = []
        for seed in range(SEEDS[network]):
            folder, common = options.runs / f"{network}-{seed}", [f"seed={seed}", *options.set]
            base = trained(folder / "float32", f"{network}-exact", f"train.epochs={options.epochs}", *common)
            before.append(calibrated(base, folder / "eval", names))
            start = [f"train.init={base.folder / 'checkpoint.pt'}", "train.epochs=1", *common]
            retrained = {
                name: trained(folder / "retrained" / name, f"{network}-exact", f"model.multiplier={one}", *start)
                for name, one in {"float32": "exact", **names}.items()
            }
            after.append({name: run.summary().test_accuracy or 0.0 for name, run in retrained.items()})
        print(f"\n{network}, {SEEDS[network]} seeds\n")
        print("| multiplier | after calibration | after one epoch of retraining |\n| --- | --- | --- |")
        floats = [one["float32"] for one in before]
        print(f"| float32 | {100 * mean(floats):.2f} | {shown([one['float32'] for one in after], floats)} |")
        for name in names:
            columns = [shown([one[name] for one in rows], floats) for rows in (before, after)]
            print(f"| `{name}` | " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
