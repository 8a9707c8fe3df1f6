"""What to notice: each sentence is computed from the batch, most of them by running the norms once more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import labels
from .trace import Trace, trace

EXACT = 2**22  # values times samples; up to here the norm runs without each sample, beyond without one


@dataclass(frozen=True)
class Notice:
    """One observation: its kind, a sentence with gaps, and the values that fill them."""

    kind: str
    sentence: str
    values: Mapping[str, Any]

    def text(self, precision: int = 3) -> str:
        """The sentence, filled."""
        return labels.fill(self.sentence, self.values, precision)


@dataclass(frozen=True)
class Scene:
    """What the observations look at."""

    x: Tensor
    preset: bool
    layout: str
    traces: tuple[Trace, ...]
    cell: tuple[int, ...]
    steps: int
    momentum: float

    @property
    def coupled(self) -> list[Trace]:
        """The norms whose statistics come from several samples of this batch."""
        return [
            t for t in self.traces if not t.refused and t.facts.depends_on_other_examples and not t.norm.uses_running
        ]

    @property
    def separate(self) -> list[Trace]:
        """The others."""
        return [t for t in self.traces if not t.refused and t not in self.coupled]

    def name(self, *index: int) -> str:
        """The name of the value at ``index``."""
        return labels.cell_name(self.layout, index)


def notices(
    x: Tensor,
    batch_name: str,
    layout: str,
    traces: tuple[Trace, ...],
    cell: tuple[int, ...],
    steps: int,
    momentum: float,
) -> tuple[Notice, ...]:
    """All that can be said about this batch, the most telling first."""
    preset = batch_name in ("worked batch", "broken-symmetry")
    scene = Scene(x, preset, layout, traces, cell, steps, momentum)
    if not torch.isfinite(x).all():
        return tuple(_nonfinite(scene))
    found = (_additive, _thrown_away, _constant, _neighbour, _fewer, _evaluated, _layer_modes, _ceiling, _eps)
    return tuple(n for find in found for n in find(scene))


def _additive(s: Scene) -> Iterator[Notice]:
    """Every value a sample offset plus a feature offset: both norms then make everything look alike."""
    if not _is_additive(s):
        return
    made: list[str] = []
    for axis, what in ((0, "samples"), (1, "features")):
        alike = [
            t.norm.title
            for t in s.traces
            if not t.refused and np.ptp(t.y) > 0 and np.ptp(t.y, axis=axis).max() <= 1e-6 * np.abs(t.y).max()
        ]
        if alike:
            verb, same = ("", "") if made else (" made", " identical")
            made.append(f"{labels.listed(alike)}{verb} the {s.x.shape[axis]} {what}{same}")
    if made:
        yield Notice(
            "additive",
            "{made}: every value is a sample offset + a feature offset. Try --preset broken-symmetry",
            {"made": ", ".join(made)},
        )


def _is_additive(s: Scene) -> bool:
    if s.layout != "nc" or min(s.x.shape) < 2:
        return False
    for x in (s.x[:8].double(), s.x.double()):  # a few samples settle it for most batches
        rest = x - x.mean(0) - x.mean(1, keepdim=True) + x.mean()
        spread = (x - x.mean()).abs().max()
        if spread == 0 or rest.abs().max() > 1e-9 * spread:
            return False
    return True


def _thrown_away(s: Scene) -> Iterator[Notice]:
    """Each norm forgets location and scale along its own axes, and keeps the other's."""
    if _is_additive(s):
        return
    for t in s.traces:
        if t.refused or t.norm.uses_running or t.mean.size == 0:
            continue
        values = {
            "norm": t.norm.title,
            "unit": labels.unit(t.norm.pattern, s.layout),
            "means": _range(t.mean),
            "sds": _range(np.sqrt(t.var)),
        }
        if t.norm.centred:
            yield Notice("thrown_away", "{norm} threw away the mean ({means:S}) and the standard deviation ({sds:S}) "
                         "of each {unit}.", values)  # fmt: skip
        else:
            yield Notice("thrown_away", "{norm} threw away the root mean square ({sds:S}) of each {unit}; the mean "
                         "stays.", values)  # fmt: skip
    yield from _kept(s)


