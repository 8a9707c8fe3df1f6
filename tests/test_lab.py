"""The lab itself: intervals that cover, verdicts that turn, runs that resume, results that are what they say."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normwise import cli, lab
from normwise.lab import intervals, results, runner, table
from normwise.lab.experiment import CORRECTED, FAILS, HOLDS, UNDECIDED, Contrast, Experiment, Finding, Plan, Trial
from normwise.lab.experiments import EXPERIMENTS, chosen
from normwise.lab.intervals import Effect, agrees, exact, mean, share

ROOT = Path(__file__).parents[1]


def counting(trials: int = 4, seconds: float = 0.0) -> Experiment:
    """Each trial finds its seed."""

    def run(seed: int) -> dict[str, Any]:
        time.sleep(seconds)
        return {"value": seed}

    def judge(found: Any) -> Finding:
        return Finding(mean([numbers["value"] for numbers in found.values()], "things"), "one", "the other")

    def plot(figure: Any, found: Any) -> None:
        figure.subplots().plot([numbers["value"] for numbers in found.values()])

    return Experiment(
        "counting",
        "Counts",
        "Seeds are large.",
        Contrast("the seed", 1.0),
        "Are they?\n\nThey are counted.",
        lambda plan: [Trial(str(s), lambda _, s=s: run(s)) for s in plan.seeds(trials, trials, trials)],
        judge,
        plot,
    )


def test_intervals_cover_as_often_as_they_say() -> None:
    """1,000 samples of 10: the number covered is binomial with sd 7, so 4 of those either side."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, (1000, 10))
    covered = sum((e := mean(list(s))).low <= 3 <= e.high for s in samples)
    assert 922 <= covered <= 978


def test_second_runs_agree_as_often_as_they_say() -> None:
    samples = np.random.default_rng(1).normal(3.0, 2.0, (1000, 2, 10))
    assert 922 <= sum(agrees(mean(list(a)), mean(list(b))) for a, b in samples) <= 978


def test_a_share_covers_at_least_as_often() -> None:
    hits = np.random.default_rng(2).binomial(40, 0.05, 500)
    assert sum((e := share(int(h), 40)).low <= 5 <= e.high for h in hits) >= 475
    assert (share(40, 40).value, share(40, 40).high) == (100, 100)


def test_exact_ones_agree_if_they_are_equal() -> None:
    assert agrees(exact(3), exact(3))
    assert not agrees(exact(3), exact(4))
    assert agrees(share(60, 1000), share(64, 1000))
    assert not agrees(share(60, 1000), share(100, 1000))


@pytest.mark.parametrize(
    ("effect", "text"),
    [
        (Effect(1.23456, 1.1, 1.4, "points"), "1.23 [1.10, 1.40] points"),
        (Effect(123.456, 100, 150), "123 [100, 150]"),
        (Effect(0.0001234, 0.0001, 0.0002, "nats"), "0.00012 [0.00010, 0.00020] nats"),
        (Effect(5, -0.04, 50, "%"), "5 [0, 50] %"),
        (exact(0, "%"), "0 %"),
        (exact(1e-7), "1e-07"),
    ],
    ids=str,
)
def test_effects_are_rounded_to_what_the_interval_tells(effect: Effect, text: str) -> None:
    assert str(effect) == text


@pytest.mark.parametrize(
    ("low", "high", "more", "equal"),
    [
        (2.0, 3.0, HOLDS, FAILS),
        (1.0, 3.0, HOLDS, FAILS),
        (0.5, 3.0, UNDECIDED, UNDECIDED),
        (-0.5, 0.5, FAILS, HOLDS),
        (-3.0, -2.0, FAILS, FAILS),
        (-3.0, 0.5, FAILS, UNDECIDED),
        (-3.0, 3.0, UNDECIDED, UNDECIDED),
    ],
)
def test_verdicts(low: float, high: float, more: str, equal: str) -> None:
    effect = Effect((low + high) / 2, low, high)
    assert Contrast("", 1.0).verdict(effect) == more
    assert Contrast("", 1.0, equal=True).verdict(effect) == equal


