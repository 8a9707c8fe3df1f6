"""Result files: everything that an experiment measured, as JSON that grows trial by trial."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import files
from .environment import environment
from .experiment import Experiment, Finding, Numbers, Plan

SCHEMA = 1
LAB = __name__.rpartition(".")[0]
PACKAGES = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib"}


def need_packages() -> None:
    """Experiments need what comes with the extra ``lab``.

    Raises:
        RuntimeError: If part of it is missing.
    """
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(
            f"lab: {', '.join(PACKAGES.values())} must be installed; missing {', '.join(missing)}; "
            "pip install 'normwise[lab]'."
        )


@dataclass
class Record:
    """What is known of one run of an experiment.

    Args:
        experiment: Its name.
        plan: Size and first seed.
        code: The fingerprint of what ran it.
        planned: How many trials there are.
        environment: Of the run's beginning.
        trials: The numbers of the trials that have run, by name.
        seconds: What each took.
    """

    experiment: str
    plan: Plan
    code: str
    planned: int
    environment: dict[str, Any] = field(default_factory=environment)
    trials: dict[str, Numbers] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all trials have run."""
        return len(self.trials) == self.planned


def path_of(folder: Path, name: str) -> Path:
    """Where an experiment's results are."""
    return folder / f"{name}.json"


def save(folder: Path, experiment: Experiment, record: Record) -> None:
    """Write the file whole or not at all; once complete, with what the numbers say.

    Raises:
        ValueError: If the folder cannot be written.
    """
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "experiment": record.experiment,
        "claim": experiment.claim,
        "contrast": asdict(experiment.contrast),
        "size": record.plan.size,
        "seed_base": record.plan.seed_base,
        "data": record.plan.data,
        "code": record.code,
        "planned": record.planned,
        "environment": record.environment,
    }
    if record.complete:
        found |= described(experiment, experiment.judge(record.trials))
    found |= {"seconds": record.seconds, "trials": record.trials}
    path = path_of(folder, record.experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"results: {path} must be writable; {error.strerror}; choose another folder.") from None


def described(experiment: Experiment, finding: Finding) -> dict[str, Any]:
    """Verdict and finding as JSON."""
    plain = asdict(finding)
    for effect in (plain["effect"], *plain["others"].values()):
        del effect["freedom"]  # infinite for some; the interval says it
    return {"verdict": experiment.verdict(finding), "finding": plain}


def load(folder: Path, name: str) -> Record | None:
    """The record of an experiment, None if there is none.

    Raises:
        ValueError: If the file is not one of ours.
    """
    path = path_of(folder, name)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise KeyError("schema")
        return Record(
            found["experiment"],
            Plan(found["size"], found["seed_base"], found["data"]),
            found["code"],
            found["planned"],
            found["environment"],
            found["trials"],
            found["seconds"],
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"results: {path} must be readable; {error.strerror}; choose another folder.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"results: {path} must be a result file of schema {SCHEMA}; {type(error).__name__} at {error}; delete it."
        ) from None


def fingerprint(experiment: Experiment) -> str:
    """Of the code that makes an experiment's numbers: trials of other code are not mixed with its own.

    It is of the experiment's module and of those of the lab that it uses, plots apart.
    """
    found: dict[str, bytes] = {}
    _collect(experiment.trials.__module__, found)
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:16]


def _collect(name: str, found: dict[str, bytes]) -> None:
    module = sys.modules[name]
    found[name] = Path(module.__file__ or "").read_bytes()
    for value in vars(module).values():
        used = getattr(value, "__module__", None)
        if isinstance(used, str) and used.startswith(LAB) and used not in found and used != f"{LAB}.plots":
            _collect(used, found)