def _kept(s: Scene) -> Iterator[Notice]:
    """Batch Norm makes features alike, not samples; Layer Norm samples, not features."""
    if s.layout != "nc" or min(s.x.shape) < 2:
        return
    parts, values = [], {}
    for i, t in enumerate(t for t in s.traces if not t.refused and t.norm.name in ("batch_norm", "layer_norm")):
        axis, other = (1, "samples") if t.norm.name == "batch_norm" else (0, "features")
        parts.append(f"after {t.norm.title} the {other}' means still run {{range{i}:Y}}")
        values[f"range{i}"] = _range(t.xhat.mean(axis))
    if parts:
        yield Notice("kept", "Kept: " + ", ".join(parts) + ".", values)


def _constant(s: Scene) -> Iterator[Notice]:
    for t in s.traces:
        if t.refused or t.norm.uses_running or not t.norm.centred:
            continue
        constant = np.argwhere(t.var == 0)
        if len(constant):
            unit = labels.unit(t.norm.pattern, s.layout)
            gives = "0 / 0 = nan" if t.norm.eps == 0 else "0" if t.norm.bias is None else "the bias"
            yield Notice(
                "constant",
                "{count} of {total} {units} {are} constant in this batch: {norm} gives {gives}.",
                {
                    "count": len(constant),
                    "total": t.var.size,
                    "units": _plural(unit),
                    "are": "is" if len(constant) == 1 else "are",
                    "norm": t.norm.title,
                    "gives": gives,
                    "where": constant[:8].tolist(),
                },
            )


def _plural(unit: str) -> str:
    first, *rest = unit.split(" ", 1)
    return " ".join([f"{first}s", *rest])


def _neighbour(s: Scene) -> Iterator[Notice]:
    """Move or remove another sample: what becomes of the ones that nobody touched?"""
    n = s.x.shape[0]
    coupled = [t for t in s.coupled if n > (1 if s.preset else 2)]
    found = [_poke(s, t) if s.preset else _left_out(s, t) for t in coupled]
    for notice in found[:-1]:
        yield replace(notice, sentence=notice.sentence + ".")
    if found:
        last = found[-1]
        bits = _bits(s, last.values["other"])
        yield Notice(last.kind, last.sentence + (", {bits}." if bits else "."), {**last.values, "bits": bits})
    elif n > 1 and s.separate:
        bits = _bits(s, n - 1)
        if bits:
            yield Notice("left_out", "Leave s{other} out: {bits}.", {"other": n - 1, "bits": bits})


def _bits(s: Scene, other: int) -> str:
    """Observed: with ``other`` gone, or moved in a preset, are the untouched outputs the same, bit for bit?"""
    stay = [i for i in range(s.x.shape[0]) if i != other]
    kept: list[str] = []
    moved: list[str] = []
    for t in (t for t in s.separate if not t.norm.uses_running):
        after = t.norm.run(_poked(s, other)).y[stay] if s.preset else t.norm.run(s.x[stay]).y
        (kept if np.array_equal(after.double().numpy(), t.y[stay]) else moved).append(t.norm.title)
    parts = [f"{labels.listed(kept)} {'keeps' if len(kept) == 1 else 'keep'} every bit"] if kept else []
    parts += [f"{labels.listed(moved)} changed bits: the same sums, taken in another order"] if moved else []
    return "; ".join(parts)


def _poked(s: Scene, other: int) -> Tensor:
    poked = s.x.clone()
    poked[other] += 1
    return poked


def _poke(s: Scene, t: Trace) -> Notice:
    """Add 1 to every value of the last sample, or of the first if the last is pinned."""
    other = s.x.shape[0] - 1 if s.cell[0] != s.x.shape[0] - 1 else 0
    return Notice(
        "neighbour",
        "Neighbour s{other} + 1: {pinned} under {norm} goes {before:y} -> {after:y}",
        {
            "other": other,
            "pinned": s.name(*s.cell),
            "norm": t.norm.title,
            "before": float(t.y[s.cell]),
            "after": t.norm.run(_poked(s, other)).y[s.cell].item(),
        },
    )


