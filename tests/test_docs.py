"""The documentation is true: its code runs, its tables are what the code derives, its links and claims hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normwise as nw
from normwise.definitions import DEFINITIONS, LAYOUTS, facts

ROOT = Path(__file__).parents[1]
OURS = 1e-7 if cases.EXACT_SUMS else 2e-7  # A1
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
f = nw.functional


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and code of each python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, named as code hosts do."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def rows(page: str, cells: int) -> list[list[str]]:
    """The rows of the tables of a page with this many cells, without backticks."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    table = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in table if len(row) == cells]


@pytest.mark.parametrize(
    ("page", "columns"),
    [
        ("layer_norm.md", ["layer_norm"]),
        ("batch_norm.md", ["batch_norm"]),
        ("group_norm.md", ["group_norm", "instance_norm"]),
    ],
)
def test_layout_tables_are_derived(page: str, columns: list[str]) -> None:
    layouts = {layout for group in LAYOUTS.values() for layout in group}
    table = [row for row in rows(page, 3) if row[0] in layouts]
    assert len(table) >= 5
    for layout, *cells in table:
        for column, cell in zip(columns, cells, strict=False):
            pattern = DEFINITIONS[column].at(layout)
            assert cell == str(pattern) if pattern.averaged else cell.startswith("none")


def test_facts_table_is_derived() -> None:
    table = {row[0]: row[1:] for row in rows("which-norm.md", 6)}
    for definition in DEFINITIONS.values():
        pattern = definition.at("nchw")
        fact = facts(
            pattern, pattern.sizes((8, 6, 4, 4), {"g": 2} if "g" in pattern.names else {}), centred=definition.centred
        )
        yes = (
            fact.depends_on_other_examples,
            fact.trains_on_one_value_per_channel,
            fact.needs_running_statistics,
            fact.communicates,
        )
        assert table[definition.title] == [str(pattern), *("yes" if value else "no" for value in yes)]


def test_api_page_names_everything_public() -> None:
    listed = set(re.findall(r"`(\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8")))
    assert {*nw.__all__, *nw.nn.__all__, *f.__all__} - listed == set()


# What the pages say about torch 2.13. If a claim fails with a later torch, the page must say so.

Call = Callable[[ModuleType, Tensor], Tensor]

CALLS: dict[str, Call] = {
    "layer_norm": lambda m, x: m.layer_norm(x.flatten(1), x[0].flatten().shape),
    "rms_norm": lambda m, x: m.rms_norm(x.flatten(1), x[0].flatten().shape),
    "group_norm": lambda m, x: m.group_norm(x, 8),
    "batch_norm": lambda m, x: m.batch_norm(x, None, None, training=True),
}


def error(norm: str, module: ModuleType, x: Tensor) -> float:
    exact = CALLS[norm](f, x.double())
    return ((CALLS[norm](module, x).double() - exact).norm() / exact.norm()).item()


def images(ratio: float, *, channels_last: bool = False) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(64, 32, 8, 8) + ratio
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("norm", CALLS)
def test_results_agree_with_torch_at_a_small_mean(norm: str) -> None:
    assert error(norm, F, images(0.5)) < 1e-6
    assert error(norm, f, images(0.5)) < OURS


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["layer_norm", "group_norm", "batch_norm"])
def test_error_does_not_grow_with_the_mean(norm: str, channels_last: bool) -> None:
    x = images(1e4, channels_last=channels_last)
    assert error(norm, f, x) < OURS
    assert error(norm, F, x) > (1 if norm == "group_norm" and channels_last else 1e-4)


def test_torch_group_norm_channels_last_at_ratio_100() -> None:
    assert 3e-4 < error("group_norm", F, images(1e2, channels_last=True)) < 3e-3


