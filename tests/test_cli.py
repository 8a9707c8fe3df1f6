"""The command line: what it prints and writes, what it refuses in one sentence, and how it exits."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch

import normwise as nw
from normwise import cli
from normwise.lab.replay import replayed

HERE = Path(__file__).parent
FIRST_SCREEN = HERE / "first_screen.txt"
BATCH = np.array([[1.5, -2, 3], [0, 4, 1], [2, 2, -1], [5, 0.25, 7]])


class Result(NamedTuple):
    """What a call left: its exit code and both streams."""

    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the program in an empty folder, within this process."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def call(*arguments: str | Path, stdin: str | bytes = "") -> Result:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "argv", ["normwise", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(left.value.code or 0), captured.out, captured.err)

    return call


def refused(result: Result, *words: str) -> None:
    """One sentence on stderr, nothing on stdout, exit code 2."""
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"normwise: [^\n]+\.\n", result.err)
    assert [word for word in words if word not in result.err] == [], result.err


def program(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The program itself, as the shell runs it."""
    command = [sys.executable, "-c", "from normwise.cli import main; main()", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, encoding="utf-8", **streams)


# The first screen


def unpinned(screen: str) -> str:
    """Without the last digits of torch's own rounding, which differ from machine to machine."""
    return re.sub(r"(?<=largest difference from torch )\S+", "(rounding)", screen)


def test_first_screen(run: Run) -> None:
    found = run("compare")
    assert (found.code, found.err) == (0, "")
    assert unpinned(found.out) == FIRST_SCREEN.read_text(encoding="utf-8")
    (difference,) = re.findall(r"largest difference from torch (\S+)\n", found.out)
    assert float(difference) < 1e-14


def test_first_screen_fits() -> None:
    assert max(map(len, FIRST_SCREEN.read_text(encoding="utf-8").splitlines())) <= 78


FIRST_FACTS = [
    "worked batch, 4 samples x 3 features",
    "s0 2 4 6 -0.447 -0.447 -0.447 -1.225 0.000 1.225",
    "s1 3 5 7 0.447 0.447 0.447 -1.225 0.000 1.225",
    "s2 1 3 5 -1.342 -1.342 -1.342 -1.225 0.000 1.225",
    "s3 4 6 8 1.342 1.342 1.342 -1.225 0.000 1.225",
    "one mean for each COLUMN: 2.5 4.5 6.5 each ROW: 4 5 3 6",
    "variance 1.25 in all three 8/3 = 2.667 in all four",
    "column 2 3 1 4 mean 10/4 = 2.5 variance 5/4 = 1.25",
    "(2 - 2.5) / sqrt(1.25 + eps) = -0.447212",
    "row 2 4 6 mean 12/3 = 4 variance 8/3 = 2.666667",
    "(2 - 4) / sqrt(2.666667 + eps) = -1.224743",
    "Layer Norm made the 4 samples identical, Batch Norm the 3 features",
    "every value is a sample offset + a feature offset. Try --preset broken-symmetry",
    "Neighbour s3 + 1: s0,f0 under Batch Norm goes -0.447 -> -0.507, Layer Norm keeps every bit.",
    "is -1, +1 or -1 (beside s1, s2, s3); alone Batch Norm cannot train on it. Layer Norm: -1.225 every time.",
    "eval() after this one step: Batch Norm gives s0 1.694 3.437 5.180 (running statistics still cold",
    "Layer Norm has no such state.",
    "output depends on the other samples in training never",
    "trains on a single (1, 3) example no yes",
    "needs running statistics at inference yes no",
    "data-parallel must communicate for exactness yes no",
    "nn.BatchNorm1d(3), nn.LayerNorm(3): largest difference from torch",
]
"""The numbers of the worked batch, checked by hand, in the order of the screen."""


def test_first_screen_holds_the_facts_in_order() -> None:
    screen = " ".join(FIRST_SCREEN.read_text(encoding="utf-8").replace("\n  * ", "\n").split())
    places = [screen.find(fact) for fact in FIRST_FACTS]
    assert -1 not in places, FIRST_FACTS[places.index(-1)]
    assert places == sorted(places)


def test_first_screen_promises_no_command_that_is_not_there() -> None:
    commands = set(re.findall(r"normwise (\w+)", FIRST_SCREEN.read_text(encoding="utf-8")))
    assert commands <= set(cli.cli.commands)
    options = set(re.findall(r"--[a-z-]+", FIRST_SCREEN.read_text(encoding="utf-8")))
    assert options <= {option for p in cli.cli.commands["compare"].params for option in p.opts} | {"--help"}


