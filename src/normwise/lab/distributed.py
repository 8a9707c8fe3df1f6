"""What norms cost over many processes: measured where there are processes, predicted where there are not."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import cost
from .cost import Case, Link
from .environment import environment
from .measure import WORLDS, measure

WIDTH = 80


def distributed_cost(
    links: Sequence[Link] = (),
    *,
    worlds: Sequence[int] | None = None,
    tokens: int = cost.TOKENS,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Predict what the norms of a training step spend on messages, from links or from what is measured here.

    Args:
        links: What to predict for.
        worlds: Numbers of processes to measure all-reduces of on this machine, none if empty; None for 2, 4 and 8
            where there are no links. Without links the fit to the measurement is predicted for.
        tokens: Of a process, in the transformer whose features are split.
        progress: Called with a line of text now and then.

    Returns:
        A report with ``to_text()`` and ``to_json()``.

    Raises:
        ValueError: If there is neither a link nor something to measure, or ``worlds`` or ``tokens`` are out of range.
        RuntimeError: If the processes cannot run.

    Example:
        >>> report = distributed_cost([cost.PRESETS["infiniband-ndr"]])
        >>> report.predictions(report.links[0])[0].processes
        8
    """
    worlds = (() if links else WORLDS) if worlds is None else tuple(sorted(set(worlds)))
    if worlds and not 2 <= worlds[0] <= worlds[-1] <= 64:
        raise ValueError(
            f"processes: each number must be from 2 to 64; got {', '.join(map(str, worlds))}; write for example 2,4,8."
        )
    if tokens < 1:
        raise ValueError(f"tokens: there must be 1 or more; got {tokens}; the default is {cost.TOKENS}.")
    if not (links or worlds):
        raise ValueError("links: there must be one, or something to measure; got neither; pass a link or worlds.")
    about = environment()
    return Report(about, tuple(measure(worlds, progress=progress)) if worlds else (), tuple(links), tokens)


