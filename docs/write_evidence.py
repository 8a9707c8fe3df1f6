"""Writes evidence.md and the README's table of claims from the results in evidence/, which `make evidence` measures."""

from __future__ import annotations

import re
from pathlib import Path

from normwise.lab import table
from normwise.lab.experiments import EXPERIMENTS
from normwise.lab.table import Row

DOCS = Path(__file__).parent
BEGIN, END = "<!-- claims: written by docs/write_evidence.py -->\n", "<!-- claims end -->\n"

HEAD = """# Evidence

What people say of Batch Norm and Layer Norm, each claim beside what was measured. Written by `docs/write_evidence.py`
from the results in [evidence/](evidence/), which `make evidence` measures anew; `normwise lab run NAME` measures one.

A verdict is computed: each experiment has one contrast with a smallest effect of interest, both fixed before it ran.
The claim *holds* if the 95 % confidence interval lies beyond that effect, *does not hold* if it lies short of it, and
is *undecided* otherwise; it holds *corrected* if its words reach further than the numbers. Intervals are over seeds, on
these data and models, at the learning rates that one tuning found: they do not say how far a result carries to others,
and another tuning can move an estimate further. The seeds are not those with which the experiments were written.
"""


def page(first: list[Row], second: list[Row]) -> str:
    """All of evidence.md."""
    parts = [HEAD, *_environment(first), table.to_markdown(first)]
    parts += [_section(row) for row in first]
    return "\n".join([*parts, *_again(first, second)])


def _environment(rows: list[Row]) -> list[str]:
    about = sorted({_machine(row) for row in rows})
    seeds = sorted({f"{row.record.plan.size}, seeds from {row.record.plan.seed_base}" for row in rows})
    minutes = sum(sum(row.record.seconds.values()) for row in rows) / 60
    return [f"Measured on {'; '.join(about)}. Size {'; '.join(seeds)}; {minutes:.0f} minutes in all.\n"]


def _machine(row: Row) -> str:
    env = row.record.environment
    return f"{env['processor']}, {env['cores']} cores, torch {env['torch']}, Python {env['python']}, {env['date'][:10]}"


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
        "",
        *(f"- {table.escaped(sentence)}" for sentence in row.finding.sentences),
        f"\n[Every number](evidence/{experiment.name}.json); {sum(row.record.seconds.values()):.0f} s.\n",
    ]
    return "\n".join(lines)


def _again(first: list[Row], second: list[Row]) -> list[str]:
    if not second:
        return []
    found = table.agreement(first, second)
    same = sum(a == b for _, a, b in found["verdicts"])
    agree = [effect for effect in found["effects"] if effect[-1]]
    lines = [
        "## The same again, with other seeds\n",
        f"A second run, seeds from {second[0].record.plan.seed_base}, gives the same verdict in {same} of "
        f"{len(found['verdicts'])} experiments. Of {len(found['effects'])} estimates {len(agree)} "
        f"({len(agree) / len(found['effects']):.0%}) lie where the first run's say, at 95 %: as far from them as both "
        "intervals allow. Those that do not, and the verdicts that changed:\n",
        "| experiment | | first | again |\n|---|---|---|---|",
    ]
    lines += [f"| {name} | verdict | {a} | {b} |" for name, a, b in found["verdicts"] if a != b]
    lines += [
        f"| {name} | {table.escaped(what)} | {table.escaped(str(a))} | {table.escaped(str(b))} |"
        for name, what, a, b, fits in found["effects"]
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


def main() -> None:
    """Write both."""
    experiments = list(EXPERIMENTS.values())
    first = table.rows(DOCS / "evidence", experiments)
    second = table.rows(DOCS / "evidence" / "again", experiments)
    written = re.sub(r"\n{3,}", "\n\n", page(first, second))
    (DOCS / "evidence.md").write_text(written, encoding="utf-8")
    path = DOCS.parent / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8"), first), encoding="utf-8")


if __name__ == "__main__":
    main()
