"""Which norm do architectures use?

Every architecture of the installed transformers package that its registry lists for a task is built with its default
config, without weights, and its norms are counted: modules without children whose class name says norm. What a norm is,
its behaviour decides, not its name (T5LayerNorm is an RMSNorm): scaling the input changes nothing; another example, or
another position, changes the output or not; adding a constant does or not. An architecture belongs to the first task
that lists it; causal language models are those that neither the masked nor the sequence-to-sequence models list; image
models are convolutional if no class name says attention. The interval takes architectures for independent draws, though
many descend from each other. The claim is read as: most convolutional networks, and most causal language models, have
the norm it names more often than any other; RMSNorm is not Layer Norm. Those that cannot be built are named, and
counted against the claim in a sentence.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import plots
from ..experiment import Contrast, Experiment, Finding, Numbers, Plan, Results, Trial
from ..intervals import Effect, share
from ..kinds import KINDS, norms_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = {
    "masked language": ("AutoModelForMaskedLM", "MASKED_LM"),
    "sequence to sequence": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "causal language": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "images": ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
    "image backbones": ("AutoBackbone", "BACKBONE"),
    "object detection": ("AutoModelForObjectDetection", "OBJECT_DETECTION"),
    "speech": ("AutoModelForCTC", "CTC"),
    "speech to text": ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ"),
    "images and text": ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT"),
}
"""What the registry calls a task: its auto class and its list. An architecture counts where it comes first."""

LANGUAGE, CONVOLUTIONS, VISION = "causal language", "images, convolutional", "images, with attention"
ROWS = {LANGUAGE: "causal language", VISION: "images, attention", CONVOLUTIONS: "images, convolutional"}
PER_TOKEN = ("layer_norm", "rms_norm")


@contextmanager
def _transformers() -> Iterator[Any]:
    """The package, quiet, and asking nobody."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        package = importlib.import_module("transformers")
    except ImportError:
        raise RuntimeError(
            "in_use: transformers must be installed; it is not; run `pip install transformers`."
        ) from None
    before = package.logging.get_verbosity()
    package.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield package
    finally:
        package.logging.set_verbosity(before)


def _architectures(task: str) -> list[str]:
    """The model types that a task lists and none before it, each class once."""
    names = importlib.import_module("transformers.models.auto.modeling_auto")
    known: set[str] = set()
    for before, (_, listed) in TASKS.items():
        mapping = getattr(names, f"MODEL_FOR_{listed}_MAPPING_NAMES")
        if before == task:
            of_class = {str(mapping[kind]): kind for kind in reversed(mapping) if kind not in known}
            return sorted(of_class.values())
        known |= set(mapping)
    raise KeyError(task)


def _build(package: Any, task: str, model_type: str) -> nn.Module:
    config = package.AutoConfig.for_model(model_type)
    with torch.device("meta"):
        return getattr(package, TASKS[task][0]).from_config(config)


def _count(task: str, part: int, _: Results) -> Numbers:
    """Each architecture's norms, or why it cannot be built."""
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    known: dict[type, str | None] = {}
    with _transformers() as package:
        for model_type in _architectures(task)[::part]:
            try:
                model = _build(package, task, model_type)
            except Exception as error:  # of any kind: default configs are not made for this
                failed[model_type] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                continue
            attention = any("attention" in type(layer).__name__.lower() for layer in model.modules())
            found[model_type] = {"norms": dict(norms_in(model, known)), "attention": attention}
        unknown = sorted(layer.__name__ for layer, kind in known.items() if kind is None)
        return {"version": package.__version__, "built": found, "failed": failed, "unknown": unknown}


def trials(plan: Plan) -> list[Trial]:
    """A task after the other; a smoke test builds part of the language and image models."""
    if plan.size == "smoke":
        parts = {LANGUAGE: 3, "images": 4, "image backbones": 4}
        return [Trial(task, partial(_count, task, part)) for task, part in parts.items()]
    return [Trial(task, partial(_count, task, 1)) for task in TASKS]


