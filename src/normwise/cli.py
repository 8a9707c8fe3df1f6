"""The command line: one verb for each public function.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

NORMS = "batch_norm, layer_norm, rms_norm, group_norm, instance_norm"
PRESETS = "nvlink4, infiniband-ndr, ethernet-100g"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="normwise")
def cli() -> None:
    """Batch Norm, Layer Norm and their relatives: compared on your batch, step by step."""


BATCH = (
    click.argument("batch", required=False),
    click.option("--preset", help="A batch that comes along: worked (the default) or broken-symmetry."),
    click.option("--key", help="Which array of a file that holds several."),
    click.option("--norms", help=f"Some of {NORMS}; or all.  [default: batch_norm,layer_norm]"),
    click.option("--pattern", help="A norm of your own: the axes, an arrow, and those with statistics of their own."),
    click.option(
        "--groups", type=int, help="Groups of group_norm; by default up to 32 that leave 2 or more channels each."
    ),
    click.option(
        "--layout", help="The axes: nc; nlc (default) or ncl; nchw (default) or nhwc; ncdhw (default) or ndhwc."
    ),
    click.option("--mode", default="train", show_default=True, help="train or eval (on running statistics)."),
    click.option("--steps", type=int, default=1, show_default=True, help="Training steps on this batch before eval."),
    click.option(
        "--momentum", type=float, default=0.1, show_default=True, help="Weight of each batch in the running statistics."
    ),
    click.option("--weight", help="A scale for each channel: 1,2,0.5."),
    click.option("--bias", help="An offset for each channel: 0,1,-1."),
    click.option(
        "--eps", type=float, default=1e-5, show_default=True, help="Added to the variance, inside the root; may be 0."
    ),
    click.option("--dtype", help="Convert the batch first: float64, float32, bfloat16 or float16."),
    click.option("--allow-nonfinite", is_flag=True, help="Accept nan and infinities."),
    click.option("--recording", help="For the page to replay: of record(model), or a result of normwise lab run."),
)
"""Which norms to compute on which batch: the same for every command that shows them."""


def with_batch(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :data:`BATCH`, which :func:`_compared` takes."""
    for option in reversed(BATCH):
        command = option(command)
    return command