def _left_out(s: Scene, t: Trace) -> Notice:
    """Leave out each other sample in turn; the largest move of what stays, and where."""
    n = s.x.shape[0]
    tried = list(range(n)) if n * s.x.numel() <= EXACT else [_most_influential(s, t)]
    moves = []
    for k in tried:
        stay = [i for i in range(n) if i != k]
        y = t.norm.run(s.x[stay]).y.double().numpy()
        distance = np.abs(y - t.y[stay])
        where = tuple(int(i) for i in np.unravel_index(int(np.argmax(distance)), distance.shape))
        moves.append((float(distance[where]), k, (stay[where[0]], *where[1:]), float(y[where])))
    moves.sort(key=lambda m: (-m[0], m[1]))
    _, k, at, after = moves[0]
    rest = ", ".join(f"s{m[1]} {labels.short(m[0])}" for m in moves[1:3])
    return Notice(
        "left_out",
        "Leave s{other} out: under {norm} {cell} goes {before:y} -> {after:y}, the largest move{next}",
        {
            "other": k,
            "norm": t.norm.title,
            "cell": s.name(*at),
            "before": float(t.y[at]),
            "after": after,
            "next": f" (then {rest})" if rest else "",
            "moves": [{"sample": m[1], "move": m[0], "at": m[2]} for m in moves[:8]],
            "tried": len(tried),
        },
    )


