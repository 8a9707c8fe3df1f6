"""What to notice between training and eval: what running statistics make of the same batch, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from . import labels
from .scene import Notice, Scene

WARM = 0.99  # this much of a batch in the running statistics, and what remains is the unbiased variance


def untrained(s: Scene) -> Iterator[Notice]:
    """Eval on the statistics of a new layer, because the batch cannot be trained on."""
    for t in s.shown:
        running = t.norm.running
        if t.norm.uses_running and running is not None and running.steps:
            why = replace(t.norm, training=True).refusal(s.x)
            if why:
                yield Notice(
                    "untrained",
                    "{norm} cannot train on this batch: its running statistics are a new layer's, 0 and 1.",
                    {"norm": t.norm.title, "why": why},
                )


def evaluated(s: Scene) -> Iterator[Notice]:
    """What eval() gives after a few training steps on this batch, and why it differs."""
    for t in s.shown:
        running = t.norm.running
        if running is None or running.steps is None or replace(t.norm, training=True).refusal(s.x):
            continue
        other = replace(t.norm, training=t.norm.uses_running).run(s.x).y.double().numpy()
        y, trained = (t.y, other) if t.norm.uses_running else (other, t.y)
        gap = float(np.abs(y - trained).max())
        whole = y[s.cell[0]].size <= 4
        held = 1 - (1 - s.momentum) ** s.steps
        m = t.facts.values_per_statistic
        without = [o.norm.title for o in s.separate if not o.facts.needs_running_statistics]
        when = {0: "before any step", 1: "after this one step"}.get(s.steps, f"after {s.steps} such steps")
        sentence = f"eval() {when}: {{norm}} gives {{who}} {{y:y}} ({_cause(held)})"
        sentence += ", up to {gap:s} from training." if math.isfinite(gap) else "."
        yield Notice(
            "eval",
            sentence + (" {without} {has} no such state." if without else ""),
            {
                "steps": s.steps,
                "norm": t.norm.title,
                "who": f"s{s.cell[0]}" if whole else s.name(*s.cell),
                "y": tuple(float(v) for v in (y[s.cell[0]] if whole else y[s.cell]).reshape(-1)),
                "held": held,
                "ratio": math.sqrt((m - 1) / m),
                "gap": gap,
                "without": labels.listed(without) if without else "",
                "has": "has" if len(without) == 1 else "have",
            },
        )


def _cause(held: float) -> str:
    if held == 0:
        return "running statistics still those of a new layer, 0 and 1"
    if held < WARM:
        return f"running statistics still cold: {{held:.{0 if held >= 0.01 else 2}%}} of this batch"
    return "what stays: it divides by the unbiased variance, a factor {ratio:.4f}"


def layer_modes(s: Scene) -> Iterator[Notice]:
    """A layer's own running statistics against this batch's."""
    for t in s.own:
        running = t.norm.running
        if running is None or running.steps is not None:
            continue
        now = replace(t.norm, training=False).run(s.x).y.double().numpy()
        away = np.abs(now - t.y).max(axis=tuple(i for i, a in enumerate(s.layout) if a != "c"))
        c = int(np.nan_to_num(away).argmax())
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