@cli.command()
@with_batch
@click.option("--cell", help="The value to work out in full, as an index counted from 0: 0,2.")
@click.option("--grad", is_flag=True, help="Show the backward pass too.")
@click.option("--precision", type=click.IntRange(1, 15), default=3, show_default=True, help="Decimals of the outputs.")
@click.option("--summary", is_flag=True, help="The table of properties instead of the numbers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(), help="Write the page as one file, for offline too; it embeds the data.")
def compare(
    precision: int, summary: bool, as_json: bool, html: str | None, recording: str | None, **settings: Any
) -> None:
    """Show what norms do to BATCH, side by side and step by step.

    BATCH is a literal such as '[[2,4,6],[3,5,7]]', a file (.csv .json .npy .npz .safetensors .pt), - for standard
    input, or digits for scikit-learn's digit images; without it, the worked batch. The first axis is the samples.
    """
    from .explain import page

    try:
        if html is None and recording is not None:
            raise ValueError("recording: it is for the page; got no --html; add --html FILE, or use normwise open.")
        comparison = _compared(**settings)
        if html is not None:
            _write(Path(html), page.render(comparison, _recording(recording)))
            click.echo(f"wrote {html}; it embeds the data", err=True)
    except (ValueError, TypeError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(comparison.to_json())
        return
    width, color = _terminal()
    text = comparison.to_text(width=width, precision=precision, color=color, summary=summary)
    click.echo(_encodable(text), nl=False, color=color)


@cli.command("open")
@with_batch
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Where to serve it.  [default: any free one]")
@click.option("--no-browser", is_flag=True, help="Print the address only.")
def open_page(port: int, no_browser: bool, recording: str | None, **settings: Any) -> None:
    """Open the page about BATCH in a browser: change any number, and see what each norm makes of it.

    BATCH is what normwise compare takes. The page is served to this machine alone, until Ctrl-C.
    """
    from .explain import page
    from .explain.serve import Server

    try:
        server = Server(page.render(_compared(**settings), _recording(recording)), port)
    except (ValueError, TypeError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(
            f"port: {port} must be free for this program; {error.strerror}; choose another, or leave it out for any."
        ) from None
    with server:
        click.echo(server.url)
        click.echo("Ctrl-C ends it", err=True)
        if not no_browser:
            _browse(server.url)
        server.serve_forever()


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Show versions, threads and what runs the norms on each device."""
    import platform

    import torch

    from . import __version__, backends
    from .kernels import memory

    found = {
        "normwise": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "memory": memory.describe(),
        "backends": backends(),
    }
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows = {**{k: v for k, v in found.items() if k != "backends"}, **backends()}
    for name, value in rows.items():
        click.echo(f"{name:9} {value}")


@cli.group()
def lab() -> None:
    """Experiments that measure a claim about norms."""


@lab.command()
@click.option("--preset", "presets", multiple=True, help=f"A link with public figures: {PRESETS}; may be repeated.")
@click.option("--latency", help="Seconds that a message takes besides its bytes: 5us or 5e-6.")
@click.option("--bandwidth", help="Bytes per second each way: 25GB/s, 100Gbit/s or 2.5e10.")
@click.option(
    "--measure/--no-measure", default=None, help="Time all-reduces here, a minute.  [default: without a link]"
)
@click.option("--processes", help="Measure these numbers of them.  [default: 2,4,8]")
@click.option("--tokens", type=int, default=4096, show_default=True, help="Tokens of the Layer Norm that is split.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def distributed(
    presets: tuple[str, ...], latency: str | None, bandwidth: str | None, measure: bool | None,
    processes: str | None, tokens: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure all-reduces here, and predict what norms spend on messages over 8 to 16,384 processes.

    With a link, by --preset or by --latency and --bandwidth, nothing is measured unless --measure says so; with
    --no-measure alone, the prediction is for every preset.
    """
    from .lab import cost, distributed_cost

    try:
        if processes is not None and measure is False:
            raise ValueError("processes: they are to be measured; got --no-measure too; drop one of both.")
        links = cost.links(presets, latency, bandwidth)
        if measure is None:
            measure = processes is not None or not links
        found = distributed_cost(
            links or ([] if measure else list(cost.PRESETS.values())),
            worlds=_integers("processes", "2,4,8" if processes is None else processes, "2,4") if measure else (),
            tokens=tokens,
            progress=lambda text: click.echo(f"{text} ...", err=True),
        )
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(found.to_json() if as_json else _encodable(found.to_text()), nl=as_json)


@lab.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_experiments(as_json: bool) -> None:
    """The experiments, and the claim that each measures."""
    from .lab.experiments import EXPERIMENTS

    if as_json:
        found = [{"name": e.name, "aspect": e.aspect, "claim": e.claim} for e in EXPERIMENTS.values()]
        click.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, EXPERIMENTS))
    for experiment in EXPERIMENTS.values():
        click.echo(f"{experiment.name:{width}}  {experiment.claim}")


RESULTS = click.option(
    "--results", type=click.Path(path_type=Path), default="lab-results", show_default=True, help="Their folder."
)


@lab.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@RESULTS
@click.option("--size", default="standard", show_default=True, help="smoke, standard or full.")
@click.option("--seed-base", type=click.IntRange(0), default=0, show_default=True, help="The first seed.")
@click.option("--data", help="A folder with files of MNIST or CIFAR-10 (binary) for batch_size, instead of the digits.")
@click.option("--fresh", is_flag=True, help="Forget earlier results first; else what has run is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(
    names: tuple[str, ...], results: Path, size: str, seed_base: int, data: str | None, fresh: bool, as_json: bool
) -> None:
    """Run experiments by NAME, or all; what an interrupted run has found is kept.

    Each writes NAME.json, with every raw number, and its plot, NAME.svg and NAME.png.
    """
    from . import lab as laboratory
    from .lab import progress, table
    from .lab.experiments import chosen

    try:
        experiments, plan, wrong = chosen(names), laboratory.plan(size, seed_base, data), dict[str, None]()
        with progress.shown(experiments) as show:
            for experiment in experiments:
                try:
                    laboratory.run(experiment, plan, results, fresh=fresh, progress=partial(show, experiment))
                except RuntimeError as error:  # what this one needs is missing; the others run
                    wrong[str(error)] = None
                except KeyboardInterrupt:
                    click.echo(
                        "\nstopped; what has run is kept; run the same again, without --fresh, to go on", err=True
                    )
                    raise
        rows = table.rows(results, experiments)
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    if rows or not wrong:
        _show(rows, as_json)
    if wrong:
        raise click.ClickException(" ".join(wrong))


@lab.command("table")
@RESULTS
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_table(results: Path, markdown: bool, as_json: bool) -> None:
    """What people say of Batch Norm and Layer Norm, with what was measured in each place."""
    from .lab import table

    if markdown and as_json:
        raise click.UsageError("--markdown and --json exclude each other")
    rows = _rows(results, ("all",))
    if markdown:
        click.echo(table.to_markdown(rows), nl=False)
    else:
        _show(rows, as_json)


@lab.command()
@click.argument("name")
@RESULTS
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, results: Path, as_json: bool) -> None:
    """One experiment: its claim, its method, and what its results say."""
    from .lab import table

    rows = _rows(results, (name,))
    text = "\n".join(table.to_text_of(row, _terminal()[0]) for row in rows)
    click.echo(table.to_json(rows) if as_json else _encodable(text), nl=as_json)