def test_torch_loses_large_values() -> None:
    x = torch.randn(4, 64)
    for scale in (1e19, 1e30):
        assert f.layer_norm(x * scale, (64,)).std() > 0.9
        assert f.rms_norm(x * scale, (64,)).std() > 0.9
    assert F.layer_norm(x * 1e19, (64,)).eq(0).all()
    assert F.rms_norm(x * 1e19, (64,)).eq(0).all()
    assert F.layer_norm(x * 1e30, (64,)).isnan().all()


def test_float64_that_does_not_square_gives_zero_as_in_torch() -> None:
    x = torch.tensor([[1e200, -1e200]], dtype=torch.float64)
    assert f.layer_norm(x, (2,)).eq(0).all()
    assert F.layer_norm(x, (2,)).eq(0).all()


def test_torch_sums_bfloat16_gradients_in_bfloat16() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(8192, 256).bfloat16(), (torch.randn(8192, 256) + 0.5).bfloat16()
    exact = dy.double().sum(0)
    errors = []
    for module in (F, f):
        weight, bias = torch.ones(256, requires_grad=True), torch.zeros(256, requires_grad=True)
        module.layer_norm(x, (256,), weight, bias).backward(dy)
        errors.append(((bias.grad - exact).norm() / exact.norm()).item())
    assert errors[0] > 0.3
    assert errors[1] < 1e-6


x = torch.randn(4, 6, 5)
zeros, ones = torch.zeros(6), torch.ones(6)
half = ones.bfloat16()

LENIENT: dict[str, tuple[Callable[[ModuleType], Any], type[Exception]]] = {
    "layer_norm mixed types": (lambda m: m.layer_norm(x[..., 0], (6,), half), RuntimeError),
    "group_norm mixed types": (lambda m: m.group_norm(x, 2, half), RuntimeError),
    "instance_norm mixed types": (lambda m: m.instance_norm(x, weight=half), RuntimeError),
    "batch_norm mixed types": (lambda m: m.batch_norm(x, zeros.double(), ones.double()), RuntimeError),
    "batch_norm eps=0": (lambda m: m.batch_norm(x, None, None, training=True, eps=0.0), ValueError),
    "batch_norm momentum": (lambda m: m.batch_norm(x, zeros, ones, momentum=None), TypeError),
}


@pytest.mark.parametrize("claim", LENIENT)
def test_normwise_is_more_lenient(claim: str) -> None:
    call, torch_error = LENIENT[claim]
    with pytest.raises(torch_error):
        call(F)
    assert call(f).isfinite().all()


STRICT: dict[str, Callable[[ModuleType], Any]] = {
    "layer_norm negative eps": lambda m: m.layer_norm(x, (5,), eps=-1e-5),
    "layer_norm infinite eps": lambda m: m.layer_norm(x, (5,), eps=float("inf")),
    "layer_norm NaN eps": lambda m: m.layer_norm(x, (5,), eps=float("nan")),
    "rms_norm negative eps": lambda m: m.rms_norm(x, (5,), eps=-1e-5),
    "group_norm negative eps": lambda m: m.group_norm(x, 2, eps=-1e-5),
    "instance_norm negative eps": lambda m: m.instance_norm(x, eps=-1e-5),
    "batch_norm infinite eps": lambda m: m.batch_norm(x, None, None, training=True, eps=float("inf")),
}


@pytest.mark.parametrize("claim", STRICT)
def test_normwise_is_stricter(claim: str) -> None:
    STRICT[claim](F)
    with pytest.raises(ValueError, match="eps must be 0 or more and finite"):
        STRICT[claim](f)


def test_rms_norm_refuses_complex() -> None:
    value = torch.randn(2, 3, dtype=torch.complex64)
    assert F.rms_norm(value, (3,), eps=1e-5).is_complex()
    with pytest.raises(TypeError, match="must be floating point"):
        f.rms_norm(value, (3,))


def test_rms_norm_does_not_warn_of_another_weight_type() -> None:
    f.rms_norm(x.double(), (5,), torch.ones(5))


