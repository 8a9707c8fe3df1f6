"""Writes evidence.md, the README's claims and what the page quotes, from evidence/, which `make evidence` measures."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path

from normwise.lab import results, table
from normwise.lab.experiments import EXPERIMENTS
from normwise.lab.table import Row

DOCS = Path(__file__).parent
QUOTED = ("leak",)
"""The experiments whose effect the interactive page shows beside its own numbers."""
BEGIN, END = "<!-- claims: written by docs/write_evidence.py -->\n", "<!-- claims end -->\n"

HEAD = """# Evidence

What people say of Batch Norm and Layer Norm, each claim beside what was measured. Written by `docs/write_evidence.py`
from the results in [evidence/](evidence/), which `make evidence` measures anew; `normwise lab run NAME` measures one.

A verdict is computed: each experiment has one contrast with a smallest effect of interest, both fixed before it ran.
The claim *holds* if the 95 % confidence interval lies beyond that effect, *does not hold* if it lies short of it, and
is *undecided* otherwise; it holds *corrected* if its words reach further than the numbers. Intervals are over seeds, on
these data and models, at the learning rates that one tuning found: they do not say how far a result carries to others,
and another tuning can move an estimate further. There are 10 seeds where a method names no other number, and 1 or 2
others for each tuning; they are not those with which the experiments were written.
"""


def page(first: list[Row], second: list[Row]) -> str:
    """All of evidence.md."""
    parts = [HEAD, *_environment(first, second), table.to_markdown(first)]
    parts += [_section(row) for row in first]
    return "\n".join([*parts, *_again(first, second)])


def _environment(first: list[Row], second: list[Row]) -> list[str]:
    plans = sorted({f"{row.record.plan.size}, seeds from {row.record.plan.seed_base}" for row in first})
    every = list(map(_span, [*first, *second]))
    most = max(sum(a <= start < b for a, b in every) for start, _ in map(_span, first))
    machines = sorted({_machine(row) for row in first})
    runs = [[row for row in first if _machine(row) == machine] for machine in machines]
    about = [f"{machine}: {_run(rows)}" for machine, rows in zip(machines, runs, strict=True)]
    return [
        f"Measured with {_norms(first)}. Size {'; '.join(plans)}. Up to {most} experiments ran at a time. "
        f"{_code([*first, *second])}\n",
        *(f"- {line}" for line in about),
        "",
    ]


def _run(rows: list[Row]) -> str:
    """What ran on one machine on one day, and how long."""
    spans = [_span(row) for row in rows]
    loads = [row.record.environment["load"] or 0.0 for row in rows]
    what = ", ".join(row.experiment.name for row in rows) if len(rows) < 3 else f"{len(rows)} experiments"
    added = sum(end - start for start, end in spans) / 60
    return (
        f"{what}, {_clock(spans) / 60:.0f} minutes by the clock, {added:.0f} added up; "
        f"load {min(loads)} to {max(loads)} before each began"
    )


def _machine(row: Row) -> str:
    env = row.record.environment
    return f"{env['processor']}, {env['cores']} cores, torch {env['torch']}, Python {env['python']}, {env['date'][:10]}"


def _norms(rows: list[Row]) -> str:
    """What ran them, which not every result says."""
    named = {row.experiment.name: row.record.environment.get("norms", {}).get("cpu") for row in rows}
    unknown = [name for name, norms in named.items() if norms is None]
    by = ", ".join(sorted({norms for norms in named.values() if norms}))
    return f"the norms by {by}" + (f" (not recorded of {', '.join(unknown)})" if unknown else "")


def _span(row: Row) -> tuple[float, float]:
    """When it ran, in seconds."""
    start = datetime.fromisoformat(row.record.environment["date"]).timestamp()
    return start, start + sum(row.record.seconds.values())


def _clock(spans: list[tuple[float, float]]) -> float:
    """How long one or more ran."""
    total = until = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _code(rows: list[Row]) -> str:
    other = sorted({r.experiment.name for r in rows if r.record.code != results.fingerprint(r.experiment)})
    return f"The code of these has changed since: {', '.join(other)}." if other else "Their code has not changed since."


def _section(row: Row) -> str:
    experiment, contrast = row.experiment, row.experiment.contrast
    bound = f"within ±{contrast.smallest:g}" if contrast.equal else f"{contrast.smallest:g} or more"
    question, _, method = experiment.method.strip().partition("\n\n")
    lines = [
        f"## {experiment.aspect}\n",
        f'"{experiment.claim}" **{row.judgement[0].upper()}{row.judgement[1:]}.**\n',
        f"Contrast: {contrast.text}: **{table.escaped(str(row.finding.effect))}**; the claim holds at {bound}.\n",
        f"![{experiment.aspect}](evidence/{experiment.name}.svg)\n",
        f"{question}\n\n{method}\n",
        "| | estimate, 95 % interval |\n|---|---|",
        *(f"| {table.escaped(name)} | {table.escaped(str(effect))} |" for name, effect in row.effects.items()),
        *_curves(row),
        "",
        *(f"- {table.escaped(sentence)}" for sentence in row.finding.sentences),
        f"\n[Every number](evidence/{experiment.name}.json); {sum(row.record.seconds.values()):.0f} s.\n",
    ]
    return "\n".join(lines)


def _curves(row: Row) -> list[str]:
    """How each learning rate was chosen."""
    if not row.curves:
        return []
    return [
        "\n| | learning rates, and what they score on validation data; **the one that is used** |\n|---|---|",
        *(
            f"| {table.escaped(name)} | "
            + ", ".join(f"{rate:.2g}: **{score}**" if used else f"{rate:.2g}: {score}" for rate, score, used in curve)
            + " |"
            for name, curve in row.curves.items()
        ),
    ]


def _again(first: list[Row], second: list[Row]) -> list[str]:
    if not second:
        return []
    found = table.agreement(first, second)
    same = sum(a == b for _, a, b in found["verdicts"])
    of = Counter(name for name, *_ in found["effects"])
    agree = Counter(name for name, *_, fits in found["effects"] if fits)
    least = min(of, key=lambda name: agree[name] / of[name])
    fit, all_of, exact = sum(agree.values()), sum(of.values()), sum(fits for *_, fits in found["exact"])
    lines = [
        "## The same again, with other seeds\n",
        f"A second run, seeds from {second[0].record.plan.seed_base}, gives the same verdict in {same} of "
        f"{len(found['verdicts'])} experiments. Of {all_of} estimates that depend on the seeds {fit} "
        f"({fit / all_of:.0%}) lie where the first run's say, at 95 %: as far from them as both intervals allow; "
        f"fewest in {least}, {agree[least]} of {of[least]}. Of {len(found['exact'])} others, without a sampling error "
        f"or without seeds, {exact} are the same. Those that do not agree, and the verdicts that changed:\n",
        "| experiment | | first | again |\n|---|---|---|---|",
    ]
    lines += [f"| {name} | verdict | {a} | {b} |" for name, a, b in found["verdicts"] if a != b]
    lines += [
        f"| {name} | {table.escaped(what)} | {table.escaped(str(a))} | {table.escaped(str(b))} |"
        for name, what, a, b, fits in [*found["effects"], *found["exact"]]
        if not fits
    ]
    return ["\n".join(lines) + "\n"]


def readme(text: str, rows: list[Row]) -> str:
    """The README with the table of claims in its place."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must have the lines {BEGIN.strip()} and {END.strip()}; it has not; add them.")
    return before + BEGIN + table.to_markdown(rows, "docs/evidence.md") + END + after


def quoted(rows: list[Row]) -> str:
    """web/src/evidence.json: the effect of each experiment that the page quotes."""
    found = {
        row.experiment.name: {
            **{key: getattr(row.finding.effect, key) for key in ("value", "low", "high", "unit")},
            "claim": row.experiment.claim,
            "verdict": row.judgement,
        }
        for row in rows
        if row.experiment.name in QUOTED
    }
    missing = [name for name in QUOTED if name not in found]
    if missing:
        raise ValueError(f"docs/evidence must have what the page quotes; {', '.join(missing)} is missing; run it.")
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write them all."""
    experiments = list(EXPERIMENTS.values())
    first = table.rows(DOCS / "evidence", experiments)
    second = table.rows(DOCS / "evidence" / "again", experiments)
    written = re.sub(r"\n{3,}", "\n\n", page(first, second))
    (DOCS / "evidence.md").write_text(written, encoding="utf-8")
    (DOCS.parent / "web" / "src" / "evidence.json").write_text(quoted(first), encoding="utf-8")
    path = DOCS.parent / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8"), first), encoding="utf-8")


if __name__ == "__main__":
    main()