def _groups(results: Results) -> dict[str, list[Counter[str]]]:
    """The norms of the architectures of each row; images are one, parted by attention."""
    groups: dict[str, list[Counter[str]]] = {LANGUAGE: [], VISION: [], CONVOLUTIONS: []}
    for task, found in results.items():
        for model in found["built"].values():
            images = VISION if model["attention"] else CONVOLUTIONS
            group = images if task in ("images", "image backbones") else task
            groups.setdefault(group, []).append(Counter(model["norms"]))
    return {group: models for group, models in groups.items() if models}


def _mostly(models: Sequence[Counter[str]], kind: str) -> Effect:
    """How many have this kind more often than any other; of no models nothing is known."""
    hits = sum(max(norms, key=lambda k: norms[k], default="") == kind for norms in models)
    return share(hits, len(models)) if models else Effect(0.0, 0.0, 100.0, "%")


def _name(kind: str) -> str:
    return plots.NAMES.get(kind, "Group Norm")


def _per_token(norms: Counter[str]) -> bool:
    return not norms["batch_norm"] and any(norms[kind] for kind in PER_TOKEN)


def judge(results: Results) -> Finding:
    """The smaller of the shares of which the claim's halves speak."""
    groups = _groups(results)
    language, failed = groups[LANGUAGE], results[LANGUAGE]["failed"]
    convolutional = groups.get(CONVOLUTIONS, [])
    others = {f"{group}: {_name(kind)}": _mostly(m, kind) for group, m in groups.items() for kind in KINDS}
    others[f"{LANGUAGE}: any Batch Norm"] = share(sum(n["batch_norm"] > 0 for n in language), len(language))
    others[f"{LANGUAGE}: Layer Norm or RMSNorm, no Batch Norm"] = share(sum(map(_per_token, language)), len(language))
    layer, rms = (others[f"{LANGUAGE}: {_name(kind)}"] for kind in PER_TOKEN)
    batch = _mostly(convolutional, "batch_norm")
    hits = round(layer.value / 100 * len(language))
    return Finding(
        effect=Effect(min(batch.value, layer.value), min(batch.low, layer.low), min(batch.high, layer.high), "%"),
        batch_norm=f"{batch} of {len(convolutional)} convolutional nets",
        layer_norm=f"{layer} of {len(language)} causal language models; RMSNorm {rms}",
        sentences=[
            f"transformers {results[LANGUAGE]['version']}: {', '.join(f'{len(m)} {g}' for g, m in groups.items())}",
            f"had the {len(failed)} language models that cannot be built another norm, Layer Norm were that of "
            f"{share(hits, len(language) + len(failed))}",
            *_left_out(results),
        ],
        others=others,
    )


def _left_out(results: Results) -> Iterator[str]:
    for task, found in results.items():
        if found["failed"]:
            yield f"{task}, not built: {', '.join(found['failed'])}"
        if found["unknown"]:
            yield f"{task}, called norms but they do not normalize what they are given: {', '.join(found['unknown'])}"


def plot(figure: Figure, results: Results) -> None:
    """For each group the shares of the norms that most of its places have."""
    groups = _groups(results)
    axes = figure.subplots()
    for i, kind in enumerate(KINDS):
        color = plots.COLORS["other" if kind == "group_norm" else kind]
        axes.annotate(_name(kind), (103, len(groups) * i / 8), color=color, va="center", annotation_clip=False)
        for row, models in enumerate(groups.values()):
            effect, at = _mostly(models, kind), row + 0.18 * (i - 1.5)
            if effect.value > 0:
                axes.plot([effect.low, effect.high], [at, at], color=color, linewidth=1)
                axes.plot([effect.value], [at], marker="o", markersize=4, color=color)
    axes.set_yticks(range(len(groups)), [f"{ROWS.get(g, g)} ({len(m)})" for g, m in groups.items()])
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("this norm is the most frequent, % of architectures (built)")


EXPERIMENT = Experiment(
    name="in_use",
    aspect="What is used where",
    claim="Convolutional networks use Batch Norm, large language models use Layer Norm.",
    contrast=Contrast(
        "the smaller of two shares: convolutional networks whose norms are mostly Batch Norm, causal language models "
        "whose norms are mostly Layer Norm",
        50.0,
    ),
    method=__doc__,
    trials=trials,
    judge=judge,
    plot=plot,
)