def test_instance_norm_without_state_takes_any_number_of_channels() -> None:
    with pytest.warns(UserWarning, match="does not match num_features"):
        torch.nn.InstanceNorm1d(3)(x)
    nw.nn.InstanceNorm1d(3)(x)


def test_empty_batch_keeps_running_statistics_of_instance_norm() -> None:
    for module, kept in ((F, False), (f, True)):
        mean, var = zeros.clone(), ones.clone()
        module.instance_norm(x[:0], mean, var)
        assert torch.equal(mean, zeros) == kept
        assert torch.equal(var, ones) == kept


def test_running_var_saturates() -> None:
    value = torch.tensor([[-3e38], [3e38]])
    theirs, ours = torch.nn.BatchNorm1d(1), nw.nn.BatchNorm1d(1)
    theirs(value)
    with pytest.warns(UserWarning, match="running_var must fit its type"):
        ours(value)
    assert theirs.running_var.isinf()
    assert ours.running_var.isfinite()


def test_empty_batch_keeps_running_statistics_of_batch_norm() -> None:
    layer = nw.nn.BatchNorm1d(6)
    layer(x[:0])
    assert torch.equal(layer.running_mean, zeros)
    assert torch.equal(layer.running_var, ones)


@pytest.mark.parametrize(
    ("call", "kept_by_torch"),
    [
        (lambda m, x: m.layer_norm(x, x.shape[-1:]), False),
        (lambda m, x: m.instance_norm(x), False),
        (lambda m, x: m.group_norm(x, 2), True),
        (lambda m, x: m.batch_norm(x, None, None, training=True), True),
    ],
)
def test_channels_last_stays(call: Call, kept_by_torch: bool) -> None:
    image = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)
    assert call(f, image).is_contiguous(memory_format=torch.channels_last)
    assert call(F, image).is_contiguous(memory_format=torch.channels_last) == kept_by_torch


def test_one_value_per_group() -> None:
    for module in (F, f):
        with pytest.raises(ValueError, match="1 value per"):
            module.group_norm(torch.randn(1, 2), 2)
        y = module.group_norm(torch.randn(2, 2), 2, bias=torch.tensor([1.0, 2.0]))
        assert torch.allclose(y, torch.tensor([1.0, 2.0]).expand(2, 2), atol=1e-4)  # torch leaves 1e-5


WRONG: dict[str, Callable[[], Any]] = {
    "layer_norm: the last 1 axes of x must be normalized_shape (4,); x is (2, 3); "
    "change normalized_shape or move the axes to the end.": lambda: f.layer_norm(torch.randn(2, 3), (4,)),
    "group_norm: num_groups must divide the 6 channels; got 4 for x (4, 6, 5); choose a divisor.": lambda: f.group_norm(
        x, 4
    ),
    "batch_norm: 1 value per channel in training has no variance (x is (1, 64)); "
    "use a larger batch, eval() or layer_norm.": lambda: f.batch_norm(torch.randn(1, 64), None, None, training=True),
}


@pytest.mark.parametrize("message", WRONG)
def test_quoted_messages(message: str) -> None:
    assert any(message in page.read_text(encoding="utf-8") for page in PAGES)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        WRONG[message]()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_and_export() -> None:
    layer, value = nw.nn.LayerNorm(3), torch.randn(2, 3)
    with pytest.raises((RuntimeError, OSError)):  # by version of Python
        torch.jit.script(layer)
    with torch.no_grad():
        traced = torch.jit.trace(layer, value)
    assert torch.allclose(traced(3 * value), layer(3 * value))
    with pytest.raises(torch.jit.TracingCheckError):
        torch.jit.trace(layer, value)
    exported = torch.export.export(layer, (value,))
    assert any("normwise.layer_norm" in str(node.target) for node in exported.graph.nodes)


def test_the_readme_shows_the_first_screen() -> None:
    screen = (ROOT / "tests" / "first_screen.txt").read_text().strip()
    assert screen in (ROOT / "README.md").read_text().replace("from torch 4e-16", "from torch (rounding)")
