"""What to notice in the values themselves: additivity, what each norm threw away, constants, outliers, eps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from . import labels
from .scene import Notice, Scene, spread
from .trace import Trace

NAMED = 6  # so many constants are named, more are counted


def additive(s: Scene) -> Iterator[Notice]:
    """Every value a sample offset plus a feature offset: both norms then make everything look alike."""
    if not _is_additive(s):
        return
    made: list[str] = []
    for axis, what in ((0, "samples"), (1, "features")):
        alike = [
            t.norm.title
            for t in s.shown
            if np.ptp(t.y) > 0 and np.ptp(t.y, axis=axis).max() <= 1e-6 * np.abs(t.y).max()
        ]
        if alike:
            verb, same = ("", "") if made else (" made", " identical")
            made.append(f"{labels.listed(alike)}{verb} the {s.x.shape[axis]} {what}{same}")
    if made:
        advice = ". Try --preset broken-symmetry" if s.preset else "."
        yield Notice(
            "additive",
            "{made}: every value is a sample offset + a feature offset{advice}",
            {"made": ", ".join(made), "advice": advice},
        )


def _is_additive(s: Scene) -> bool:
    if s.layout != "nc" or min(s.x.shape) < 2:
        return False
    for x in (s.x[:8].double(), s.x.double()):  # a few samples settle it for most batches
        rest = x - x.mean(0) - x.mean(1, keepdim=True) + x.mean()
        size = (x - x.mean()).abs().max()
        if size == 0 or not rest.abs().max() <= 1e-9 * size:
            return False
    return True


def thrown_away(s: Scene) -> Iterator[Notice]:
    """Each norm forgets location and scale along its own axes."""
    if _is_additive(s):
        return
    for t in s.own:
        if not _varies(t):
            continue
        values = {
            "norm": t.norm.title,
            "each": labels.each(s.unit(t)),
            "means": spread(t.mean),
            "sds": spread(np.sqrt(t.var)),
        }
        what = (
            "the mean ({means:S}) and the standard deviation ({sds:S}) of {each}."
            if t.norm.centred
            else "the root mean square ({sds:S}) of {each}; the mean stays."
        )
        yield Notice("thrown_away", "{norm} threw away " + what, values)


def kept(s: Scene) -> Iterator[Notice]:
    """Batch Norm makes features alike, not samples; Layer Norm samples, not features."""
    if s.layout != "nc" or min(s.x.shape) < 2 or _is_additive(s):
        return
    parts, values = [], {}
    for i, t in enumerate(t for t in s.own if t.norm.name in ("batch_norm", "layer_norm") and _varies(t)):
        axis, other = (1, "samples") if t.norm.name == "batch_norm" else (0, "features")
        means = t.xhat.mean(axis)
        if np.ptp(means) > 1e-9:
            parts.append(f"after {t.norm.title} the {other}' means still run {{range{i}:Y}}")
            values[f"range{i}"] = spread(means)
    if parts:
        yield Notice("kept", "Kept: " + ", ".join(parts) + ".", values)


def constant(s: Scene) -> Iterator[Notice]:
    """Rows without any variation: the output is the bias, whatever the value."""
    for t in s.own:
        if not t.norm.centred or t.facts.values_per_statistic == 1:
            continue
        flat = np.argwhere(_constants(s, t))
        if not len(flat):
            continue
        gives = "0 / 0 = nan" if t.norm.eps == 0 else "0" if t.norm.bias is None else "the bias"
        names = [_kept_name(s, t, where) for where in flat] if len(flat) <= min(NAMED, t.var.size - 1) else []
        yield Notice(
            "constant",
            "{count} of {total} {units} {are} constant in this batch{named}: {norm} gives {gives}.",
            {
                "count": len(flat),
                "total": t.var.size,
                "units": labels.plural(s.unit(t)),
                "are": "is" if len(flat) == 1 else "are",
                "named": f" ({', '.join(names)})" if names else "",
                "norm": t.norm.title,
                "gives": gives,
                "where": flat[:8].tolist(),
            },
        )


def one_value(s: Scene) -> Iterator[Notice]:
    """A statistic over one value leaves nothing of it."""
    for t in s.own:
        if t.norm.centred and t.facts.values_per_statistic == 1:
            gives = "0 / 0 = nan" if t.norm.eps == 0 else "0" if t.norm.bias is None else "the bias"
            yield Notice(
                "one_value",
                "{norm} has one value for {each}: it gives {gives} for any input.",
                {"norm": t.norm.title, "each": labels.each(s.unit(t)), "gives": gives},
            )


def out_of_range(s: Scene) -> Iterator[Notice]:
    """A variance that float64 cannot hold."""
    for t in s.own:
        lost = ~np.isfinite(t.var) | ((t.var == 0) & ~_constants(s, t))
        if lost.any():
            yield Notice(
                "out_of_range",
                "{count} of {total} variances of {norm} leave the range of float64: these outputs are wrong; scale the "
                "batch.",
                {"count": int(lost.sum()), "total": lost.size, "norm": t.norm.title},
            )


def ceiling(s: Scene) -> Iterator[Notice]:
    """No normalized value exceeds sqrt(m - 1); one that comes near stands alone in its group."""
    for t in s.own:
        m = t.facts.values_per_statistic
        if not t.norm.centred or m < 8:
            continue
        least, most = int(t.xhat.argmin()), int(t.xhat.argmax())
        at = np.unravel_index(most if t.xhat.flat[most] >= -t.xhat.flat[least] else least, t.xhat.shape)
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


def eps(s: Scene) -> Iterator[Notice]:
    """How much eps shrinks what is not constant."""
    for t in s.shown:
        live = t.var[(t.var > 0) & np.isfinite(t.var)]
        if t.norm.eps == 0 or not live.size:
            continue
        shrunk = 1 - math.sqrt(live.min() / (live.min() + t.norm.eps))
        if shrunk > 1e-3:
            yield Notice(
                "eps",
                "eps matters: it shrinks {norm}'s output by up to {shrunk:.1%} (variance {var:s}, eps {eps:s}).",
                {"norm": t.norm.title, "shrunk": shrunk, "var": float(live.min()), "eps": t.norm.eps},
            )


def nonfinite(s: Scene) -> Iterator[Notice]:
    """How far a nan or inf reaches: to all that shares statistics with it."""
    bad = int((~torch.isfinite(s.x)).sum())
    reach = []
    for t in s.shown:
        rows = int((~np.isfinite(t.var)).sum()) * t.facts.values_per_statistic
        reach.append(f"{t.norm.title} {int((~np.isfinite(t.y)).sum()) if t.norm.uses_running else rows}")
    yield Notice(
        "nonfinite",
        "{bad} of {total} values {are} not finite. Outputs spoiled: {reach}: those that share statistics with one.",
        {"bad": bad, "total": s.x.numel(), "are": "is" if bad == 1 else "are", "reach": ", ".join(reach)},
    )


def _varies(t: Trace) -> bool:
    """True if there was something to throw away."""
    return not t.norm.centred or (t.facts.values_per_statistic > 1 and bool((t.var > 0).any()))


def _constants(s: Scene, t: Trace) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """True for each kept index whose values are all the same; a variance may also be too small for float64."""
    suspects = t.var == 0
    if not suspects.any():
        return suspects
    pattern = t.norm.pattern
    values = s.x.reshape([t.sizes[name] for name in pattern.names])
    values = values.permute([pattern.names.index(name) for name in (*pattern.right, *pattern.averaged)])
    dims = tuple(range(len(pattern.right), values.dim()))
    return suspects & (values.amax(dims) == values.amin(dims)).numpy()


def _kept_name(s: Scene, t: Trace, where: np.ndarray[tuple[int], np.dtype[np.intp]]) -> str:
    names = labels.letters(t.norm.pattern, s.layout)
    return ",".join(
        f"{labels.axis_prefix(s.layout, names[axis])}{i}" for axis, i in zip(t.norm.pattern.right, where, strict=True)
    )