# Sources


def save(path: Path) -> Path:
    """The batch in the format of the suffix."""
    match path.suffix:
        case ".csv":
            path.write_text("a,b,c\n" + "\n".join(",".join(map(str, row)) for row in BATCH.tolist()))
        case ".json":
            path.write_text(json.dumps(BATCH.tolist()))
        case ".npy":
            np.save(path, BATCH)
        case ".npz":
            np.savez(path, x=BATCH)
        case ".safetensors":
            safetensors.torch.save_file({"x": torch.tensor(BATCH)}, path)
        case ".pt":
            torch.save(torch.tensor(BATCH), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json", ".npy", ".npz", ".safetensors", ".pt"])
def test_file(run: Run, tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"batch{suffix}")
    found = run("compare", path, "--json")
    assert (found.code, found.err) == (0, "")
    data = json.loads(found.out)
    assert data["batch"]["values"] == BATCH.tolist()
    assert data["batch"]["name"] == f"batch{suffix}"


@pytest.mark.parametrize("text", ["1.5,-2,3\n0,4,1\n2,2,-1\n5,0.25,7\n", json.dumps(BATCH.tolist())])
def test_stdin(run: Run, text: str) -> None:
    found = run("compare", "-", "--json", stdin=text)
    assert json.loads(found.out)["batch"]["values"] == BATCH.tolist()
    assert json.loads(found.out)["batch"]["name"] == "stdin"


def test_literal_of_one_sample_is_read_so_and_said_so(run: Run) -> None:
    found = run("compare", "[2,4,6]")
    assert found.code == 0
    assert "literal, 1 sample x 3 features" in found.out
    assert "(read as one sample of 3 features)" in found.out
    refusal = "batch_norm: 1 value per channel in training has no variance (x is (1, 3)); use a larger batch, eval() or"
    assert refusal in " ".join(found.out.split())
    assert "-1.225   0.000   1.225" in found.out
    refused(run("compare", "[2,4,6]", "--norms", "batch_norm"), refusal)


def test_presets(run: Run) -> None:
    assert run("compare", "--preset", "worked").out == run("compare").out
    found = run("compare", "--preset", "broken-symmetry").out
    assert "broken-symmetry, 4 samples x 3 features" in found
    assert "s3   4   6  14" in found
    assert "-0.926  -0.463   1.389" in found
    assert "every value is a sample offset" not in found


def test_digits(run: Run) -> None:
    found = run("compare", "digits").out
    assert "digits, 8 samples x 64 features" in found
    assert "17 of 64 features are constant in this batch: Batch Norm gives 0." in found


# Options


def values(run: Run, *arguments: str) -> list[dict[str, Any]]:
    found = run("compare", *arguments, "--json")
    assert (found.code, found.err) == (0, "")
    norms: list[dict[str, Any]] = json.loads(found.out)["norms"]
    return norms


def same(found: dict[str, Any], expected: Any) -> None:
    """The same numbers as from Python."""
    assert found["y"] == expected.y.tolist()
    assert found["title"] == expected.norm.title


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--norms", "all"], {"norms": "all"}),
        (["--norms", "rms_norm, layer_norm"], {"norms": ["rms_norm", "layer_norm"]}),
        (["--norms", "group_norm", "--groups", "3"], {"norms": ["group_norm"], "groups": 3}),
        (["--pattern", "n c -> n"], {"pattern": "n c -> n"}),
        (
            ["--pattern", "n c ->", "--norms", "batch_norm,layer_norm"],
            {"pattern": "n c ->", "norms": "batch_norm,layer_norm"},
        ),
        (["--mode", "eval", "--steps", "10", "--momentum", "0.3"], {"mode": "eval", "steps": 10, "momentum": 0.3}),
        (["--mode", "eval", "--steps", "0"], {"mode": "eval", "steps": 0}),
        (["--weight", "1,2,0.5", "--bias", "0,1,-1"], {"weight": [1, 2, 0.5], "bias": [0, 1, -1]}),
        (["--weight", "[-1, 2, 3e-1]"], {"weight": [-1, 2, 0.3]}),
        (["--eps", "0"], {"eps": 0}),
        (["--eps", "0.5"], {"eps": 0.5}),
        (["--dtype", "bfloat16"], {"dtype": torch.bfloat16}),
        (["--dtype", "float16"], {"dtype": torch.float16}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_those_of_python(run: Run, arguments: list[str], settings: dict[str, Any]) -> None:
    for found, expected in zip(values(run, *arguments), nw.compare(**settings).traces, strict=True):
        if not expected.refused:
            same(found, expected)


@pytest.mark.parametrize(
    ("layout", "shape"), [("nlc", (2, 3, 4)), ("ncl", (2, 3, 4)), ("nchw", (2, 3, 4, 5)), ("nhwc", (2, 3, 4, 5))]
)
def test_layout(run: Run, tmp_path: Path, layout: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    np.save(tmp_path / "x.npy", x)
    for found, expected in zip(
        values(run, "x.npy", "--layout", layout), nw.compare(x, layout=layout).traces, strict=True
    ):
        same(found, expected)
    assert f"axes read as {layout}: " in run("compare", "x.npy", "--layout", layout).out


def test_cell(run: Run) -> None:
    found = run("compare", "--cell", "3,2").out
    assert "s3,f2 = 8 " in found
    assert "(8 - 6.5) / sqrt(1.25 + eps) = 1.341635" in found
    assert "(8 - 6) / sqrt(2.666667 + eps) = 1.224743" in found
    assert "another: --cell 0,0" in found
    assert found == run("compare", "--cell", " 3, 2").out


def test_grad(run: Run) -> None:
    found = run("compare", "--grad").out
    for number in ("0.805", "-1.521", "1.968", "0.510", "-1.021", "1.633", "3.577694", "-2.449485", "1.224743"):
        assert number in found
    assert "dy is the worked example's" in found
    assert "dL/dx" not in run("compare").out


def test_precision(run: Run) -> None:
    found = run("compare", "--precision", "6").out
    for row in (
        "s0 2 4 6 -0.447212 -0.447212 -0.447212",
        "s2 1 3 5 -1.341635 -1.341635 -1.341635",
        "s3 4 6 8 -1.224743 0.000000 1.224743",
        "-0.447212 -> -0.507091",
        "1.694422 3.437257 5.180091",
    ):
        assert row in " ".join(found.split())


def test_summary(run: Run) -> None:
    found = run("compare", "--summary")
    assert found.out.splitlines()[2:] == [
        "Summary (derived from the patterns)         Batch Norm   Layer Norm",
        "    pattern                                 n c -> c     n c -> n",
        "    normalizes across                       samples      features",
        "    depends on the other examples           in training  never",
        "    trains on one value per channel         no           yes",
        "    values per statistic, m                 4            3",
        "    its relative error, √(2/(m-1))          81.6%        100.0%",
        "    needs running statistics at inference   yes          no",
        "    communicates in data-parallel training  yes          no",
        "    commonly used in                        CNNs         transformers, RNNs,",
        "                                                         ConvNeXt",
    ]


def test_allow_nonfinite(run: Run) -> None:
    found = run("compare", "-", "--allow-nonfinite", stdin="1,2\nnan,4\n5,7\n")
    assert found.code == 0
    assert "1 of 6 values is not finite" in found.out


def test_json_is_alone_on_stdout(run: Run, tmp_path: Path) -> None:
    found = run("compare", "--json", "--html", "page.html", "--summary")
    data = json.loads(found.out)
    assert (data["schema"], data["version"]) == ("normwise.comparison", 1)
    assert found.err == "wrote page.html; it embeds the data\n"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_html_replaces_a_file_whole_and_keeps_its_mode(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    path.chmod(0o600)
    (tmp_path / "link.html").symlink_to("page.html")
    assert run("compare", "--html", "link.html").code == 0
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link.html").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.html", "page.html"]


def test_new_html_has_the_mode_of_any_new_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    run("compare", "--html", "page.html")
    assert (tmp_path / "page.html").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_html_to_what_is_no_file_does_not_replace_it(run: Run, tmp_path: Path) -> None:
    """A pipe stands for all of them: a test that fails must not replace a device of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    assert run("compare", "--html", "pipe").code == 0
    assert pipe.is_fifo()
    reader.join(timeout=30)
    assert received[0].startswith("<!doctype html>")


def test_recording(run: Run, tmp_path: Path) -> None:
    """What was recorded, or an experiment's result, in the page beside the batch."""
    model = torch.nn.BatchNorm1d(2)
    with nw.record(model) as recording:
        model(torch.randn(4, 2))
    recording.save(tmp_path / "run.json")
    claim = json.loads((HERE.parent / "docs" / "evidence" / "batch_size.json").read_text(encoding="utf-8"))
    (tmp_path / "lab.json").write_text(json.dumps(claim))
    for name, schema in {"run.json": "normwise.recording", "lab.json": "normwise.lab"}.items():
        found = run("compare", "--html", "page.html", "--recording", name)
        assert (found.code, found.err) == (0, "wrote page.html; it embeds the data\n")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        (text,) = re.findall(r'id="recording">(.*?)</script>', page)
        data = json.loads(text)
        assert data["schema"] == schema
        assert 'id="comparison">{' in page
    assert (data["name"], data["claim"]) == ("batch_size", claim["claim"])
    assert data["verdict"] == f"holds corrected: {claim['finding']['correction']}"
    first, *others = data["effects"]
    assert first == {"label": claim["contrast"]["text"]} | {
        key: claim["finding"]["effect"][key] for key in ("value", "low", "high", "unit")
    }
    assert [other["label"] for other in others] == list(claim["finding"]["others"])


def test_every_result_of_the_evidence_can_be_replayed() -> None:
    paths = sorted((HERE.parent / "docs" / "evidence").glob("*.json"))
    assert len(paths) > 10
    for path in paths:
        data = replayed(json.loads(path.read_text(encoding="utf-8")), path.name)
        assert data["effects"]
        json.dumps(data, allow_nan=False)


RECORDINGS = {
    "none.json": (None, ["recording: none.json must be readable", "No such file"]),
    "broken.json": ("{", ["recording: broken.json must be JSON"]),
    "other.json": ('{"schema": "other"}', ["must be normwise.recording version 1", "'other'"]),
    "begun.json": ('{"schema": 1, "experiment": "leak"}', ["must be a complete result", "run normwise lab run leak"]),
    "odd.json": (
        '{"experiment": "leak", "finding": {"effect": {}, "others": {}}, "verdict": "", "claim": "", "contrast": 3}',
        ["must be a result of normwise lab run", "TypeError"],
    ),
    "numbers.json": (
        '{"experiment": "leak", "finding": {"effect": {"value": "1", "low": 1, "high": 1, "unit": ""}, "others": {}}, '
        '"verdict": "holds", "claim": "c", "contrast": {"text": "t"}}',
        ["the numbers of 't'"],
    ),
}


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("command", [["compare", "--html", "page.html"], ["open", "--no-browser"]], ids="-".join)
def test_bad_recording(run: Run, tmp_path: Path, command: list[str], name: str) -> None:
    content, words = RECORDINGS[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    refused(run(*command, "--recording", name), *words)
    assert not (tmp_path / "page.html").exists()


def test_recording_is_for_the_page(run: Run) -> None:
    refused(run("compare", "--recording", "run.json"), "got no --html; add --html FILE, or use normwise open")


# Refusals


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


FILES: dict[str, Any] = {
    "text.csv": "a,b\n1,2\n3,x\n",
    "ragged.csv": "1,2,3\n4,5\n",
    "empty.csv": "",
    "blank.json": " \n",
    "broken.json": "[[1, 2], [3",
    "nan.csv": "1,2\nnan,4\n",
    "ends.xyz": "1,2\n",
    "short.npy": b"\x93NUMPY",
}
BAD_FILES = [
    ("text.csv", ["line 3, column 2 is 'x'"]),
    ("ragged.csv", ["line 2 has 2, line 1 has 3"]),
    ("empty.csv", ["it is empty"]),
    ("blank.json", ["it is empty"]),
    ("broken.json", ["line 1, column 12"]),
    ("nan.csv", ["every value must be finite", "s1, f0", "--allow-nonfinite"]),
    ("ends.xyz", [".csv", "it ends in '.xyz'"]),
    ("short.npy", ["must be numbers in the npy format"]),
    ("object.npy", ["Python objects", "nothing in it was run"]),
    ("evil.pt", ["Python objects", "nothing in it was run"]),
    ("folder.npy", ["it is a directory"]),
    ("none.npy", ["there is none of this name"]),
    ("two.npz", ["it holds 2: 'a', 'b'", "--key"]),
    ("inf.npy", ["1 of 4 is NaN or inf"]),
    ("bool.npy", ["it holds 'bool'"]),
    ("scalar.npy", ["it is one number"]),
]


@pytest.fixture
def bad_files(tmp_path: Path) -> None:
    """One file of each kind that cannot be read."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "inf.npy", np.array([[1, np.inf], [2, 3]]))
    np.save(tmp_path / "bool.npy", np.array([[True, False]]))
    np.save(tmp_path / "scalar.npy", np.array(3.0))
    np.savez(tmp_path / "two.npz", a=BATCH, b=BATCH)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "folder.npy").mkdir()


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(("name", "words"), BAD_FILES, ids=[name for name, _ in BAD_FILES])
def test_bad_file(run: Run, tmp_path: Path, name: str, words: list[str]) -> None:
    before = sorted(os.listdir(tmp_path))
    refused(run("compare", name, "--html", "out.html"), name, *words)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["[[1,2],[3]]"], ["row 2 has 1 value, row 1 has 2 values"]),
        (["[]"], ["at least one sample"]),
        (['[["a"]]'], ["row 1, value 1 is 'a'"]),
        (["[[1,2]"], ["line 1, column 7"]),
        (["[[1,2],[3,1e999]]"], ["must fit float64"]),
        (["--preset", "nope"], ["worked, broken-symmetry", "'nope'"]),
        (["--preset", "worked", "[1]"], ["drop one"]),
        (["--norms", "nope"], ["batch_norm, layer_norm, rms_norm, group_norm, instance_norm, or all", "'nope'"]),
        (["--norms", ""], ["got ''"]),
        (["--pattern", "n c h w"], ["axes that keep their own statistics"]),
        (["--pattern", "n c -> k"], ["'k' does not"]),
        (["--pattern", "n c -> c n"], ["at least one axis must be averaged"]),
        (["--pattern", "n c h w -> n"], ["4 dimensions; the input has 2"]),
        (["--pattern", "n (c -> n"], ["a parenthesis is left open"]),
        (["--layout", "nchw"], ["the 2 axes of (4, 3)", "use nc"]),
        (["--layout", "nope"], ["'nope'"]),
        (["--dtype", "int8"], ["float64, float32, bfloat16, float16", "'int8'"]),
        (["--mode", "nope"], ["train or eval"]),
        (["--cell", "4,0"], ["an index into (4, 3)", "got 4,0"]),
        (["--cell", "1"], ["give 2 numbers"]),
        (["--cell", "a,b"], ["whole numbers with commas", "'a,b'"]),
        (["--weight", "1,2"], ["3 channels"]),
        (["--weight", "1,x,2"], ["'1,x,2'"]),
        (["--bias", "1,nan,2"], ["every value must be finite"]),
        (["--groups", "2"], ["groups: it is for group_norm"]),
        (["--groups", "2", "--norms", "all"], ["groups: it must divide the 3"]),
        (["--steps", "-1"], ["steps: it must be 0 or more"]),
        (["--momentum", "1.1"], ["momentum: it must be from 0 to 1"]),
        (["--eps", "-1"], ["eps: it must be 0 or more"]),
        (["--eps", "nan"], ["eps: it must be 0 or more and finite"]),
        (["--key", "a"], ["--key 'a'"]),
        (["--html", "no/where.html"], ["html: no/where.html must be writable", "No such file or directory"]),
        (["--html", "."], ["html: . must be writable", "Is a directory"]),
        (["--steps", "x"], ["'--steps': 'x' is not a valid integer", "see normwise compare --help"]),
        (["--precision", "0"], ["'--precision': 0 is not in the range"]),
        (["--precision", "16"], ["'--precision'"]),
        (["--nope"], ["--nope", "see normwise compare --help"]),
        (["a.npy", "b.npy"], ["unexpected extra argument (b.npy)"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith(("-", "[")) else "",
)
def test_refusal(run: Run, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(run("compare", *arguments), *words)
    assert os.listdir(tmp_path) == []


def test_refusal_writes_nothing_beside_a_good_html(run: Run, tmp_path: Path) -> None:
    refused(run("compare", "--html", "page.html", "--cell", "9,9"), "cell:")
    assert os.listdir(tmp_path) == []


def test_unwritable_html(run: Run) -> None:
    refused(run("compare", "--html", "/proc/page.html"), "html: /proc/page.html must be writable")


@pytest.mark.parametrize("text", ["", "1,2\n3,x\n", "[[1, 2], [3", "{}", "\x00\xff"])
def test_bad_stdin(run: Run, text: str) -> None:
    refused(run("compare", "-", stdin=text.encode("latin-1")), "stdin: ")


def test_unknown_command(run: Run) -> None:
    refused(run("data.npy"), "'data.npy'", "see normwise --help")


# Help, environment, streams


def test_no_command_shows_the_help(run: Run) -> None:
    found = run()
    assert (found.code, found.out) == (2, "")
    assert "compare" in found.err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["compare", "--help"], ["env", "-h"], ["--version"]])
def test_help(run: Run, arguments: list[str]) -> None:
    found = run(*arguments)
    assert (found.code, found.err) == (0, "")
    assert found.out
    assert max(map(len, found.out.splitlines())) <= 100


def test_every_option_is_told(run: Run) -> None:
    text = run("compare", "--help").out
    for parameter in cli.cli.commands["compare"].params:
        assert all(option in text for option in parameter.opts if option.startswith("-"))


def test_env(run: Run) -> None:
    found = json.loads(run("env", "--json").out)
    assert found["normwise"] == nw.__version__
    assert found["torch"] == torch.__version__
    assert found["backends"] == nw.backends()
    lines = run("env").out.splitlines()
    assert f"normwise  {nw.__version__}" in lines
    assert any(line.startswith("cuda ") for line in lines)


def test_backends() -> None:
    found = nw.backends()
    assert found["cpu"]
    assert found["cuda"].startswith("unavailable: ") != torch.cuda.is_available()


def test_the_module_itself_imports_nothing_heavy() -> None:
    """So that help and usage errors need none of it, once the package imports lazily."""
    tree = ast.parse(Path(cli.__file__).read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in found if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in found if isinstance(n, ast.ImportFrom)
    }
    assert {str(name).partition(".")[0] for name in names} <= {"__future__", "click", *sys.stdlib_module_names}


def on_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    run(*arguments)
    return terminal.getvalue()


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
def test_width_of_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = re.sub(r"\x1b\[\d*m", "", on_terminal(run, monkeypatch, "compare", "--norms", "all"))
    assert max(map(len, text.splitlines())) <= max(40, min(columns, 120))


def test_colour_on_a_terminal_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[1m" in on_terminal(run, monkeypatch, "compare")
    for name, value in {"NO_COLOR": "1", "TERM": "dumb"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "\x1b" not in on_terminal(run, patch, "compare")


def test_no_colour_when_piped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in run("compare").out


def test_ascii_output(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "größe.npy", np.random.default_rng(0).standard_normal((30, 40)))
    for arguments in (("--summary",), ()):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert run("compare", "größe.npy", *arguments).code == 0
        stream.flush()
        text = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
        assert "gr??e.npy" in text
        assert ("sqrt(2/(m-1))" in text) == bool(arguments)
    assert re.search(r"input .* [_.\-:=+*#]{16}$", text, re.MULTILINE)


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("normwise.explain.load_batch", interrupt)
    assert run("compare") == Result(130, "", "\n")  # a terminal shows ^C on this line


def test_interrupted_by_a_signal() -> None:
    listen = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background does not
    )
    code = f"{listen}; from normwise.cli import main; print('ready', flush=True); main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "compare", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(10):  # its input stays open; a signal that meets it before it reads may be lost
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_reader_that_leaves() -> None:
    with program("compare", "--norms", "all", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk() -> None:
    with open("/dev/full", "w") as full, program("compare", stdout=full) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert err == "normwise: standard output: it must be writable; No space left on device; write elsewhere.\n"


def test_as_the_shell_runs_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C"}
    with program("compare", "--summary", cwd=tmp_path, env=environment) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.isascii()
    assert "sqrt(2/(m-1))" in out


def test_ten_thousand_samples_are_shown_in_seconds(run: Run, tmp_path: Path) -> None:
    """The promise is 5 s with the start of Python and torch, which take about 2; here without, on a shared machine."""
    x = np.random.default_rng(0).standard_normal((10_000, 768), dtype=np.float32)
    x[17, 3] = 300
    np.save(tmp_path / "big.npy", x)
    start = time.perf_counter()
    found = run("compare", "big.npy")
    seconds = time.perf_counter() - start
    assert found.code == 0
    assert "big.npy, 10000 samples x 768 features" in found.out
    assert "Leave s17 out: under Batch Norm" in found.out
    assert "s17,f3 = 300 stands alone among its 10000 values" in found.out
    assert len(found.out.splitlines()) < 70
    assert len([line for line in found.out.splitlines() if re.match(r" +s\d+ ", line)]) == 8
    assert seconds < 15
