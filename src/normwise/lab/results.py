"""Result files: everything that an experiment measured, as JSON that grows trial by trial."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import files
from .environment import environment
from .experiment import Experiment, Finding, Numbers, Plan

SCHEMA = 1
LAB = __name__.rpartition(".")[0]
JUDGING = (f"{LAB}.intervals", f"{LAB}.plots")
IMPORTS = (ast.Import, ast.ImportFrom)
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
        if found["experiment"] != name:
            raise KeyError("experiment")  # it names the file that is written next
        for key in ("environment", "trials", "seconds"):
            if not isinstance(found[key], dict):
                raise KeyError(key)
        sum(found["seconds"].values())  # which are numbers
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"results: {path} must be a result file of schema {SCHEMA}; {type(error).__name__} at {error}; delete it."
        ) from None


def fingerprint(experiment: Experiment) -> str:
    """Of the code that makes an experiment's numbers: trials of other code are not mixed with its own.

    Judging and drawing are none of it: they begin from the numbers each time.
    """
    found = sources(experiment)
    return hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()[:16]


def sources(experiment: Experiment) -> dict[str, str]:
    """What the trials use, by module: parts of the experiment's own, and those of the lab that these use, whole."""
    module = sys.modules[experiment.trials.__module__]
    text = _text(module)
    parts = _reached(text, experiment.trials.__name__)
    found = {module.__name__: "".join(parts.values()) or text}
    _collect([getattr(module, name) for name in parts] or list(vars(module).values()), found)
    return found


def _collect(values: Iterable[object], found: dict[str, str]) -> None:
    for value in values:
        used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(used, str) and used.startswith(LAB) and used not in found and used not in JUDGING:
            found[used] = _text(sys.modules[used])
            _collect(vars(sys.modules[used]).values(), found)


def _text(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text(encoding="utf-8")


def _reached(text: str, name: str) -> dict[str, str]:
    """The parts of a module that this one of them comes to by name, itself among them; of imports, only the names."""
    lines, named = text.splitlines(keepends=True), dict[str, ast.stmt]()
    for part in ast.parse(text).body:
        named |= dict.fromkeys(_names(part), part)
    found: dict[str, str] = {}
    left = {name}
    while left:
        if (name := left.pop()) in named and name not in found:
            part = named[name]
            start = min([part.lineno, *(d.lineno for d in getattr(part, "decorator_list", ()))])
            found[name] = "" if isinstance(part, IMPORTS) else "".join(lines[start - 1 : part.end_lineno])
            left |= {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
    return {name: found[name] for name in sorted(found)}


def _names(part: ast.stmt) -> list[str]:
    """What an import, definition or assignment names."""
    if isinstance(part, IMPORTS):
        return [alias.asname or alias.name for alias in part.names]
    if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
        return [part.name]
    targets = part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
