"""What to notice about the other samples: what happens to one when another is moved, left out, or alone is left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import labels
from .scene import Notice, Scene
from .trace import Array, Norm, Trace, trace

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]

EXACT = 2**22  # values times samples; up to here the norm runs without each sample, beyond without one
COMPARED = 2**20  # so many of the outputs that stay are compared bit by bit
PAIRED = 256  # so many samples are put beside the pinned one
LISTED = 4  # so many of them are listed


def neighbour(s: Scene) -> Iterator[Notice]:
    """Move or remove another sample: what becomes of the ones that nobody touched?"""
    n = len(s.x)
    if n < 2:
        return
    last = n - 1 if s.cell[0] != n - 1 else 0
    found = [_poked(s, t, last) if s.preset else _left_out(s, t, last) for t in s.coupled]
    for notice in found[:-1]:
        yield replace(notice, sentence=notice.sentence + ".")
    other = found[-1].values["other"] if found else last
    bits = _bits(s, other)
    if found:
        sentence = found[-1].sentence + (", {bits}." if bits else ".")
        yield Notice(found[-1].kind, sentence, {**found[-1].values, "bits": bits})
    elif bits:
        kind, start = ("neighbour", "Neighbour s{other} + 1") if s.preset else ("left_out", "Leave s{other} out")
        yield Notice(kind, start + ": {bits}.", {"other": other, "bits": bits})


def _bits(s: Scene, other: int) -> str:
    """Observed: with ``other`` gone, or moved in a preset, are the untouched outputs the same, bit for bit?"""
    stay = _others(len(s.x), other)[: max(1, COMPARED // s.x[0].numel())]
    kept: list[str] = []
    changed: list[str] = []
    for t in s.separate:
        after = t.norm.run(_moved(s, other)).y[stay] if s.preset else t.norm.run(s.x[torch.from_numpy(stay)]).y
        apart = np.abs(after.double().numpy() - t.y[stay])
        if np.array_equal(after.double().numpy(), t.y[stay], equal_nan=True):
            kept.append(t.norm.title)
        else:
            changed.append(f"{t.norm.title} changes by up to {labels.tidy(f'{np.nanmax(apart):.0e}')}")
    return ", ".join(([f"{labels.listed(kept)} keep{'s' * (len(kept) == 1)} every bit"] if kept else []) + changed)


def _others(n: int, k: int) -> Indices:
    return np.delete(np.arange(n), k)


def _moved(s: Scene, other: int) -> Tensor:
    moved = s.x.clone()
    moved[other] += 1
    return moved


def _poked(s: Scene, t: Trace, other: int) -> Notice:
    """Add 1 to every value of the last sample, or of the first if the last is pinned."""
    return Notice(
        "neighbour",
        "Neighbour s{other} + 1: {pinned} under {norm} goes {before:y} -> {after:y}",
        {
            "other": other,
            "pinned": s.name(*s.cell),
            "norm": t.norm.title,
            "before": float(t.y[s.cell]),
            "after": t.norm.run(_moved(s, other)).y[s.cell].item(),
        },
    )


class Move(NamedTuple):
    """What leaving sample ``other`` out moves most: by how much, where, and to what."""

    size: float
    other: int
    at: tuple[int, ...]
    after: float


def _left_out(s: Scene, t: Trace, last: int) -> Notice:
    """Leave out each other sample in turn; the largest move of what stays, and where."""
    n = len(s.x)
    if t.norm.refusal(s.x[:-1]):
        return Notice(
            "left_out", "Leave s{other} out: {norm} can no longer train", {"other": last, "norm": t.norm.title}
        )
    exact = n * s.x.numel() <= EXACT
    moves = [_without(s.x, t.norm, t.y, k) for k in range(n)] if exact else [_most_influential(s, t)]
    moves.sort(key=lambda move: (-move.size, move.other))
    size, k, at, after = moves[0]
    known = {"other": k, "norm": t.norm.title, "tried": len(moves)}
    if not size:
        return Notice("left_out", "Leave any sample out: under {norm} the others stay as they are", known)
    rest = ", ".join(f"s{move.other} {labels.short(move.size)}" for move in moves[1:3])
    return Notice(
        "left_out",
        "Leave s{other} out: under {norm} {cell} goes {before:y} -> {after:y}, the largest move{next}",
        {
            **known,
            "cell": s.name(*at),
            "before": float(t.y[at]),
            "after": after,
            "next": f" (then {rest})" if rest else "",
            "moves": [{"sample": move.other, "move": move.size, "at": move.at} for move in moves[:8]],
        },
    )


def _without(x: Tensor, norm: Norm, y: Array, k: int) -> Move:
    """Run the norm without sample ``k``."""
    stay = _others(len(x), k)
    after = norm.run(x[torch.from_numpy(stay)]).y.double().numpy()
    distance = np.nan_to_num(np.abs(after - y[stay]))
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(distance)), distance.shape))
    return Move(float(distance[where]), k, (int(stay[where[0]]), *where[1:]), float(after[where]))


def _most_influential(s: Scene, t: Trace) -> Move:
    """The sample whose absence moves the outputs most, found in closed form; then the norm is run without it.

    In normalized values z, whose variance is var * rstd², the others move to (z - mean) * r: the most at an extreme.
    """
    pattern, m, n = t.norm.pattern, t.facts.values_per_statistic, len(s.x)
    order = [pattern.batch, *pattern.right, *(name for name in pattern.averaged if name != pattern.batch)]
    z = torch.from_numpy(t.xhat.astype(np.float32)).reshape([t.sizes[name] for name in pattern.names])
    z = z.permute([pattern.names.index(name) for name in order]).reshape(n, t.var.size, m // n)
    var, eps = (torch.tensor(a, dtype=torch.float32).reshape(-1) for a in (t.var * t.rstd**2, t.norm.eps * t.rstd**2))
    left = m - m // n
    own, squares = (z.squeeze(-1), z.squeeze(-1).square()) if m == n else (z.sum(-1), z.square().sum(-1))
    mean = own / -left
    r = squares.neg_().add_(var * m).div_(left).sub_(mean.square()).clamp_(min=0).add_(eps).rsqrt_()
    shift, grown = mean.mul_(r), r.sub_(1)
    moved = torch.zeros_like(r)
    for extremes in (z.amax(-1), -z.amin(-1)):
        first, where = extremes.max(0, keepdim=True)
        second = extremes.scatter_(0, where, -torch.inf).amax(0, keepdim=True)
        others = first.expand_as(moved).scatter(0, where, second)  # without a sample, its own extreme is gone
        moved = torch.maximum(moved, others.mul_(grown).sub_(shift).abs_())
        shift = -shift
    by_channel = pattern.right == (t.norm.affine,)
    if t.norm.weight is not None and by_channel:
        moved = moved * torch.tensor(t.norm.weight).abs()
    k, row = divmod(int(moved.nan_to_num().argmax()), t.var.size)
    if not by_channel:
        return _without(s.x, t.norm, t.y, k)
    axis = s.layout.index("c")  # the channels do not touch one another: one is enough
    weight, bias = (None if p is None else p[row : row + 1] for p in (t.norm.weight, t.norm.bias))
    norm = replace(t.norm, weight=weight, bias=bias)
    move = _without(s.x.narrow(axis, row, 1), norm, t.y.take([row], axis), k)
    return move._replace(at=tuple(row if i == axis else place for i, place in enumerate(move.at)))


def fewer(s: Scene) -> Iterator[Notice]:
    """The pinned value beside one neighbour at a time, and alone."""
    n, i = len(s.x), s.cell[0]
    if not 2 <= n <= PAIRED or s.x.numel() > EXACT:
        return
    others = [k for k in range(n) if k != i]
    pinned = (0, *s.cell[1:])
    for t in s.coupled:
        beside = [t.norm.run(s.x[[i, k]]).y[pinned].item() for k in others]
        alone = trace(s.x[[i]], t.norm)
        groups = [[i], *([i, k] for k in others)]
        apart = {o.norm.title: [o.norm.run(s.x[group]).y[pinned].item() for group in groups] for o in s.separate}
        start = (
            f"With one neighbour {{pinned}} under {{norm}} is {_beside(beside)}; alone "
            if n > 2
            else "{pinned} alone: "
        )
        one = "{norm} cannot train on it." if alone.refused else "{alone:y}." if n > 2 else "{norm} gives {alone:y}."
        yield Notice(
            "fewer",
            start + one + _every_time(apart),
            {
                "pinned": s.name(*s.cell),
                "norm": t.norm.title,
                "beside": tuple(beside),
                "listed": labels.listed([_signed(v) for v in beside], "or"),
                "others": ", ".join(f"s{k}" for k in others),
                "low": min(beside),
                "high": max(beside),
                "alone": math.nan if alone.refused else float(alone.y[pinned]),
                **{f"separate{j}": values[0] for j, values in enumerate(apart.values())},
            },
        )


def _beside(beside: list[float]) -> str:
    """What one neighbour makes of a value: each, or the range of many."""
    if len({_signed(v) for v in beside}) == 1:
        return "{low:y}, whichever it is"
    return "{listed} (beside {others})" if len(beside) <= LISTED else "{low:y} to {high:y}"


def _signed(v: float) -> str:
    return labels.tidy(f"{v:+.3g}") if v else "0"


def _every_time(apart: dict[str, list[float]]) -> str:
    """The norms that gave the same in every company."""
    same = [
        f" {title}: {{separate{j}:y}} every time."
        for j, (title, values) in enumerate(apart.items())
        if len(set(values)) == 1
    ]
    return "".join(same)