@dataclasses.dataclass(frozen=True)
class Report:
    """Measured cases, the model that is fitted to part of them, and its predictions; each part may be missing."""

    environment: dict[str, Any]
    cases: tuple[Case, ...]
    given: tuple[Link, ...]
    tokens: int

    @property
    def fitted(self) -> Link | None:
        """The model that fits the cases that are not held out, None without cases."""
        return cost.fit([case for case in self.cases if not self.held_out(case)]) if self.cases else None

    @property
    def links(self) -> tuple[Link, ...]:
        """What is predicted for: the links that were given, else the fitted one."""
        return self.given or ((self.fitted,) if self.fitted else ())

    def held_out(self, case: Case) -> str:
        """Why the fit does not see a case: more ``"processes"`` than it takes, or every other ``"size"``.

        It takes no more processes than there are cores, and of several numbers not the largest.
        """
        worlds = sorted({c.processes for c in self.cases})
        if case.processes not in ([w for w in worlds[:-1] if w <= self.environment["cores"]] or worlds[:1]):
            return "processes"
        return "size" if sorted({c.size for c in self.cases}).index(case.size) % 2 else ""

    def predictions(self, link: Link) -> list[cost.Prediction]:
        """One for each number of processes, 8 to 16,384."""
        return [cost.predict(link, processes, self.tokens) for processes in cost.PROCESSES]

    def to_json(self) -> str:
        """Everything, with measured and predicted apart; seconds, bytes, bytes per second."""
        channels = cost.resnet50_channels()
        found: dict[str, Any] = {
            "environment": self.environment,
            "model": {"ring_all_reduce": cost.RING, "tree_all_reduce": cost.TREE},
            "sync_batch_norm": {
                "model": "ResNet-50",
                "norms": len(channels),
                "channels": sum(channels),
                "forward_bytes": cost.FORWARD * sum(channels),
                "backward_bytes": cost.BACKWARD * sum(channels),
            },
            "layer_norm": {
                "norms": cost.transformer_norms(),
                "bytes": 0,
                "sharded_over": cost.SHARDS,
                "tokens": self.tokens,
                "sharded_bytes_of_a_process": cost.transformer_norms() * sum(cost.ROW) * self.tokens,
            },
            "measured": None,
            "predicted": [
                {"link": _plain(link), "steps": [dataclasses.asdict(p) for p in self.predictions(link)]}
                for link in self.links
            ],
        }
        if self.fitted is not None:
            found["measured"] = {
                "cases": [
                    {
                        **dataclasses.asdict(case),
                        "held_out": self.held_out(case) or None,
                        "error_of_model": cost.error(self.fitted, case),
                    }
                    for case in self.cases
                ],
                "fitted": _plain(self.fitted),
                "errors": {name or "fitted": errors for name, errors in self._errors(self.fitted).items()},
            }
        return json.dumps(found, indent=2)

    def to_text(self) -> str:
        """The same as tables of at most 80 columns."""
        parts = [*self._measured(), *(part for link in self.links for part in self._predicted(link)), *self._notes()]
        return "\n".join(parts) + "\n"

    def _errors(self, fitted: cost.Link) -> dict[str, dict[str, float]]:
        """The median and the largest size of the errors: of the fitted cases and of each kind held out."""
        found: dict[str, list[float]] = {}
        for case in self.cases:
            found.setdefault(self.held_out(case), []).append(abs(cost.error(fitted, case)))
        return {name: {"median": statistics.median(sizes), "worst": max(sizes)} for name, sizes in found.items()}

    def _measured(self) -> Iterator[str]:
        if self.fitted is None:
            return
        about, fitted = self.environment, self.fitted
        busy = "" if about["load"] is None else f", {about['load']} in use before"
        yield _wrapped(
            f"Measured: gloo all-reduces of int64 on this machine, {about['cores']} cores{busy}, torch "
            f"{about['torch']}, {about['date'][:10]}. Time is the median, +- half the distance of the quartiles."
        )
        rows = [
            [
                "measured",
                str(case.processes),
                size(case.size),
                duration(case.median),
                f"{(case.quartiles[1] - case.quartiles[0]) / 2 / case.median:.0%}",
                duration(cost.ring_all_reduce(fitted, case.processes, case.size)),
                f"{cost.error(fitted, case):+.0%}",
                "held out" if self.held_out(case) else "fitted",
            ]
            for case in self.cases
        ]
        yield table(["", "processes", "bytes", "time", "+-", "model", "error", "case"], rows)
        yield ""
        yield _wrapped(f"Model: time = {cost.RING}. Fitted: {_figures(fitted)}.")
        yield from self._verdict(fitted)
        yield ""

    def _verdict(self, fitted: Link) -> Iterator[str]:
        most, cores = max(case.processes for case in self.cases), self.environment["cores"]
        titles = {"": "Fitted cases", "size": "Held out, other sizes", "processes": "Held out, more processes"}
        errors = self._errors(fitted)
        for name in (name for name in titles if name in errors):
            median, worst = errors[name]["median"], errors[name]["worst"]
            yield f"{titles[name]}: the model is off by {median:.0%} in the median, {worst:.0%} at worst."
        if most > cores:
            yield _wrapped(
                f"Up to {most} processes took turns on {cores} cores: waiting for a core is part of their time and not "
                "in the model, so this machine does not tell how well it extrapolates to more processes."
            )

    def _predicted(self, link: Link) -> Iterator[str]:
        yield _wrapped(f"Predicted, not measured: time of the norms' messages in a training step over {link.name}.")
        yield _wrapped(f"Latency {duration(link.latency)}: {link.latency_source}.")
        yield _wrapped(f"Bandwidth {rate(link.bandwidth)}: {link.bandwidth_source}.")
        rows = [
            ["predicted", *(f"{v:,}" if isinstance(v, int) else duration(v) for v in dataclasses.astuple(p))]
            for p in self.predictions(link)
        ]
        titles = ["", "processes", "local BN", "SyncBN ring", "SyncBN tree", "LayerNorm", "sharded LN"]
        yield table(titles, rows)
        wires = [cost.predict(dataclasses.replace(link, latency=0.0), p) for p in cost.PROCESSES]
        low, high = (duration(p.sync_batch_norm_ring) for p in (wires[0], wires[-1]))
        yield _wrapped(f"SyncBN: the bytes take {low} to {high} of these, latency the rest.")
        yield ""

    def _notes(self) -> Iterator[str]:
        channels, norms, total = cost.resnet50_channels(), cost.transformer_norms(), cost.FORWARD + cost.BACKWARD
        yield _wrapped(f"ring: time = {cost.RING}.")
        yield _wrapped(f"tree: time = {cost.TREE}.")
        yield _wrapped(
            "normwise leaves the choice to the backend: gloo runs the ring, NCCL what it estimates to be faster."
        )
        yield _wrapped(
            f"SyncBN: ResNet-50, {len(channels)} norms, {sum(channels):,} channels; an all-reduce each way a norm, "
            f"{cost.FORWARD} + {cost.BACKWARD} bytes a channel, {total * sum(channels) / 1e6:.1f} MB a step, without "
            "a message's tag of 8 bytes and gloo's padding. local BN: the same, each process alone: 0 bytes."
        )
        yield _wrapped(
            f"LayerNorm: {norms} norms of a transformer of 32 layers, data parallel: 0 bytes. sharded LN: its features "
            f"split over {cost.SHARDS} processes, {self.tokens:,} tokens a step; a gather each way a norm, "
            f"{cost.ROW[0]} + {cost.ROW[1]} bytes a token and process."
        )
        yield _wrapped("Not in the model: computation, waiting for the slowest, contention, gradients of weights.")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first aligned left."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in (titles, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> duration(0.0123), duration(2e-6), duration(5000.0), duration(0.0)
        ('12.3 ms', '2 us', '5,000 s', '0')
    """
    if seconds == 0:
        return "0"
    unit, name = next(
        ((unit, name) for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= 0.9995 * unit),
        (1e-9, "ns"),
    )
    return f"{seconds:,.0f} s" if 999.5 <= seconds < 1e5 else f"{seconds / unit:.3g} {name}"


def size(count: int) -> str:
    """Bytes in KiB or MiB where they are whole."""
    unit, name = next((u, n) for u, n in ((2**20, "MiB"), (2**10, "KiB"), (1, "B")) if count % u == 0)
    return f"{count // unit} {name}"


def rate(bandwidth: float) -> str:
    """Bytes per second in GB/s."""
    return f"{bandwidth / 1e9:.3g} GB/s each way"


def _figures(link: Link) -> str:
    return f"latency {duration(link.latency)}, bandwidth {rate(link.bandwidth)}"


def _plain(link: Link) -> dict[str, Any]:
    """A link for JSON, which has no infinity."""
    return {**dataclasses.asdict(link), "bandwidth": None if math.isinf(link.bandwidth) else link.bandwidth}


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