def _most_influential(s: Scene, t: Trace) -> int:
    """The sample whose absence moves the normalized values most, in closed form for every sample at once."""
    rows = t.norm.rows(s.x)
    values = (rows.split(s.x) - torch.tensor(t.mean).unsqueeze(-1)).float()
    m, n = values.shape[-1], len(s.x)
    per_sample = values.reshape(*values.shape[:-1], n, m // n)  # the batch axis comes first among those averaged
    own_sum, own_square = per_sample.sum(-1), per_sample.square().sum(-1)
    left = m - m // n
    mean = -own_sum / left
    var = (torch.tensor(t.var).float().unsqueeze(-1) * m - own_square) / left - mean.square()
    rstd, all_rstd = (var.clamp(min=0) + t.norm.eps).rsqrt(), torch.tensor(t.rstd).float().unsqueeze(-1)
    moved = torch.zeros_like(own_sum)
    for sign in (1, -1):
        extremes = (per_sample * sign).amax(-1)
        first = extremes.max(-1, keepdim=True)
        second = extremes.scatter(-1, first.indices, -torch.inf).amax(-1, keepdim=True)
        others = sign * torch.where(torch.arange(n) == first.indices, second, first.values)
        moved = torch.maximum(moved, (others * (rstd - all_rstd) - mean * rstd).abs())
    return int(moved.reshape(-1, n).amax(0).argmax())


def _fewer(s: Scene) -> Iterator[Notice]:
    """The pinned value beside one neighbour at a time, and alone."""
    n, i = s.x.shape[0], s.cell[0]
    if not 2 <= n <= 256 or not s.coupled:
        return
    others = [k for k in range(n) if k != i]
    for t in s.coupled:
        pinned = (0, *s.cell[1:])
        beside = [float(t.norm.run(s.x[[i, k]]).y[pinned]) for k in others]
        alone = trace(s.x[[i]], t.norm)
        apart = [float(trace(s.x[[i]], o.norm).y[pinned]) for o in s.separate]
        few = len(others) <= 4
        sentence = "With one neighbour {pinned} under {norm} is " + (
            "{beside} (beside {others})" if few else "{low:y} to {high:y}"
        )
        sentence += "; alone {norm} cannot train on it." if alone.refused else "; alone {alone:y}."
        yield Notice(
            "fewer",
            sentence + (" {separate}" if apart else ""),
            {
                "pinned": s.name(*s.cell),
                "norm": t.norm.title,
                "beside": labels.listed([f"{v:+.3g}" for v in beside], "or") if few else tuple(beside),
                "low": min(beside),
                "high": max(beside),
                "others": ", ".join(f"s{k}" for k in others) if few else others,
                "alone": math.nan if alone.refused else float(alone.y[pinned]),
                "separate": " ".join(
                    f"{o.norm.title}: {labels.value(v)} every time." for o, v in zip(s.separate, apart, strict=True)
                ),
            },
        )


def _evaluated(s: Scene) -> Iterator[Notice]:
    """What eval() gives after a few training steps on this batch, and why it differs."""
    for t in s.traces:
        if (
            t.refused
            or t.norm.running is None
            or t.norm.running.steps is None
            or replace(t.norm, training=True).refusal(s.x)
        ):
            continue
        y, trained = (replace(t.norm, training=mode).run(s.x).y.double().numpy() for mode in (False, True))
        sample = y[s.cell[0]].reshape(-1) if y[0].size <= 4 else y[s.cell].reshape(-1)
        who = f"s{s.cell[0]}" if y[0].size <= 4 else s.name(*s.cell)
        held = 1 - (1 - s.momentum) ** s.steps
        m = t.facts.values_per_statistic
        without = [o.norm.title for o in s.separate if not o.facts.needs_running_statistics]
        cause = "running statistics still cold: {held:.0%} of this batch" if held < 0.99 else (
            "what stays: it divides by the unbiased variance, a factor {ratio:.4f}"
        )  # fmt: skip
        yield Notice(
            "eval",
            "eval() after {steps}: {norm} gives {who} {y:y} (" + cause + "), up to {gap:s} from training."
            + (" {without} {has} no such state." if without else ""),
            {
                "steps": "this one step" if s.steps == 1 else f"{s.steps} such steps",
                "norm": t.norm.title,
                "who": who,
                "y": tuple(float(v) for v in sample),
                "held": held,
                "ratio": math.sqrt((m - 1) / m),
                "gap": float(np.abs(y - trained).max()),
                "without": labels.listed(without) if without else "",
                "has": "has" if len(without) == 1 else "have",
            },
        )  # fmt: skip


def _layer_modes(s: Scene) -> Iterator[Notice]:
    """A layer's own running statistics against this batch's."""
    for t in s.traces:
        running = t.norm.running
        if t.refused or running is None or running.steps is not None or t.norm.uses_running:
            continue
        now = replace(t.norm, training=False).run(s.x).y.double().numpy()
        away = np.abs(now - t.y).max(axis=tuple(i for i, a in enumerate(s.layout) if a != "c"))
        c = int(away.argmax())
        kept = tuple(i for i, a in enumerate(t.norm.pattern.right) if a != "c")
        yield Notice(
            "layer_modes",
            "This layer's eval() is up to {gap:s} from its training output, most in {channel}: running mean {rm:s} "
            "against {m:s} here, running variance {rv:s} against {v:s}.",
            {
                "gap": float(away[c]),
                "channel": f"{labels.axis_prefix(s.layout, 'c')}{c}",
                "rm": float(running.mean[c]),
                "m": float(t.mean.mean(kept)[c]),
                "rv": float(running.var[c]),
                "v": float(t.var.mean(kept)[c]),
            },
        )


def _ceiling(s: Scene) -> Iterator[Notice]:
    """No normalized value exceeds sqrt(m - 1); one that comes near stands alone in its group."""
    for t in s.traces:
        m = t.facts.values_per_statistic
        if t.refused or t.norm.uses_running or not t.norm.centred or m < 8:
            continue
        at = np.unravel_index(int(np.abs(t.xhat).argmax()), t.xhat.shape)
        if abs(t.xhat[at]) >= 0.9 * math.sqrt(m - 1):
            yield Notice(
                "ceiling",
                "{cell} = {x:s} stands alone among its {m} values: {norm} gives {xhat:y}; the ceiling is "
                "sqrt({m} - 1) = {ceiling:y}.",
                {
                    "cell": s.name(*(int(i) for i in at)),
                    "x": float(s.x[at]),
                    "m": m,
                    "norm": t.norm.title,
                    "xhat": float(t.xhat[at]),
                    "ceiling": math.sqrt(m - 1),
                },
            )


def _eps(s: Scene) -> Iterator[Notice]:
    """How much eps shrinks what is not constant."""
    for t in s.traces:
        live = t.var[t.var > 0] if not t.refused else np.empty(0)
        if t.norm.eps == 0 or not live.size:
            continue
        shrunk = 1 - math.sqrt(live.min() / (live.min() + t.norm.eps))
        if shrunk > 1e-3:
            yield Notice(
                "eps",
                "eps matters: it shrinks {norm}'s output by up to {shrunk:.1%} (variance {var:s}, eps {eps:s}).",
                {"norm": t.norm.title, "shrunk": shrunk, "var": float(live.min()), "eps": t.norm.eps},
            )


def _nonfinite(s: Scene) -> Iterator[Notice]:
    """How far a nan or inf reaches."""
    bad = int((~torch.isfinite(s.x)).sum())
    reach = [f"{t.norm.title} {int((~np.isfinite(t.y)).sum())}" for t in s.traces if not t.refused]
    yield Notice(
        "nonfinite",
        "{bad} of {total} values {are} not finite. Outputs spoiled: {reach}: those that share statistics with one.",
        {"bad": bad, "total": s.x.numel(), "are": "is" if bad == 1 else "are", "reach": ", ".join(reach)},
    )


def _range(values: np.ndarray[Any, Any]) -> tuple[float, ...]:
    low, high = float(np.min(values)), float(np.max(values))
    return (low,) if math.isclose(low, high, rel_tol=1e-12) else (low, high)
