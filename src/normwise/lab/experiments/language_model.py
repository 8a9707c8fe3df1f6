"""Does a transformer that predicts text prefer Layer Norm to Batch Norm?

Byte-level causal transformers (width 64, 4 heads, norm before attention and MLP and before the head), 2 and 6 layers,
learn a fixed list of files of the running Python's standard library, 16 sequences of 64 bytes an update; other files
validate, others test. All norms, and none, get equal updates, in the standard size 1,000 at 2 layers, where all
predict better than counting bytes (after 500 they did not, and the norms stood closer together), and 250 at 6;
the same initial weights and order, Adam without weight decay, warm-up and cosine, and each the learning rate
that does best on the validation files with seeds of their own. The loss is that of windows of the test files, drawn for
each seed, in nats per byte. Batch Norm is scored with running statistics, with those averaged over the training files
under the final weights, and in training mode, which sees later bytes and other sequences and is no score of a language
model. Beside them stand models that count one, two and three bytes, smoothed by what does best on the validation
files.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, mean
from ..language import NORMS, Setting, corpus, drawn, mean_nats, reestimate, train, training_mode, tune

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST = 0.02
GRIDS = {2: (1e-3, 10**-2.5, 1e-2, 10**-1.5), 6: (10**-2.5, 1e-2, 10**-1.5)}
TEXT = "text"


def _text(updates: dict[int, int], _: Results) -> Numbers:
    text = corpus()
    return {
        "python": platform.python_version(),
        "bytes": {part: len(values) for part, values in text.parts.items()},
        "sha256": text.hashes,
        "n-grams": _ngrams(text.parts),
        "updates": {str(depth): count for depth, count in updates.items()},
    }


def _ngrams(parts: dict[str, Tensor]) -> Numbers:
    """Nats per byte of the test files for counts of 1, 2 and 3 bytes, each smoothed towards the one before."""
    scored = ("validation", "test")
    lower: dict[str, Tensor | float] = dict.fromkeys(scored, 1 / 256)
    found: Numbers = {}
    for order in (1, 2, 3):
        counts = torch.bincount(_codes(parts["train"], order), minlength=256**order).double()
        contexts = counts.view(-1, 256).sum(1)
        tried = {}
        for strength in (2.0**k for k in range(13)):
            chances: dict[str, Tensor | float] = {}
            for part in scored:
                code = _codes(parts[part], order)
                chances[part] = (counts[code] + strength * lower[part]) / (contexts[code // 256] + strength)
            nats = {part: -torch.as_tensor(chance).log().mean().item() for part, chance in chances.items()}
            tried[strength] = nats, chances
        best = min(tried, key=lambda strength: tried[strength][0]["validation"])
        nats, lower = tried[best]
        found[str(order)] = {"nats": nats["test"], "smoothing": best}
    return found


def _codes(text: Tensor, order: int) -> Tensor:
    """A number for the last bytes, so many, at each place from the third on."""
    return torch.stack([text[2 - back : len(text) - back] * 256**back for back in range(order)]).sum(0)


def _train(setting: Setting, seeds: Sequence[int], sequences: int, results: Results) -> Numbers:
    rate = results[f"tune {_name(setting)}"]["best"]
    model = train(setting, [(seed, rate) for seed in seeds])
    test = drawn("test", seeds, sequences)
    found = {"running": mean_nats(model, test)}
    if setting.norm == "batch_norm":
        with training_mode(model):
            found["training mode"] = mean_nats(model, test, setting.sequences)
        reestimate(model, drawn("train", seeds, 128))
        found["re-estimated"] = mean_nats(model, test)
    return found


def _name(setting: Setting) -> str:
    return f"{setting.norm} {setting.depth}"


def trials(plan: Plan) -> list[Trial]:
    """The text; each norm at each depth is tuned, then trained with the seeds that count, all at once."""
    lengths: dict[int, int] = plan.choose({2: 25}, {2: 1000, 6: 250}, {2: 3000, 6: 3000})
    base, done = plan.seed_base, [Trial(TEXT, partial(_text, lengths))]
    for depth, updates in lengths.items():
        shallow = depth == 2
        tuning = range(base + 900, base + 900 + (plan.choose(1, 2, 3) if shallow else 1))
        seeds = plan.seeds(full=30 if shallow else 10)
        grid = plan.choose(GRIDS[2][1:], GRIDS[depth], GRIDS[depth])
        for norm in NORMS:
            setting = Setting(norm, updates, plan.choose(4, 16, 16), depth)
            weight = depth * updates / 1000
            done += [
                Trial(
                    f"tune {_name(setting)}", partial(_tune, setting, tuning, grid), weight * len(grid) * len(tuning)
                ),
                Trial(
                    f"train {_name(setting)}",
                    partial(_train, setting, seeds, plan.choose(64, 512, 512)),
                    weight * len(seeds),
                ),
            ]
    return done


def _tune(setting: Setting, seeds: Sequence[int], grid: Sequence[float], _: Results) -> Numbers:
    return tune(setting, seeds, grid)


def judge(results: Results) -> Finding:
    """Batch Norm's test loss less Layer Norm's, and the others'."""
    scores = {name.removeprefix("train "): found for name, found in results.items() if name.startswith("train ")}
    means = {f"{case}, {how}": mean(nats, "nats") for case, found in scores.items() for how, nats in found.items()}
    beside = _beside_layer_norm(scores)
    effect = beside.pop("batch_norm 2, running")
    text = results[TEXT]
    counted = ", ".join(f"{found['nats']:.3f}" for found in text["n-grams"].values())
    deep = beside.get("batch_norm 6, running")
    return Finding(
        effect=effect,
        batch_norm=f"{means['batch_norm 2, running']} a byte"
        + (f"; at 6 layers {deep} over Layer Norm" if deep else ""),
        layer_norm=f"{means['layer_norm 2, running']}, {text['updates']['2']:,} updates; no norm "
        f"{beside['none 2, running']} over it",
        correction=_correction(effect, beside, text["updates"]),
        sentences=[
            *_of_rates(results),
            f"counting 1, 2 and 3 bytes costs {counted} nats",
            *(_of_training(int(depth), count, text, means) for depth, count in text["updates"].items()),
            f"text: {len(text['sha256'])} files of Python {text['python']}, {text['bytes']['test']:,} bytes to test",
        ],
        others={f"{name} - layer_norm": e for name, e in beside.items()} | means,
    )


