"""The cost of norms over many processes: the model, what it recovers, what norms send, and a measurement of two."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from normwise import cli
from normwise.exchange.group import Exchange
from normwise.lab import Report, cost, distributed_cost
from normwise.lab.cost import Case, Link
from normwise.lab.distributed import duration
from normwise.lab.measure import SIZES, _collect
from normwise.ops.common import OPS

LINK = Link("planted", latency=3e-5, bandwidth=2e9)


# The model


def steps_of_ring(p: int, size: float) -> list[float]:
    """Reduce-scatter, then all-gather: in each step a process passes on one of p parts."""
    return 2 * (p - 1) * [size / p]


def steps_of_tree(p: int, size: float) -> list[float]:
    """Halves, quarters, ... are exchanged and added up; then the way back."""
    down = [size / 2**k for k in range(1, int(math.log2(p)) + 1)]
    return down + down[::-1]


@pytest.mark.parametrize("p", [2, 8, 1024, 16384])
@pytest.mark.parametrize(
    ("time", "steps"), [(cost.ring_all_reduce, steps_of_ring), (cost.tree_all_reduce, steps_of_tree)]
)
def test_the_formula_is_the_sum_of_the_steps(time: Callable[..., float], steps: Callable[..., list[float]], p: int):
    want = sum(LINK.latency + size / LINK.bandwidth for size in steps(p, 1e6))
    assert time(LINK, p, 1e6) == pytest.approx(want, rel=1e-12)


def test_a_gather_passes_on_all_the_others_bytes():
    assert cost.ring_all_gather(LINK, 8, 1000) == pytest.approx(7 * (3e-5 + 1000 / 2e9), rel=1e-12)


def planted(link: Link, worlds: tuple[int, ...] = (2, 4, 8), noise: float = 0.0) -> list[Case]:
    draw = random.Random(0)
    times = {
        (p, n): cost.ring_all_reduce(link, p, n) * draw.uniform(1 - noise, 1 + noise) for p in worlds for n in SIZES
    }
    return [Case(p, n, t, (0.9 * t, 1.1 * t)) for (p, n), t in times.items()]


@pytest.mark.parametrize("link", [LINK, Link("", 2e-6, 450e9), Link("", 0.1, 1e6)])
def test_the_fit_recovers_what_was_planted(link):
    found = cost.fit(planted(link))
    assert (found.latency, found.bandwidth) == pytest.approx((link.latency, link.bandwidth), rel=1e-6)
    assert max(abs(cost.error(link, case)) for case in planted(link)) < 1e-12
    found = cost.fit(planted(link, noise=0.1))
    assert (found.latency, found.bandwidth) == pytest.approx((link.latency, link.bandwidth), rel=0.1)


def test_the_fit_is_never_negative():
    shrinking = [Case(2, n, t, (t, t)) for n, t in ((8, 2e-3), (2**20, 1e-3))]
    assert math.isinf(cost.fit(shrinking).bandwidth)
    steep = [Case(2, n, t, (t, t)) for n, t in ((2**19, 1e-3), (2**20, 4e-3))]
    assert cost.fit(steep).latency == 0
    with pytest.raises(ValueError, match="2 or more sizes"):
        cost.fit(shrinking[:1])
    with pytest.raises(ValueError, match="2 or more sizes"):
        cost.fit([shrinking[0], shrinking[0]])


def test_the_fit_weighs_relative_errors():
    """An outlier of many milliseconds does not hide how far the short messages are off."""
    cases = planted(LINK)
    cases[-1] = replace(cases[-1], median=2 * cases[-1].median)
    errors = [abs(cost.error(cost.fit(cases), case)) for case in cases[:-1]]
    assert max(errors) < 0.15


# What norms send


def test_resnet50():
    channels = cost.resnet50_channels()
    assert (len(channels), sum(channels), max(channels)) == (53, 26560, 2048)
    assert sum(channels.count(c) for c in (64, 128, 256, 512, 1024, 2048)) == 53
    assert channels.count(2048) == 3 + 1


def test_bytes_are_those_that_the_layer_sends():
    x = torch.randn(4, 6, 3)
    sums = OPS.batch_norm_sums.default(x, 1e-5, None, True)
    mean, var, _ = OPS.batch_norm_moments.default(sums)
    back = OPS.batch_norm_gradient_sums.default(x, x, mean, var, 1e-5, None, True)
    assert (sums.nbytes, back.nbytes) == (6 * cost.FORWARD, 6 * cost.BACKWARD)
    unpadded = SimpleNamespace(_padded=lambda size, device: size)
    assert Exchange._message(unpadded, sums, 1).nbytes == sums.nbytes + 8  # the tag, which the page says is left out


def test_predictions():
    (p,) = [p for p in distributed_cost([LINK]).predictions(LINK) if p.processes == 64]
    sent = 26560 * (cost.FORWARD + cost.BACKWARD)
    assert p.sync_batch_norm_ring == pytest.approx(106 * 126 * 3e-5 + 2 * 63 / 64 * sent / 2e9)
    assert p.sync_batch_norm_tree == pytest.approx(106 * 12 * 3e-5 + 2 * 63 / 64 * sent / 2e9)
    assert p.sharded_layer_norm == pytest.approx(65 * 7 * (6e-5 + 4096 * (24 + 16) / 2e9))
    assert p.batch_norm == p.layer_norm == 0.0
    more = distributed_cost([LINK], tokens=8192).predictions(LINK)
    assert more[0].sharded_layer_norm > p.sharded_layer_norm
    assert [p.processes for p in more] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]


# Units


@pytest.mark.parametrize(
    ("text", "value"),
    [("5us", 5e-6), ("5 µs", 5e-6), (" 5e-6 ", 5e-6), ("0.3ms", 3e-4), ("250ns", 2.5e-7), ("1s", 1.0), (".5ms", 5e-4)],
)
def test_latencies(text, value):
    assert cost.seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("25GB/s", 25e9), ("100Gbit/s", 12.5e9), ("2.5e10", 2.5e10), ("1.5 TB/s", 1.5e12), ("800 Mbit/s", 1e8)],
)
def test_bandwidths(text, value):
    assert cost.bytes_per_second(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "-5us", "0", "5 parsecs", "inf", "nan", "1e999", "5us5", "25GB/s"])
def test_what_is_no_latency(text):
    with pytest.raises(ValueError, match=rf"^latency: it must be .*; got {re.escape(repr(text))}; write .*\.$"):
        cost.seconds(text)


@pytest.mark.parametrize("text", ["25GB", "25Gb/s", "100 gbit/s", "5us", "-1"])
def test_what_is_no_bandwidth(text):
    with pytest.raises(ValueError, match=r"^bandwidth: .*Gbit/s"):
        cost.bytes_per_second(text)


def test_durations():
    times = {1e-9: "1 ns", 0.9999e-3: "1 ms", 0.0012345: "1.23 ms", 99.96: "100 s", 999.7: "1,000 s", 1e6: "1e+06 s"}
    assert [duration(t) for t in times] == list(times.values())


# The report


ABOUT = {"torch": "2.13.0", "cores": 4, "load": 0.1, "date": "2026-11-23T00:00:00+00:00"}


def report(*links: Link, cores: int = 4, noise: float = 0.0) -> Report:
    return Report({**ABOUT, "cores": cores}, tuple(planted(LINK, (2, 4, 64), noise)), links, 4096)


@pytest.mark.parametrize("links", [(), tuple(cost.PRESETS.values()), (Link("the given link", 1.0, 1.0),)], ids=len)
def test_text_fits_80_columns_and_says_which_is_which(links):
    text = report(*links, noise=0.3).to_text()
    assert max(map(len, text.splitlines())) <= 80
    measured, _, predicted = text.partition("Predicted, not measured")
    rows = re.findall(r"^(measured|predicted) ", text, re.MULTILINE)
    assert rows == 27 * ["measured"] + 12 * (len(links) or 1) * ["predicted"]
    assert "\npredicted" not in measured
    assert "\nmeasured" not in predicted
    assert cost.RING in re.sub(r"\s+", " ", measured)
    assert all(link.latency_source.partition(" ")[0] in predicted for link in links)


@pytest.mark.parametrize(("cores", "fitted"), [(1, {2}), (2, {2}), (4, {2, 4}), (64, {2, 4})])
def test_what_is_held_out(cores, fitted):
    found = report(cores=cores)
    kinds = {(c.processes, c.size): found.held_out(c) for c in found.cases}
    assert {p for (p, _), kind in kinds.items() if kind != "processes"} == fitted
    assert {n for (p, n), kind in kinds.items() if p == 2 and kind == "size"} == set(SIZES[1::2])
    assert ("took turns" in found.to_text()) == (cores < 64)


def test_errors_are_those_of_the_held_out_cases():
    found = report()
    bad = tuple(replace(c, median=2 * c.median) if c.processes == 64 else c for c in found.cases)
    text = replace(found, cases=bad).to_text()
    assert "Fitted cases: the model is off by 0% in the median, 0% at worst." in text
    assert "Held out, more processes: the model is off by 50% in the median, 50% at worst." in text


def test_json():
    found = json.loads(report(noise=0.1).to_json())
    assert found["environment"].keys() >= {"torch", "cores", "date"}
    assert found["sync_batch_norm"]["forward_bytes"] == 26560 * cost.FORWARD
    assert found["layer_norm"]["sharded_bytes_of_a_process"] == 65 * (24 + 16) * found["layer_norm"]["tokens"]
    assert len(found["measured"]["cases"]) == 27
    assert found["measured"]["errors"].keys() == {"fitted", "size", "processes"}
    assert found["measured"]["fitted"] == found["predicted"][0]["link"]
    assert found["measured"]["fitted"]["latency"] == pytest.approx(LINK.latency, rel=0.1)
    assert found["model"] == {"ring_all_reduce": cost.RING, "tree_all_reduce": cost.TREE}
    flat = Report(ABOUT, tuple(Case(2, n, 1e-3 / n, (1e-3 / n, 1e-3 / n)) for n in SIZES), (), 1)
    assert json.loads(flat.to_json(), parse_constant=pytest.fail)["measured"]["fitted"]["bandwidth"] is None
    assert max(map(len, flat.to_text().splitlines())) <= 80


@pytest.mark.parametrize("arguments", [{"worlds": [1, 2]}, {"worlds": [65]}, {"tokens": 0}, {"worlds": []}], ids=str)
def test_what_is_refused(arguments):
    with pytest.raises(ValueError, match=r"^\w+: [^.]+\.$"):
        distributed_cost(**{"links": [] if "worlds" in arguments else [LINK], **arguments})


# The command line


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Any]:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["normwise", "lab", "distributed", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    return call


def test_a_preset_is_predicted_for_and_nothing_measured(run):
    code, out, err = run("--preset", "infiniband-ndr", "--preset", "nvlink4")
    assert (code, err) == (0, "")
    assert out.count("\npredicted ") == 24
    assert "\nmeasured" not in out
    assert out.count("Latency 5 us: assumption") == out.count("ConnectX-7 data sheet") == 1


def test_a_link_is_given(run):
    code, out, err = run("--latency", "5us", "--bandwidth", "400Gbit/s", "--tokens", "8192", "--json")
    found = json.loads(out)
    assert (code, err, found["measured"]) == (0, "", None)
    assert [p["link"]["bandwidth"] for p in found["predicted"]] == [50e9]
    assert found["layer_norm"]["tokens"] == 8192


def test_nothing_measured_is_every_preset(run):
    found = json.loads(run("--no-measure", "--json")[1])
    assert [p["link"]["name"] for p in found["predicted"]] == [link.name for link in cost.PRESETS.values()]
    assert re.fullmatch(r"[\w, -]+", cli.PRESETS)
    assert cli.PRESETS.split(", ") == list(cost.PRESETS)


def test_one_figure_alone_changes_the_presets():
    (link,) = cost.links(["nvlink4"], latency="5e-6")
    assert link == dataclasses.replace(cost.PRESETS["nvlink4"], latency=5e-6, latency_source="given")
    (link,) = cost.links(["nvlink4"], bandwidth="5GB/s")
    assert link == dataclasses.replace(cost.PRESETS["nvlink4"], bandwidth=5e9, bandwidth_source="given")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "pigeon"], "preset: it must be one of nvlink4, infiniband-ndr, ethernet-100g; got 'pigeon'"),
        (["--latency", "5us"], "bandwidth: it must come with latency"),
        (["--bandwidth", "5GB/s"], "latency: it must come with bandwidth"),
        (["--latency", "5 miles", "--bandwidth", "5GB/s"], "latency: it must be a positive number"),
        (["--no-measure", "--processes", "2"], "processes: they are to be measured; got --no-measure too"),
        (["--processes", ""], "processes: it must be whole numbers with commas; got ''"),
        (["--processes", "two"], "processes: it must be whole numbers with commas; got 'two'"),
        (["--processes", "1,2"], "processes: each number must be from 2 to 64; got 1, 2"),
        (["--preset", "nvlink4", "--tokens", "0"], "tokens: there must be 1 or more; got 0"),
        (["--tokens", "many"], "many"),
    ],
    ids=str,
)
def test_bad_usage_is_one_sentence(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"normwise: [^\n]+\.\n", err)
    assert words in err


# Real processes


def test_two_processes_are_measured(run):
    code, out, err = run("--processes", "2", "--json")
    assert (code, err) == (0, "starting 2 processes ...\nall-reduces of 2 processes ...\n")
    cases = json.loads(out)["measured"]["cases"]
    assert [(c["processes"], c["size"]) for c in cases] == [(2, size) for size in SIZES]
    assert all(0 < c["quartiles"][0] <= c["median"] <= c["quartiles"][1] for c in cases)
    assert {c["held_out"] for c in cases} == {None, "size"}


@pytest.mark.parametrize("error", ["Connection reset by peer", None])
def test_what_went_wrong_in_a_process_is_told(error):
    (ours, theirs), (other, kept) = multiprocessing.Pipe(), multiprocessing.Pipe()
    case = Case(2, 64, 1e-3, (1e-3, 1e-3))
    theirs.send((False, [case]))
    if error:
        theirs.send((True, error))
    theirs.close()
    with pytest.raises(RuntimeError, match=rf"must run; rank 1: {error or 'it ended'}; try fewer --processes\.$"):
        _collect([other, ours], (2, 4), lambda text: None)
    kept.close()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_interrupted_while_measuring():
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listen}; from normwise.cli import main; main()", "lab", "distributed"]
    with subprocess.Popen(
        [*command, "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, to which a terminal would send it
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "starting 2 processes ...\n"
        assert process.stderr.readline() == "all-reduces of 2 processes ...\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)  # which ends when no process has its stderr any more
    assert (process.returncode, out, err) == (130, "", "\n")
