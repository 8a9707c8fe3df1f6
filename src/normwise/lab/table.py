"""The evidence: what people say of norms, with what was measured in each place."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from . import results
from .experiment import CORRECTED, Experiment, Finding, Numbers
from .intervals import Effect, agrees
from .results import Record

TITLES = ("", "Batch Norm", "Layer Norm", "The claim")


@dataclass(frozen=True)
class Row:
    """One experiment that has run to its end."""

    experiment: Experiment
    record: Record
    finding: Finding

    @property
    def verdict(self) -> str:
        """Computed from the numbers now, whatever the file says."""
        return self.experiment.verdict(self.finding)

    @property
    def effects(self) -> dict[str, Effect]:
        """The contrast's and the others, by what they compare."""
        return {self.experiment.contrast.text: self.finding.effect, **self.finding.others}

    @property
    def curves(self) -> dict[str, list[tuple[float, str, bool]]]:
        """Of each tuning on validation data the rates, what each scores, and whether it is the one that is used."""
        tuned = {name.removeprefix("tune "): t for name, t in self.record.trials.items() if "best" in t}
        return {
            name: [
                (rate, score, rate == found["best"]) for rate, score in zip(found["rates"], _scores(found), strict=True)
            ]
            for name, found in tuned.items()
        }

    @property
    def judgement(self) -> str:
        """The verdict, with the correction if there is one."""
        found = self.verdict
        return f"{found}: {self.finding.correction}" if found == CORRECTED else found

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Of the table: what is compared, both norms, and what became of the claim."""
        claim = f'"{self.experiment.claim}" {self.judgement}'
        return self.experiment.aspect, self.finding.batch_norm, self.finding.layer_norm, claim


def _scores(tuned: Numbers) -> list[str]:
    """With their unit: a model of text costs nats, others are right."""
    if "nats" in tuned:
        return [f"{nats:.3f} nats" for nats in tuned["nats"]]
    return [f"{accuracy:.1f} %" for accuracy in tuned["accuracies"]]


def rows(folder: Path, experiments: Sequence[Experiment]) -> list[Row]:
    """Of the experiments whose results are there and complete.

    Raises:
        ValueError: If a file is not one of ours.
        RuntimeError: If a package of the lab is missing.
    """
    results.need_packages()
    records = ((experiment, results.load(folder, experiment.name)) for experiment in experiments)
    return [_row(folder, e, record) for e, record in records if record is not None and record.complete]


def _row(folder: Path, experiment: Experiment, record: Record) -> Row:
    """Files of other versions of the experiment, and damaged ones, may lack what it judges by."""
    try:
        return Row(experiment, record, experiment.judge(record.trials))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"results: {results.path_of(folder, experiment.name)} must have the numbers that {experiment.name} judges "
            f"by; {type(error).__name__} at {error}; run it anew with --fresh."
        ) from None


def to_text(found: Sequence[Row], width: int, color: bool) -> str:
    """For a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 1, 0), width=width)
    for title, ratio in zip(TITLES, (2, 3, 3, 4), strict=True):
        table.add_column(title, ratio=ratio, overflow="fold")
    for row in found:
        table.add_row(*row.cells)
    out = StringIO()
    Console(file=out, width=width, force_terminal=color, highlight=False, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def to_json(found: Sequence[Row]) -> str:
    """For programs: each row with its finding, size, seeds and environment."""
    return json.dumps([_plain(row) for row in found], indent=2)


def _plain(row: Row) -> dict[str, Any]:
    return {
        "experiment": row.experiment.name,
        "aspect": row.experiment.aspect,
        "claim": row.experiment.claim,
        **results.described(row.experiment, row.finding),
        "size": row.record.plan.size,
        "seed_base": row.record.plan.seed_base,
        "environment": row.record.environment,
    }


def to_markdown(found: Sequence[Row], page: str = "") -> str:
    """A table whose first column links to the experiments' places in the page."""
    lines = [f"| {' | '.join(TITLES)} |", "|---|---|---|---|"]
    for row in found:
        aspect, *others = map(escaped, row.cells)
        anchor = re.sub(r"[^\w -]", "", row.experiment.aspect.lower()).replace(" ", "-")  # as GitHub makes them
        lines.append(f"| [{aspect}]({page}#{anchor}) | {' | '.join(others)} |")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """For a cell in Markdown."""
    return re.sub(r"([|*_<\[\]])", r"\\\1", text)


def to_text_of(row: Row, width: int) -> str:
    """One experiment in full: claim, contrast, method, what was found."""
    experiment, plan = row.experiment, row.record.plan
    contrast = experiment.contrast
    bound = f"within +-{contrast.smallest:g}" if contrast.equal else f"{contrast.smallest:g} or more"
    said = [
        f"{experiment.name}: {experiment.aspect}",
        f'claim     "{experiment.claim}"',
        f"verdict   {row.judgement}",
        f"contrast  {contrast.text}",
        f"          {row.finding.effect}; the claim holds at {bound}",
        f"size      {plan.size}, seeds from {plan.seed_base}, {sum(row.record.seconds.values()):.0f} s",
    ]
    column = width - 2 - max(len(str(effect)) for effect in row.effects.values())
    wide = min(column, max(map(len, row.effects)))
    found = []
    for name, effect in row.effects.items():
        start, *rest = textwrap.wrap(name, wide, subsequent_indent="  ")
        found += [f"{start:{wide}}  {effect}", *rest]
    curves = [
        f"{name}  " + ", ".join(f"{rate:.2g}: {score}{' (used)' * used}" for rate, score, used in curve)
        for name, curve in row.curves.items()
    ]
    if curves:
        found += ["", "learning rates, and what they score on validation data", *_filled(curves, width)]
    lines = [
        *(textwrap.fill(line, width, subsequent_indent=" " * 10) for line in said),
        "",
        *(textwrap.fill(part, width) + "\n" for part in experiment.method.strip().split("\n\n")),
        *found,
        "",
        *_filled(row.finding.sentences, width),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _filled(lines: Sequence[str], width: int) -> list[str]:
    return [textwrap.fill(line, width, subsequent_indent="  ") for line in lines]


def agreement(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Any]:
    """How a second run, with other seeds, compares.

    Returns:
        ``verdicts``: of each experiment in both, (name, first, second). ``effects``: of each estimate that the seeds
        move, (name, comparison, first, second, whether they agree). ``exact``: the same of the others, which have no
        interval, or whose experiment draws nothing.
    """
    again = {row.experiment.name: row for row in second}
    pairs = [(row, again[row.experiment.name]) for row in first if row.experiment.name in again]
    found: dict[str, Any] = {"verdicts": [(a.experiment.name, a.verdict, b.verdict) for a, b in pairs]}
    found |= {"effects": [], "exact": []}
    for a, b in pairs:
        for name in (name for name in a.effects if name in b.effects):
            one, other = a.effects[name], b.effects[name]
            moved = a.record.trials != b.record.trials and (one.low < one.high or other.low < other.high)
            agree = agrees(one, other) if moved else one == other
            found["effects" if moved else "exact"].append((a.experiment.name, name, one, other, agree))
    return found