def _beside_layer_norm(scores: Results) -> dict[str, Effect]:
    """The loss less Layer Norm's at the same depth, paired seeds; not in training mode, which sees the future."""
    return {
        f"{case}, {how}": mean(
            [a - b for a, b in zip(nats, scores[f"layer_norm {case.split()[1]}"]["running"], strict=True)], "nats"
        )
        for case, found in scores.items()
        for how, nats in found.items()
        if not case.startswith("layer_norm") and how != "training mode"
    }


def _correction(effect: Effect, beside: dict[str, Effect], updates: dict[str, int]) -> str:
    if effect.low < SMALLEST:
        return ""
    parts = [
        f"{plots.NAMES[case.split()[0]]} is {'better' if gap.high < 0 else 'as good'} at {case.split()[1]} layers: "
        f"{gap} beside Layer Norm"
        for name, gap in beside.items()
        for case in (name.split(",")[0],)
        if not case.startswith("batch_norm") and gap.high < SMALLEST
    ]
    deep = beside.get("batch_norm 6, running")
    if deep and deep.low < SMALLEST:
        parts.append(f"not shown at 6 layers, where Batch Norm is at {deep} after {updates['6']:,} updates")
    return f"Layer Norm beats Batch Norm by {effect}, but {'; '.join(parts)}" if parts else ""


def _of_training(depth: int, updates: int, text: Numbers, means: dict[str, Effect]) -> str:
    """Whether the models of a depth learned more than to count."""
    nats = [e.value for name, e in means.items() if name.endswith(f" {depth}, running")]
    ahead = text["n-grams"]["3"]["nats"] - max(nats)
    said = "all models predict" if ahead > 0 else "not all models predict"
    return f"{depth} layers, {updates:,} updates: {said} better than counting 3 bytes; the worst by {ahead:+.3f} nats"


def _of_rates(results: Results) -> list[str]:
    """What one rate for all would have said, and where the best rate is no optimum."""
    curves = {name.removeprefix("tune "): found for name, found in results.items() if name.startswith("tune ")}
    said = [
        f"the best learning rate lies at the end of the grid: {c}" for c, found in curves.items() if not found["inside"]
    ]
    ln, none = curves["layer_norm 2"], curves["none 2"]
    rate = min(set(ln["rates"]) & set(none["rates"]))
    gap = none["nats"][none["rates"].index(rate)] - ln["nats"][ln["rates"].index(rate)]
    said.append(
        f"at a learning rate of {rate:.2g} for all, no norm is {gap:+.3f} nats beside Layer Norm in validation; each "
        f"at its best {min(none['nats']) - min(ln['nats']):+.3f}"
    )
    return said


def plot(figure: Figure, results: Results) -> None:
    """Losses beside Layer Norm's."""
    finding = judge(results)
    gaps = {
        name.removesuffix(" - layer_norm"): e for name, e in finding.others.items() if name.endswith("- layer_norm")
    }
    gaps = {"batch_norm 2, running": finding.effect, **gaps}
    names = sorted(gaps, key=lambda name: (name.split()[1], list(gaps).index(name)))
    axes = figure.subplots()
    axes.axvline(0, color=plots.COLORS["layer_norm"], linewidth=1, zorder=0)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for i, name in enumerate(names):
        color, gap = plots.COLORS[name.split()[0]], gaps[name]
        axes.plot([gap.low, gap.high], [i, i], color=color, linewidth=2)
        axes.plot(gap.value, i, "o", color=color, markersize=5)
        axes.annotate(str(gap), (gap.high, i), (5, 0), textcoords="offset points", va="center", color=color, bbox=white)
    labels = [_label(name) for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("test loss less Layer Norm's, nats per byte")
    axes.margins(x=0.4, y=0.1)


def _label(name: str) -> str:
    norm, depth, how = name.replace(",", "").split(" ", 2)
    ways = f", {how}" if norm == "batch_norm" else ""
    return f"{plots.NAMES[norm]}{ways}, {depth} layers"


EXPERIMENT = Experiment(
    name="language_model",
    aspect="Transformers",
    claim="Layer Norm is the norm for transformers: language models prefer it.",
    contrast=Contrast(
        "test loss, Batch Norm with running statistics less Layer Norm, 2 layers, paired seeds", SMALLEST
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