def test_a_correction_needs_a_contrast_that_holds() -> None:
    experiment = counting()
    assert experiment.verdict(Finding(exact(2), "", "", correction="but")) == CORRECTED
    assert experiment.verdict(Finding(exact(0), "", "", correction="but")) == FAILS


def test_a_mean_needs_two_seeds_and_a_share_one_try() -> None:
    with pytest.raises(ValueError, match="needs 2 or more seeds; got 1"):
        mean([1.0])
    with pytest.raises(ValueError, match="needs 1 or more tries; got 0"):
        share(0, 0)


def test_quantiles_are_students() -> None:
    assert intervals.quantile(9) == pytest.approx(2.262157, abs=1e-6)
    assert intervals.quantile(np.inf) == pytest.approx(1.959964, abs=1e-6)


def test_what_ran_is_kept_and_the_rest_runs(tmp_path: Path) -> None:
    seen: list[str] = []
    experiment = counting()

    def stop(trial: Trial, done: float, total: float) -> None:
        seen.append(trial.name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(experiment, Plan("smoke"), tmp_path, progress=stop)
    assert "verdict" not in json.loads((tmp_path / "counting.json").read_text())
    record = runner.run(experiment, Plan("smoke"), tmp_path, progress=stop)
    assert seen == ["0", "1", "2", "2", "3"]
    assert record.trials == {str(seed): {"value": seed} for seed in range(4)}
    assert (tmp_path / "counting.svg").exists()
    assert (tmp_path / "counting.png").exists()
    runner.run(experiment, Plan("smoke"), tmp_path, progress=stop)
    assert len(seen) == 5
    runner.run(experiment, Plan("smoke"), tmp_path, fresh=True, progress=stop)
    assert len(seen) == 9


def test_two_runs_in_one_folder_lose_nothing_and_share_the_work(tmp_path: Path) -> None:
    begun: list[tuple[str, str]] = []

    def second(trial: Trial, done: float, total: float) -> None:
        begun.append(("second", trial.name))
        if trial.name == "3":
            raise KeyboardInterrupt

    def first(trial: Trial, done: float, total: float) -> None:
        begun.append(("first", trial.name))
        if trial.name == "1":
            with pytest.raises(KeyboardInterrupt):
                runner.run(counting(), Plan("smoke"), tmp_path, progress=second)
        if trial.name == "3":
            kept = results.load(tmp_path, "counting")
            assert kept is not None
            assert list(kept.trials) == list(kept.seconds) == ["0", "1", "2"]

    record = runner.run(counting(), Plan("smoke"), tmp_path, progress=first)
    assert begun == [("first", "0"), ("first", "1"), *(("second", name) for name in "123"), ("first", "3")]
    assert list(record.trials) == ["0", "1", "2", "3"]


def test_a_run_of_another_plan_that_took_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    def beside(trial: Trial, done: float, total: float) -> None:
        if trial.name == "1":
            runner.run(counting(), Plan("standard"), tmp_path, fresh=True)

    with pytest.raises(
        ValueError, match=r"it is standard, seeds from 0, asked for is smoke, seeds from 0; use --fresh"
    ):
        runner.run(counting(), Plan("smoke"), tmp_path, progress=beside)
    kept = results.load(tmp_path, "counting")
    assert kept is not None
    assert (kept.plan, kept.complete) == (Plan("standard"), True)


def test_plots_are_the_same_files_for_the_same_numbers(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        runner.run(counting(), Plan("smoke"), tmp_path / folder)
    for kind in ("svg", "png"):
        assert (tmp_path / f"a/counting.{kind}").read_bytes() == (tmp_path / f"b/counting.{kind}").read_bytes()


@pytest.mark.parametrize("plan", [Plan("standard"), Plan("smoke", 7)], ids=str)
def test_another_plan_is_refused(tmp_path: Path, plan: Plan) -> None:
    runner.run(counting(), Plan("smoke"), tmp_path)
    before = (tmp_path / "counting.json").read_bytes()
    with pytest.raises(ValueError, match=r"it is smoke, seeds from 0, asked for is .*; use --fresh"):
        runner.run(counting(), plan, tmp_path)
    assert (tmp_path / "counting.json").read_bytes() == before


def test_data_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: the experiment must use images; counting has its own data"):
        runner.run(counting(), Plan("smoke", data=str(tmp_path)), tmp_path)
    with pytest.raises(ValueError, match=r"data: .* must hold MNIST's"):
        runner.run(EXPERIMENTS["batch_size"], Plan("smoke", data=str(tmp_path)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_code_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.run(counting(), Plan("smoke"), tmp_path)
    monkeypatch.setattr(results, "fingerprint", lambda experiment: "other")
    with pytest.raises(ValueError, match="of other code; use --fresh"):
        runner.run(counting(), Plan("smoke"), tmp_path)


def test_the_fingerprint_is_of_what_an_experiment_uses() -> None:
    found = results.sources(EXPERIMENTS["ghost_batch"])
    assert {name.removeprefix("normwise.lab.") for name in found} >= {"experiments.ghost_batch", "replicates"}
    assert not any(word in name for word in ("plots", "intervals", "independence") for name in found)
    codes = {name: results.fingerprint(experiment) for name, experiment in EXPERIMENTS.items()}
    assert len({*codes.values()}) == len(codes)


@pytest.mark.parametrize(("name", "used"), [("language_model", "replicates"), ("data_parallel", "processes")])
def test_the_fingerprint_is_also_of_modules_imported_whole(name: str, used: str) -> None:
    assert f"normwise.lab.{used}" in results.sources(EXPERIMENTS[name])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("def judge(", "def judge(more, "), True),
        (("def plot(", "def plot(more, "), True),
        (("method=__doc__", 'method="other"'), True),
        (("import copy", "import cmath\nimport copy"), True),
        (("ROUNDING = 1e-12", "ROUNDING = 1e-13"), True),
        (("BATCH, PART, CHANNELS = 64, 16, 8", "BATCH, PART, CHANNELS = 64, 32, 8"), False),
        (("@torch.no_grad()", "@torch.enable_grad()"), False),
        (("optimizer.step()", "optimizer.step() or None"), False),
        (("plan.choose(10, 50, 50)", "plan.choose(10, 60, 50)"), False),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_the_fingerprint_is_of_what_makes_the_numbers(
    change: tuple[str, str], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, text = EXPERIMENTS["accumulation"], results._text
    before = results.fingerprint(experiment)
    assert change[0] in text(sys.modules[experiment.trials.__module__])
    monkeypatch.setattr(results, "_text", lambda module: text(module).replace(*change))
    assert (results.fingerprint(experiment) == before) == same


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 99}', '{"schema": 1, "experiment": "counting"}', "\x80"], ids=repr
)
def test_a_file_that_is_not_ours_is_told_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counting.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"must be a result file of schema 1; .*; delete it"):
        runner.run(counting(), Plan("smoke"), tmp_path)
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": "../counting"},
        {"trials": [1, 2]},
        {"trials": None},
        {"seconds": [1]},
        {"seconds": {"0": "1"}},
        {"environment": None},
    ],
    ids=str,
)
def test_a_file_with_other_parts_is_told_and_nothing_is_written_elsewhere(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    runner.run(counting(), Plan("smoke"), tmp_path / "in")
    path = tmp_path / "in" / "counting.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"must be a result file of schema 1; .*; delete it"):
        runner.run(counting(), Plan("smoke"), tmp_path / "in")
    assert [*tmp_path.iterdir()] == [tmp_path / "in"]


def test_a_file_nested_too_deep_is_told(tmp_path: Path) -> None:
    (tmp_path / "counting.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="must be a result file of schema 1; RecursionError"):
        results.load(tmp_path, "counting")


@pytest.mark.parametrize("trials", [{"0": {}}, {"0": {"value": "x"}}, {"0": {"value": 1}}, {"0": 1}], ids=str)
def test_numbers_of_another_version_are_told(tmp_path: Path, trials: dict[str, Any]) -> None:
    runner.run(counting(), Plan("smoke"), tmp_path)
    path = tmp_path / "counting.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"planned": 1, "trials": trials}))
    with pytest.raises(
        ValueError, match=r"must have the numbers that counting judges by; .*; run it anew with --fresh"
    ):
        table.rows(tmp_path, [counting()])


def test_a_plot_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "counting.svg").mkdir()
    with pytest.raises(
        ValueError, match=r"plot: .*counting\.svg and \.png must be writable; .*; choose another folder"
    ):
        runner.run(counting(), Plan("smoke"), tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = dataclasses.replace(counting(), trials=lambda plan: [Trial("a", lambda _: {"value": float("nan")})])
    with pytest.raises(ValueError, match="counting, a: every number must be finite"):
        runner.run(broken, Plan("smoke"), tmp_path)
    record = results.load(tmp_path, "counting")
    assert record is not None
    assert record.trials == {}


def test_a_missing_package_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(results.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(RuntimeError, match=r"missing no-such-package; pip install 'normwise\[lab\]'"):
        runner.run(counting(), Plan("smoke"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be "):
        runner.run(counting(), Plan("smoke"), tmp_path / "file")


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_lab import counting
from normwise.lab import runner, Plan
runner.run(counting(40, 0.05), Plan("smoke"), Path({folder!r}),
           progress=lambda trial, done, total: print(trial.name, flush=True))
"""


def test_killed_at_any_moment_no_finished_seed_is_lost(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(ROOT / "tests"), folder=str(tmp_path))
    begun: list[int] = []
    for lines in (1, 3, 9, 100):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _, line in zip(range(lines), process.stdout, strict=False):
                begun.append(int(line))
            process.send_signal(signal.SIGKILL)
    record = results.load(tmp_path, "counting")
    assert record is not None
    assert len(begun) >= 13
    # What was begun when the process was killed is begun again, and nothing else.
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(begun))
    assert list(record.trials) == [str(seed) for seed in range(len(record.trials))]


def run_cli(
    *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["normwise", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    found = capsys.readouterr()
    return int(stop.value.code or 0), found.out, found.err


@pytest.fixture
def only_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    monkeypatch.setitem(EXPERIMENTS, "counting", counting())


@pytest.mark.usefixtures("only_counting")
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        return run_cli(*arguments, monkeypatch=monkeypatch, capsys=capsys)

    folder = str(tmp_path / "found")
    code, out, err = run("lab", "run", "all", "--size", "smoke", "--results", folder)
    assert (code, err.count("\n")) == (0, 4)
    assert "counting (1 of 1): 3, 75% done" in err
    assert "Seeds are large." in out
    code, out, _ = run("lab", "table", "--json", "--results", folder)
    assert (code, json.loads(out)[0]["verdict"]) == (0, UNDECIDED)
    code, out, _ = run("lab", "table", "--markdown", "--results", folder)
    assert "| [Counts](#counts) | one | the other |" in out
    code, out, _ = run("lab", "show", "counting", "--results", folder)
    assert "1.5 [-0.6, 3.6] things; the claim holds at 1 or more" in out
    assert run("lab", "list")[1] == "counting  Seeds are large.\n"
    assert json.loads(run("lab", "list", "--json")[1])[0]["name"] == "counting"


@pytest.mark.usefixtures("only_counting")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing"], "name: it must be all or one of counting; got 'nothing'"),
        (["run"], "Missing argument 'NAME...'"),
        (["run", "all", "--size", "huge"], "size: it must be one of smoke, standard, full; got 'huge'"),
        (["run", "all", "--seed-base", "-1"], "'--seed-base'"),
        (["show", "counting"], "it holds none of counting; run normwise lab run counting"),
        (["table"], "it holds none of them; run normwise lab run all"),
        (["table", "--markdown", "--json"], "--markdown and --json exclude each other"),
    ],
    ids=str,
)
def test_what_the_command_line_refuses(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("lab", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(results: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setitem(
        EXPERIMENTS, "counting", dataclasses.replace(counting(), trials=lambda plan: [Trial("0", stop)])
    )
    code, out, err = run_cli(
        "lab", "run", "counting", "--results", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys
    )
    assert (code, out) == (130, "")
    assert "what has run is kept; run the same again" in err


def test_what_one_experiment_lacks_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(results: Any) -> dict[str, Any]:
        raise RuntimeError("lacking: a package must be installed; it is not; install it.")

    lacking = dataclasses.replace(counting(), name="lacking", trials=lambda plan: [Trial("0", refuse)])
    for name in list(EXPERIMENTS):
        monkeypatch.delitem(EXPERIMENTS, name)
    for experiment in (lacking, counting(), dataclasses.replace(counting(), name="more")):
        monkeypatch.setitem(EXPERIMENTS, experiment.name, experiment)

    def run(*arguments: str) -> tuple[int, str, str]:
        return run_cli("lab", *arguments, "--json", "--results", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)

    code, out, err = run("run", "all", "--size", "smoke")
    assert (code, [row["experiment"] for row in json.loads(out)]) == (2, ["counting", "more"])
    assert err.endswith("normwise: lacking: a package must be installed; it is not; install it.\n")
    assert [row["experiment"] for row in json.loads(run("show", "all")[1])] == ["counting", "more"]


@pytest.mark.usefixtures("only_counting")
def test_what_is_shown_fits_the_terminal_and_its_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = dataclasses.replace(
        counting(), claim="Long " * 30, method="What?\n\n" + "σ² κ √N 10⁴ 10⁶ " * 20, contrast=Contrast("seed " * 30, 1)
    )
    monkeypatch.setitem(EXPERIMENTS, "counting", long)
    runner.run(long, Plan("smoke"), tmp_path)
    code, out, _ = run_cli(
        "lab", "show", "counting", "--results", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert cli._encodable("σ² κ √N 10⁴ 10⁶") == "sigma^2 kappa sqrtN 10^4 10^6"


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ({"accuracies": [90.0, 97.5, 10.0]}, "none 64  0.01: 90.0 %, 0.1: 97.5 % (used), 1: 10.0 %"),
        ({"nats": [2.5, 2.25, 5.0]}, "none 64  0.01: 2.500 nats, 0.1: 2.250 nats (used), 1: 5.000 nats"),
    ],
    ids=["accuracies", "nats"],
)
def test_the_curve_of_each_tuning_is_printed(scores: dict[str, list[float]], line: str) -> None:
    tuned = {"tune none 64": {"rates": [0.01, 0.1, 1.0], "best": 0.1, "inside": True} | scores, "train none 64": {}}
    record = results.Record("counting", Plan("smoke"), "", 2, {}, tuned, {})
    row = table.Row(counting(), record, Finding(exact(2), "", ""))
    assert line in table.to_text_of(row, 80).splitlines()


def test_agreement_of_two_runs(tmp_path: Path) -> None:
    experiment = counting()
    for name, plan in {"first": Plan("smoke"), "second": Plan("smoke", 1), "third": Plan("smoke", 50)}.items():
        runner.run(experiment, plan, tmp_path / name)
    first, second, third = (table.rows(tmp_path / name, [experiment]) for name in ("first", "second", "third"))
    assert table.agreement(first, second)["effects"][0][-1]
    found = table.agreement(first, third)
    assert not found["effects"][0][-1]
    assert found["verdicts"] == [("counting", UNDECIDED, HOLDS)]


def test_only_what_the_seeds_move_is_counted_as_agreeing() -> None:
    """One estimate has an interval and one has none; of the same trials neither is moved by seeds."""

    def row(seed: int, exactly: float = 0.0) -> table.Row:
        record = results.Record("counting", Plan("smoke", seed), "", 1, {}, {"0": {"value": seed}}, {})
        return table.Row(
            counting(), record, Finding(mean([seed, seed + 1.0]), "", "", others={"exact": exact(exactly)})
        )

    found = table.agreement([row(0)], [row(1)])
    assert [[entry[1] for entry in found[kind]] for kind in ("effects", "exact")] == [["the seed"], ["exact"]]
    assert found["exact"][0][-1]
    assert not table.agreement([row(0)], [row(1, 1e-9)])["exact"][0][-1]
    assert table.agreement([row(0)], [row(0)])["effects"] == []


def test_names_are_file_names_and_all_is_none_of_them() -> None:
    assert all(name.isidentifier() and name != "all" for name in EXPERIMENTS)
    assert chosen(["all"]) == list(EXPERIMENTS.values())


@pytest.mark.parametrize("size", ["smoke", "standard", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_trials_have_names_of_their_own_and_seeds_of_their_own(name: str, size: str) -> None:
    trials = EXPERIMENTS[name].trials(lab.plan(size))
    assert len({trial.name for trial in trials}) == len(trials)