def _rows(results: Path, names: tuple[str, ...]) -> Any:
    """The rows of these experiments' results, of which there must be one."""
    from .lab import table
    from .lab.experiments import chosen

    try:
        rows = table.rows(results, chosen(names))
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    if not rows:
        wanted = "them" if names == ("all",) else names[0]
        raise click.ClickException(
            f"results: {results} must hold complete ones; it holds none of {wanted}; run normwise lab run {names[0]}."
        )
    return rows


def _show(rows: Any, as_json: bool) -> None:
    from .lab import table

    width, color = _terminal()
    click.echo(table.to_json(rows) if as_json else _encodable(table.to_text(rows, width, color)), nl=as_json)


def main() -> None:
    """Run the command line: what goes wrong is one sentence on stderr; interrupted, exit with 130."""
    code, wrong = 0, ""
    try:
        cli.main(prog_name="normwise", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.UsageError as error:
        code, wrong = 2, _usage(error)
    except click.ClickException as error:
        code, wrong = 2, error.format_message()
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except (BrokenPipeError, SystemExit):  # the reader left, there is nothing to say; click may have met it first
        _discard_output()
    except OSError as error:
        _discard_output()
        code, wrong = 2, f"standard output: it must be writable; {error.strerror}; write elsewhere."
    if wrong:
        click.echo(f"normwise: {wrong}", err=True)
    sys.exit(code)


def _usage(error: click.UsageError) -> str:
    """What is wrong with the command line, in one sentence; without a command, the help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(error.format_message(), err=True)
        return ""
    command = error.ctx.command_path if error.ctx else "normwise"
    return f"{error.format_message().rstrip('.')}; see {command} --help."


def _discard_output() -> None:
    """Let what is still buffered go nowhere, so that Python does not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _compared(
    batch: str | None, preset: str | None, key: str | None, dtype: str | None, weight: str | None, bias: str | None,
    allow_nonfinite: bool, norms: str | None, cell: str | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """The comparison that the options ask for."""
    from .explain import compare as compare_batch
    from .explain import load_batch

    if norms is not None:
        settings["norms"] = norms
    loaded = load_batch(
        batch, preset=preset, key=key, dtype=_dtype(dtype), allow_nonfinite=allow_nonfinite, stdin=sys.stdin
    )
    return compare_batch(
        loaded, weight=_numbers("weight", weight), bias=_numbers("bias", bias), cell=_integers("cell", cell, "0,2"),
        allow_nonfinite=allow_nonfinite, **settings,
    )  # fmt: skip


def _recording(path: str | None) -> dict[str, Any] | None:
    """What a file has for the page to replay, as plain data: a recording, or the results of an experiment."""
    if path is None:
        return None
    from .explain import recording
    from .lab import replay

    data = recording.read(path)
    return replay.replayed(data, path) if "experiment" in data else recording.parse(data, path).to_data()


def _browse(url: str) -> None:
    """Show an address in a browser, if there is one; its complaints are not ours."""
    import threading
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()  # some browsers return at their end


def _dtype(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    allowed = ("float64", "float32", "bfloat16", "float16")
    if name not in allowed:
        raise ValueError(f"dtype: it must be one of {', '.join(allowed)}; got {name!r}; choose one of these.")
    return getattr(torch, name)


def _integers(name: str, text: str | None, example: str) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{name}: it must be whole numbers with commas; got {text!r}; write for example {example}."
        ) from None


def _numbers(name: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.strip("[] ").split(",")]
    except ValueError:
        raise ValueError(f"{name}: it must be numbers with commas; got {text!r}; write for example 1,2,0.5.") from None


def _write(path: Path, content: str) -> None:
    """Write a file whole or not at all; a device or a pipe is written to as it is."""
    if str(path) == "-":
        raise ValueError("html: it must be the path of a file; got '-'; standard output is for the text and --json.")
    from . import files

    try:
        files.write(path, content.encode("utf-8", "replace"))
    except OSError as error:
        raise ValueError(f"html: {path} must be writable; {error.strerror}; choose another path.") from None


def _terminal() -> tuple[int, bool]:
    """The width to lay text out in, and whether to colour it."""
    import shutil

    interactive = sys.stdout is not None and sys.stdout.isatty()
    width = min(shutil.get_terminal_size((80, 24)).columns, 120) if interactive else 80
    return width, interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


PLAIN = dict(zip("√σκ²⁴⁶▁▂▃▄▅▆▇█", ("sqrt", "sigma", "kappa", "^2", "^4", "^6", *"_.-:=+*#"), strict=True))


def _encodable(text: str) -> str:
    """Replace what the output's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = "".join(PLAIN.get(letter, letter) for letter in text)
        return plain.encode(encoding, "replace").decode(encoding)
    return text
