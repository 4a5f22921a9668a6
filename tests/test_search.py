"""`mbm search`: what it evaluates and leaves, how it resumes, how processes share it, and what it refuses."""

import csv
import itertools
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from commands import EPOCH, PNG, SILENT, after, contents, made, mbm
from stress import runs as stress

from mbm_cli.experiments.fronts import additive_front, front, hypervolume
from mbm_cli.models import MODELS
from mbm_cli.runs import Run, list_runs

CANDIDATES = ["--candidates", "mbm,mbm-t20"]
SEARCH = ["search", *CANDIDATES, "--init", "w.pt", "--set", "model.name=mlp", *EPOCH]
LAYERS = ["fc1", "fc2", "fc3"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Give each test a folder with the weights of a network that knows a little."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(MODELS["mlp"]((1, 28, 28), 10).state_dict(), "w.pt")


def evaluated(run: Run) -> list[tuple[str, ...]]:
    """Return the assignments of search.csv."""
    with (run.folder / "search.csv").open(newline="") as file:
        return [tuple(line[layer] for layer in LAYERS) for line in csv.DictReader(file)]


def test_search_leaves_a_front_and_what_trains_it():
    result = mbm(*SEARCH, "--trials", 14, "--max-drop", 100, "--json", draw=True).json
    run = made()
    files = {path.name for path in run.folder.iterdir() if path.is_file()}
    assert {"search.json", "search.csv", "search.png", "plan.json", "study.log", "config.yaml"} <= files
    assert (run.folder / "search.png").read_bytes().startswith(PNG)
    assert run.summary().status == "completed"
    assert result["candidates"] == {"exact": 1, "mbm": 0.06211, "mbm-t20": 0.01754}
    assert result["layers"] == {"fc1": 784 * 300, "fc2": 300 * 100, "fc3": 1000}
    assert (result["held_out"], result["evaluations"], result["hypervolume"].keys()) == (
        10,
        14,
        {"front", "searched", "uniform"},
    )
    assert len(set(evaluated(run))) == len(evaluated(run)) == 14
    assert [one["cost"] for one in result["uniform"]] == pytest.approx([1, 0.06211, 0.01754])
    assert [(one["layer"], one["candidate"]) for one in result["sensitivities"]] == [
        *itertools.product(LAYERS, ["mbm", "mbm-t20"])
    ]
    for one in (*result["uniform"], *result["searched"], *result["front"]):
        products = sum(result["layers"].values())
        spent = (result["layers"][layer] * result["candidates"][name] for layer, name in one["multipliers"].items())
        assert one["cost"] == pytest.approx(sum(spent) / products)
        assert one["test_accuracy"] == Run(run.folder / one["run"]).summary().test_accuracy
    points = [(one["cost"], one["test_accuracy"]) for one in result["front"]]
    assert front(points) == list(range(len(points)))
    assert result["hypervolume"]["front"] == pytest.approx(hypervolume(points, 1.0, 0.1))
    assert result["hypervolume"]["front"] >= max(result["hypervolume"].values())
    assert result["chosen"] == result["searched"][0]  # any loss is allowed
    mine = result["front"][0]
    assert mbm("train", "--config", run.folder / mine["config"], "--output", "again", "--quiet") == SILENT
    assert made("again").summary().test_accuracy == mine["test_accuracy"]
    shown = mbm("runs", "show", run.name).out
    assert "uniform assignments" in shown


def test_same_seed_gives_the_same_front():
    for output in ("one", "two"):
        assert mbm(*SEARCH, "--trials", 12, "--output", output, "--quiet") == SILENT
    one, two = (made(output) for output in ("one", "two"))
    assert evaluated(one) == evaluated(two)
    fronts = [
        [(point["multipliers"], point["test_accuracy"]) for point in run.read_json("search.json")["front"]]
        for run in (one, two)
    ]
    assert fronts[0] == fronts[1]
    assert mbm(*SEARCH, "--trials", 12, "--seed", 1, "--output", "three", "--quiet") == SILENT
    assert evaluated(made("three")) != evaluated(one)


def test_search_without_start_trains_one_without_held_out_images():
    command = ["search", *CANDIDATES, *EPOCH, "--strategy", "sensitivity", "--trials", 4]
    assert mbm(*command, "--quiet") == SILENT
    (start,) = (run for run in list_runs(made().folder) if run.config().name == "start")
    assert (start.config().data.train_limit, str(start.config().model.multiplier)) == (50, "exact")
    assert len(made().read_json("search.json")["front"][0]["multipliers"]) == 5  # LeNet's layers
    assert made().read_json("search.json")["evaluations"] == 4
    # In another folder, what is missing is trained from the same start.
    moved = made().folder.rename("moved")
    lost = next(run for run in list_runs(moved) if "init" in run.environment())
    name = lost.config().name
    shutil.rmtree(lost.folder)
    assert mbm("resume", "moved", "--quiet") == SILENT
    (found,) = (run for run in list_runs(moved) if run.config().name == name)
    assert found.environment()["init"]["path"] == str(moved.absolute() / start.name / "checkpoint.pt")


def test_interrupted_search_keeps_what_layers_do_alone():
    answer = mbm(*SEARCH, "--trials", 4, stopped=after(3))
    assert (answer.code, answer.out) == (130, "")
    assert mbm("resume", made().name, "--quiet") == SILENT
    written = [line for line in (made().folder / "study.log").read_text().splitlines() if '"drop"' in line]
    assert [line.count('"drop"') for line in written] == [1, 2, 3, 4, 5, 6]


def test_interrupted_search_resumes():
    whole = mbm(*SEARCH, "--trials", 12, "--output", "whole", "--quiet")
    answer = mbm(*SEARCH, "--trials", 12, stopped=after(12))  # 6 sensitivities come first
    assert (whole, answer.code) == (SILENT, 130)
    assert "interrupted after 6 of 12 evaluations; to resume: mbm resume" in answer.err
    result = mbm("resume", made().name, "--json").json
    assert result["evaluations"] == len(set(evaluated(made()))) == 12
    assert evaluated(made())[:6] == evaluated(made("whole"))[:6]
    again = contents()
    assert mbm("resume", made().name, "--json").json == result
    assert contents().keys() == again.keys()
    (made().folder / "study.log").unlink()
    answer = mbm("resume", made().name)
    assert answer.code == 1
    assert re.search("study.log is missing, with the evaluations of this search: restore it", answer.err)


def test_killed_search_repeats_no_evaluation(tmp_path):
    command = [*SEARCH, "--trials", 25, "--quiet", "--set", "data.train_limit=600"]
    search = stress.start_until("study.log", *command, folder=tmp_path)
    log = next(Path().glob("runs/*/study.log"))
    while log.read_text().count('"result"') < 8:
        time.sleep(0.002)
    search.send(signal.SIGKILL)
    search.wait()
    before = log.read_text().count('"result"')
    assert 8 <= before < 25
    assert mbm("resume", made().name, "--quiet") == SILENT
    assert log.read_text().count('"result"') == 25 == len(set(evaluated(made())))


def test_two_processes_share_a_study(tmp_path):
    command = [*SEARCH, "--trials", 9, "--study", "study.log", "--quiet", "--set", "data.train_limit=600"]
    searches = [stress.start(*command, "--output", output, folder=tmp_path) for output in ("one", "two")]
    assert [search.wait() for search in searches] == [stress.DONE] * 2
    runs = [made("one"), made("two")]
    assert max(run.read_json("search.json")["evaluations"] for run in runs) == 18
    assert Counter(max((evaluated(run) for run in runs), key=len)).most_common(1)[0][1] == 1


def test_integers_and_folders_of_circuits_are_searched():
    Path("circuits").mkdir()
    for k in (3, 4):
        assert mbm("multipliers", "export", f"drum-int8-k{k}", f"circuits/k{k}.npy").code == 0
    Path("costs.yaml").write_text(
        "mine: {source: us, technology: t, operands: int8, exact: {power: 1, where: p}, multipliers: "
        '{"int8:k3.npy": {power: 0.3, where: p}, "int8:k4.npy": {power: 0.5, where: p}}}'
    )
    command = ["search", "--candidates", "int8:circuits", "--costs", "costs.yaml", *SEARCH[3:]]
    result = mbm(*command, "--trials", 6, "--strategy", "sensitivity", "--json").json
    assert result["candidates"] == {"exact-int8": 1, "int8:k3.npy": 0.3, "int8:k4.npy": 0.5}
    # From another folder the files are found by their absolute paths.
    assert str(Path("circuits").absolute()) in (made().folder / result["front"][0]["config"]).read_text() or (
        set(result["front"][0]["multipliers"].values()) == {"exact-int8"}
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--candidates mbn", "--candidates: unknown multiplier family 'mbn'"),
        ("--candidates exact", "--candidates: name at least one beside the exact one"),
        (
            "--candidates mbm,mitchell",
            "no source has the power of mitchell beside the others: name a file that has all",
        ),
        ("--candidates mbm,exact-int8", "--candidates: name multipliers of one kind of operands, not float32 and int8"),
        ("--candidates lut:none.bin", "--candidates: none.bin"),
        ("--candidates mbm --max-drop -1", ""),
        ("--candidates mbm --trials 1", "--trials 1: the 2 uniform assignments alone are more"),
        ("--candidates mbm --strategy mcts", "--strategy must be sensitivity or nsga2, not 'mcts'"),
        ("--candidates mbm --quantity cost", "--quantity must be power or area or delay or energy, not 'cost'"),
        ("--candidates mbm --init none.pt", "no run 'none.pt'"),
        ("--candidates mbm --study none/study.log", "--study .*none/study.log: there is no folder"),
        ("--candidates mbm --study w.pt", ".*w.pt cannot be used as a study"),
    ],
)
def test_wrong_request_is_one_line(flags, message):
    before = contents()
    answer = mbm(*SEARCH, *flags.split())
    assert (answer.code, answer.out) == (2, "")
    assert re.fullmatch(f"mbm: {message}[^\n]*\n", answer.err) or not message
    assert contents() == before


