"""The command line: what to measure, then the tables, the file and the plot."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from . import machine, plot, report, verdict
from .cases import OPS, TYPES, Selection, grid
from .peers import CANDIDATES
from .run import Settings, measured

RESULTS = Path(__file__).parent / "results"
PASSES = {"forward": "forward", "f": "forward", "forward+backward": "forward+backward", "f+b": "forward+backward"}
BUDGET, QUICK_BUDGET = 0.25, 0.05
WIDTH = 270
"""Of the tables, whatever the terminal's: a line that wraps is complete, a cell that is cut is not."""


def listed(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def among(names: Any) -> Any:
    """Names between commas, each of which must be known."""

    def check(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
        given = listed(context, option, value)
        for name in given:
            if name not in names:
                raise click.BadParameter(f"it must be among {', '.join(names)}; got {name!r}.")
        return given

    return check


def thread_counts(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    """Numbers between commas; ``all`` is PyTorch's own number."""
    found = []
    for name in listed(context, option, value):
        if name != "all" and not (name.isdigit() and 1 <= int(name) <= len(machine.cores())):
            raise click.BadParameter(f"it must be from 1 to {len(machine.cores())}, or all; got {name!r}.")
        found.append(torch.get_num_threads() if name == "all" else int(name))
    return list(dict.fromkeys(found))


@click.command()
@click.option("--quick", is_flag=True, help="Few shapes, no float16, no compile unless named, short.")
@click.option("--only", "ops", callback=among(OPS), help="Operations, such as layer_norm,'batch_norm eval'.")
@click.option("--model", "models", callback=listed, help="Shapes by name, such as BERT-base,Llama.")
@click.option("--dtype", "dtypes", callback=among(TYPES), help="Of float32,bfloat16,float16.")
@click.option("--pass", "passes", callback=among(PASSES), help="Of f,f+b: forward, forward+backward.")
@click.option("--threads", callback=thread_counts, default="1,all", show_default=True, help="How many, one run each.")
@click.option("--peers", callback=among(list(CANDIDATES)[1:]), help="Of torch,compile,onnxruntime,jax,copy.")
@click.option(
    "--budget", type=click.FloatRange(min=0.0), help=f"Seconds for each candidate [{BUDGET}, quick {QUICK_BUDGET}]."
)
@click.option("--seed", type=int, help="Of the random inputs; fresh ones without it.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder of results.")
def main(
    quick: bool,
    ops: tuple[str, ...],
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    passes: tuple[str, ...],
    threads: list[int],
    peers: tuple[str, ...],
    budget: float | None,
    seed: int | None,
    output: Path,
) -> None:
    """Time every norm beside its peers, each result checked first against the float64 reference.

    The tables go to stdout, progress to stderr, everything measured to <machine>.json in the output folder, with a plot
    beside it; what was not the whole grid to <machine>-partial.json. Exits with 1 if ours was wrong or missing.
    """
    selection = Selection(ops, models, dtypes, tuple(PASSES[name] for name in passes), quick)
    if not any(case in selection for case in grid()):
        raise click.UsageError("no case is left; take back one of --only, --model, --dtype and --pass.")
    chosen = peers or [name for name in CANDIDATES if not (quick and name == "compile")]
    names = ["normwise", *(name for name in list(CANDIDATES)[1:] if name in chosen)]
    budget = (QUICK_BUDGET if quick else BUDGET) if budget is None else budget
    settings = Settings(selection, names, budget, random.SystemRandom().randrange(2**31) if seed is None else seed)
    start, load, records, complete = time.perf_counter(), machine.load(), [], True
    if load is not None and load > len(machine.cores()) / 4:
        click.echo(f"The machine is in use (load {load:.1f}): an idle one gives other times.", err=True)
    for count in threads:
        for record in measured(count, settings):
            if record is None:
                complete = False
            else:
                records.append(record)
    if not records:
        sys.exit(1)
    whole = complete and selection == Selection() and not peers and threads == thread_counts(None, None, "1,all")
    ran = {"threads": threads, "load_before": load, "seconds": round(time.perf_counter() - start)}
    publish(output, "" if whole else "-partial", settings, ran, records)
    sys.exit(0 if complete and not any(map(verdict.failed, records)) else 1)


def publish(folder: Path, suffix: str, settings: Settings, ran: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write the file and the plot, and print the tables."""
    about = machine.describe()
    asked = {"candidates": settings.candidates, "seconds_a_candidate": settings.budget, "seed": settings.seed}
    path = folder / f"{about['machine']}{suffix}.json"
    records = report.arranged(records)
    report.write(path, about, asked | ran, records)
    report.show(Console(width=WIDTH, highlight=False), records)
    click.echo(f"Wrote {path}", err=True)
    try:
        plot.write(path.with_suffix(".png"), records, about["machine"])
    except ImportError as error:
        click.echo(f"No plot: {error}.", err=True)
    else:
        click.echo(f"Wrote {path.with_suffix('.png')}", err=True)


if __name__ == "__main__":
    main()