def test_study_of_another_network_is_refused():
    command = [*SEARCH, "--trials", 3, "--study", "study.log", "--quiet"]
    assert mbm(*command) == SILENT
    torch.save(MODELS["mlp"]((1, 28, 28), 10).state_dict(), "other.pt")
    for others, what in ((["--candidates", "mbm"], "candidates"), (["--init", "other.pt"], "weights")):
        answer = mbm(*command, *others, "--output", "others")
        assert answer.code == 2
        assert re.fullmatch(f"mbm: .*study.log is the study of another network: its {what} differ\n", answer.err)
    assert not Path("others").exists()


# The additive model and fronts


def test_additive_front_is_that_of_all_assignments():
    generator = torch.Generator().manual_seed(0)
    costs, losses = (
        {f"l{i}": {f"c{j}": torch.rand((), generator=generator).item() for j in range(4)} for i in range(5)}
        for _ in range(2)
    )
    every = [dict(zip(costs, names, strict=True)) for names in itertools.product(["c0", "c1", "c2", "c3"], repeat=5)]
    sums = [[sum(of[layer][name] for layer, name in one.items()) for of in (costs, losses)] for one in every]
    best = [every[i] for i in front([(cost, -loss) for cost, loss in sums])]
    assert additive_front(costs, losses) == best


def test_front_and_hypervolume_of_points():
    points = [(1.0, 0.9), (0.5, 0.8), (0.5, 0.7), (0.7, 0.8), (0.2, 0.1)]
    assert front(points) == [4, 1, 0]
    assert hypervolume(points, 1.0, 0.1) == pytest.approx(0.5 * 0.7)
    assert hypervolume(points, 1.0, 0.0) == pytest.approx(0.8 * 0.1 + 0.5 * 0.7)
