"""Every scene of the page shows the numbers that Python computes, and can be used with the keyboard alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import Open, numbers, opened
from playwright.sync_api import Locator, Page, expect

import normwise as nw
from normwise import definitions

__all__ = ["opened"]  # a fixture

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"
X = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]], dtype=torch.float64)
DY = torch.tensor([[1, -1, 2], [0, 3, -2], [-1, 1, 0], [2, 0, 1]], dtype=torch.float64)


def text(found: Page | Locator) -> str:
    """What is read there, with the minus of programs."""
    place = found.locator("#scene") if isinstance(found, Page) else found
    return place.inner_text().replace("\u2212", "-").replace("\u00a0", " ")


def table(found: Locator) -> dict[str, list[str]]:
    """A table's rows by their headers."""
    rows = found.evaluate("t => [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText.trim()))")
    return {row[0].split("\n")[0]: [cell.replace("\u2212", "-") for cell in row[1:]] for row in rows}


def facts(found: Locator) -> dict[str, str]:
    pairs = found.locator("dl > div").all()
    return {p.locator("dt").inner_text(): p.locator("dd").inner_text().replace("\u2212", "-") for p in pairs}


def rounded(x: torch.Tensor | np.ndarray, digits: int = 3) -> np.ndarray:
    return np.round(np.asarray(x), digits) + 0.0


def test_one_number(opened: Open) -> None:
    page = opened("#v=1&scene=number")
    batch, layer = (text(page.get_by_label(name, exact=True)) for name in ("Batch Norm", "Layer Norm"))
    for said in ("2.5", "1.25", "1.118038", "-0.447212"):
        assert said in batch
    for said in ("4", "2.666667", "1.632996", "-1.224743"):
        assert said in layer
    page.get_by_role("grid", name="Batch Norm, output").get_by_role("gridcell").nth(11).click()
    assert "1.341635" in text(page.get_by_label("Batch Norm", exact=True))


@pytest.mark.parametrize(
    ("form", "shape"), [("(N, C)", (4, 6)), ("(N, L, C)", (4, 5, 6)), ("(N, C, H, W)", (4, 6, 2, 3))]
)
def test_who_shares_a_mean(opened: Open, form: str, shape: tuple[int, ...]) -> None:
    page = opened("#v=1&scene=cube")
    page.get_by_role("button", name=form, exact=True).click()
    layout = {2: "nc", 3: "nlc", 4: "nchw"}[len(shape)]
    for title, norm in (("Batch Norm", definitions.BATCH_NORM), ("Layer Norm", definitions.LAYER_NORM)):
        page.get_by_role("group", name="Norm").get_by_role("button", name=title).first.click()
        pattern = norm.at(layout)
        known = definitions.facts(pattern, pattern.sizes(shape))
        shown = facts(page.locator("#scene"))
        assert shown["depends on the other samples"] == ("yes" if known.depends_on_other_examples else "no")
        assert shown["must communicate in data-parallel training"] == ("yes" if known.communicates else "no")
        m = next(v for k, v in shown.items() if k.startswith("values behind"))
        assert m == str(known.values_per_statistic)
        assert next(v for k, v in shown.items() if k.startswith("means")) == str(math.prod(shape) // int(m))


@pytest.mark.parametrize(("size", "low", "high"), [(2, -1, 1), (3, -1.224736, 0), (4, -0.447212, -0.447212)])
def test_batch_size(opened: Open, size: int, low: float, high: float) -> None:
    page = opened(f"#v=1&scene=size&size={size}")
    said = text(page.get_by_role("status").filter(has_text="Layer Norm:"))
    assert f"{low:.3f}" in said
    assert f"{high + 0.0:.3f}" in said
    assert "-1.225 to the bit in each of the 8 batches" in said
    assert table(page.locator("#scene table")) == {
        "1": ["4", "0", "none"], "2": ["6", "0.833333", "1.666667"],
        "3": ["4", "1.111111", "1.666667"], "4": ["1", "1.250000", "1.666667"],
    }  # fmt: skip
    for share in ("141 %", "82 %", "53 %", "25 %"):
        assert share in page.locator("#scene svg").last.text_content()  # type: ignore[operator]


def test_one_sample_cannot_train(opened: Open) -> None:
    assert "cannot train on one value per feature" in text(opened("#v=1&scene=size&size=1"))
    assert "Cannot train: one value for each feature has no variance" in text(opened("#v=1&x=1,2"))


@pytest.mark.parametrize("steps", [0, 1, 10, 200])
@pytest.mark.parametrize("repair", [False, True])
def test_train_and_eval(opened: Open, steps: int, repair: bool) -> None:
    layer = nw.nn.BatchNorm1d(3, affine=False).double()
    for _ in range(steps):
        layer(X)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    if repair and steps:
        rest = 0.9**steps
        layer.running_mean.div_(1 - rest)
        layer.running_var.sub_(rest).div_(1 - rest)
    page = opened(f"#v=1&scene=eval&steps={steps}{'&repair=exact' if repair else ''}")
    y = layer.eval()(X)
    grid = page.get_by_role("grid", name="Batch Norm in eval").get_attribute("aria-label")
    assert grid
    np.testing.assert_allclose(numbers(page, grid), rounded(y), atol=1.1e-3 if steps == 200 else 1e-9)
    shown = [float(n.split()[0].replace("\u2212", "-")) for n in page.locator("#scene .now").all_inner_texts()]
    np.testing.assert_allclose(shown, [layer.running_mean[0], layer.running_var[0], y[0, 0]], atol=6e-7)
    assert "-0.387, not -0.447" in text(page)


@pytest.mark.parametrize("ranks", ["0011", "0101", "0001", "0110", "0000", "0123"])
def test_shards(opened: Open, ranks: str) -> None:
    page = opened(f"#v=1&scene=shards&ranks={ranks}")
    parts = [X[[i for i, r in enumerate(ranks) if r == rank], 0] for rank in sorted(set(ranks))]
    averaged = sum(p.var(correction=0) for p in parts) / len(parts), sum(p.mean() for p in parts) / len(parts)
    own = next(p for p in parts if X[0, 0] in p)
    shown = table(page.locator("#scene table"))
    assert float(shown["Averaged statistics"][0]) == pytest.approx(float(averaged[1]), abs=6e-4)
    assert float(shown["Averaged statistics"][1]) == pytest.approx(float(averaged[0]), abs=6e-7)
    assert shown["Synchronized"] == ["2.5", "1.25", "-0.447", "1080"]
    assert shown["Layer Norm"][-2:] == ["-1.225", "0"]
    if len(own) == 1:
        assert shown["Local Batch Norm"][2] == "cannot train"
    else:
        y = (X[0, 0] - own.mean()) / (own.var(correction=0) + 1e-5).sqrt()
        assert float(shown["Local Batch Norm"][2]) == pytest.approx(float(y), abs=6e-4)
    within = sum(p.var(correction=0) * len(p) for p in parts) / 4
    assert f"{round(float(within), 6):g} within the processes" in text(page)


def test_the_bytes_of_shards_are_those_that_are_sent() -> None:
    sums = torch.ops.normwise.batch_norm_sums(torch.randn(4, 3), 1e-5, None, True)
    assert sums.nbytes == 1080


def coded(words: list[str]) -> torch.Tensor:
    k = [["_abcdefghijklmnopqrstuvwxyz".index(letter) for letter in word] for word in words]
    return torch.tensor([[[i % 5, i % 7, 9 - i % 9] for i in word] for word in k], dtype=torch.float64)


def test_the_future(opened: Open) -> None:
    page = opened("#v=1&scene=future&text=the_car/sat_mat")
    before, after = coded(["the_cat", "sat_mat"]), coded(["the_car", "sat_mat"])
    assert "It has seen the future: 18 of 18 earlier outputs moved" in text(page)
    assert "The past kept every bit: none of 18 earlier outputs moved" in text(page)
    page.get_by_text("Every output").click()
    for title, pattern in (("Batch Norm", "n l c -> c"), ("Layer Norm", "n l c -> n l")):
        y = nw.functional.normalize(after, pattern)
        np.testing.assert_allclose(numbers(page, f"{title}, every output"), rounded(y.reshape(-1, 3)), atol=1e-9)
        moved = (y - nw.functional.normalize(before, pattern))[0, :6].abs().max()
        assert (f"{moved:.3f}" in text(page)) == (title == "Batch Norm")
    leak = json.loads((EVIDENCE / "leak.json").read_text(encoding="utf-8"))["finding"]["effect"]
    assert f"{leak['value']:.3f} nats [{leak['low']:.3f}, {leak['high']:.3f}]" in text(page)


@pytest.mark.parametrize("rows", [0, 1, 2, 8])
def test_padding(opened: Open, rows: int) -> None:
    page = opened(f"#v=1&scene=padding&padding={rows}")
    more = torch.cat([X, torch.zeros(rows, 3, dtype=torch.float64)])
    np.testing.assert_allclose(
        numbers(page, "Batch Norm, output"), rounded(nw.functional.normalize(more, "n c -> c")), atol=1e-9
    )
    for title, pattern in (("Batch Norm with a mask", "n c -> c"), ("Layer Norm", "n c -> n")):
        np.testing.assert_allclose(
            numbers(page, f"{title}, output")[:4], rounded(nw.functional.normalize(X, pattern)), atol=1e-9
        )
    assert text(page).count("kept every bit") == (2 if rows else 0)


def test_backward(opened: Open) -> None:
    page = opened("#v=1&scene=backward")
    np.testing.assert_array_equal(numbers(page, "dy, the gradient that comes in"), DY)
    for title, pattern in (("Batch Norm", "n c -> c"), ("Layer Norm", "n c -> n")):
        x, w, b = X.clone().requires_grad_(), torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        w.requires_grad_(), b.requires_grad_()  # type: ignore[func-returns-value]
        nw.functional.normalize(x, pattern, affine="c", weight=w, bias=b).backward(DY)
        assert x.grad is not None
        assert w.grad is not None
        assert b.grad is not None
        found = numbers(page, f"{title}, gradients of weight and bias")
        np.testing.assert_allclose(found, rounded(torch.stack([w.grad, b.grad])), atol=1e-9)
        grids = page.get_by_label(f"{title}, dx", exact=True).get_by_role("grid")
        terms = [numbers(page, str(g.get_attribute("aria-label"))) for g in grids.all()]
        np.testing.assert_allclose(terms[-1], rounded(x.grad), atol=1e-9)
        np.testing.assert_allclose(sum(terms[:-1]), x.grad, atol=2e-3)


def test_jacobian(opened: Open) -> None:
    page = opened("#v=1&scene=jacobian")
    for title, entries, rank, across in (("Batch Norm", "48", "6", "1.419849"), ("Layer Norm", "36", "4", "0")):
        assert list(facts(page.get_by_label(title, exact=True)).values()) == [across, entries, rank]


def test_blind_spots(opened: Open) -> None:
    page = opened("#v=1&scene=blind")
    shown = table(page.locator("#scene table").first)
    patterns = ("n c -> c", "n c -> n", None)
    changes = {
        "f0 × 2": lambda x: x[:, 0].mul_(2),
        "f0 ÷ 100": lambda x: x[:, 0].div_(100),
        "f0 + 5": lambda x: x[:, 0].add_(5),
        "s0 × 2": lambda x: x[0].mul_(2),
        "s0 ÷ 100": lambda x: x[0].div_(100),
        "s0 + 5": lambda x: x[0].add_(5),
    }
    assert list(shown) == list(changes)
    for name, change in changes.items():
        x = X.clone()
        change(x)
        for cell, pattern in zip(shown[name], patterns, strict=True):
            y, moved = (
                nw.functional.normalize(v, pattern) if pattern else nw.functional.rms_norm(v, (3,), eps=1e-5)
                for v in (X, x)
            )
            word, number = cell.split("\n")
            assert float(number.split()[0]) == pytest.approx(float((y - moved).abs().max()), rel=2e-3, abs=6e-4)
            assert (word == "blind") == (float((y - moved).abs().max()) < 0.06)


def test_conventions(opened: Open) -> None:
    page = opened("#v=1&scene=conventions&steps=10")
    keep = {"PyTorch": 0.9, "Keras 3": 0.99, "Flax": 0.99}
    for title, each in keep.items():
        said = text(page.locator("#scene section").filter(has=page.get_by_role("heading", name=title)))
        rest, unbiased = each**10, title == "PyTorch"
        assert f"{(1 - rest) * 2.5:.6f}" in said
        assert f"{rest + (1 - rest) * (5 / 3 if unbiased else 1.25):.6f}" in said


def test_numerics(opened: Open) -> None:
    page = opened("#v=1&scene=numerics&offset=5")
    found = page.locator("#scene table").evaluate("t => [...t.tBodies[0].rows].map(r => r.cells[1].innerText)")
    one_pass = [float(v.replace("\u2212", "-")) for v in found]
    expected = []
    for power in range(8):
        x = (X[:, 0].numpy() + 10.0**power).astype(np.float32)
        mean = np.float32(np.float32(x.sum(dtype=np.float32)) / np.float32(4))
        squares = np.float32((x * x).sum(dtype=np.float32) / np.float32(4))
        expected.append(float(np.float32(squares - np.float32(mean * mean))))
    assert one_pass[4:6] == [-8, 1024]
    np.testing.assert_allclose(one_pass, expected, atol=6e-4)


def test_a_recording(opened: Open, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3))
    with nw.record(model) as recording:
        for _ in range(5):
            model(torch.randn(8, 4))
    page = opened(text=recording.to_html())  # shows what it is about
    layer = recording.layers[0]
    mean, running = layer.of("mean"), layer.of("running_mean")
    assert mean is not None
    assert running is not None
    page.get_by_role("slider", name="Step").fill("4")
    said = text(page.locator("#scene [role=status]"))
    assert f"the batch's mean is {round(float(mean[4, 0]), 3):g}" in said
    assert f"{round(float(running[4, 0]), 3):g}" in said
    status = "document.querySelector('#scene [role=status]')"
    seen = f"() => seen.push({status}.innerText)"
    watch = f"new MutationObserver({seen}).observe({status}, {{subtree: true, characterData: true}})"
    page.evaluate(f"() => {{ window.seen = []; {watch} }}")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("() => seen.some(text => text.includes('step 1:')) && seen.at(-1).includes('step 4:')")
    expect(page.get_by_role("button", name="Play")).to_be_visible()  # again
    broken = '{"schema": "normwise.recording", "steps": [0], "layers": [{}]}'
    for i, (content, refused) in enumerate((("{}", "file of"), ("[[", "must be JSON"), (broken, "recording:"))):
        (tmp_path / f"run{i}.json").write_text(content)
        page.locator("input[type=file]").set_input_files(tmp_path / f"run{i}.json")
        expect(page.get_by_role("alert")).to_contain_text(refused)
    page.locator("input[type=file]").set_input_files(EVIDENCE / "leak.json")
    expect(page.locator("#scene")).to_contain_text("0.076 [0.063, 0.088] nats")  # when the file has been read


def test_the_tour_with_the_keyboard_alone(opened: Open) -> None:
    page = opened("#v=1")

    def to(target: Locator) -> None:
        """Press Tab until it is reached: whatever can be clicked must be reachable."""
        page.evaluate("document.activeElement.blur()")
        for _ in range(120):
            page.keyboard.press("Tab")
            if target.evaluate("e => e === document.activeElement"):
                return
        pytest.fail(f"the keyboard does not reach {target}")

    def press(name: str, *, exact: bool = True) -> None:
        to(page.get_by_role("button", name=name, exact=exact).first)
        page.keyboard.press("Enter")

    def write(cell: str, value: str) -> None:
        """Go to a field of the grid with the arrow keys, and type."""
        grid = page.get_by_role("grid", name="Input")
        to(grid.locator("[tabindex='0']"))
        row, column = int(cell[1]), int(cell[-1])
        for key in ["Home", "ArrowLeft"] * 3 + ["ArrowUp"] * 4 + ["ArrowDown"] * row + ["ArrowRight"] * column:
            page.keyboard.press(key)
        page.keyboard.type(value)
        page.keyboard.press("Enter")

    def solved(step: int) -> None:
        expect(page.get_by_label("Guided tour")).to_contain_text(f"Tour, {step} of 9")
        expect(page.get_by_label("Guided tour")).to_contain_text("Solved")

    press("Guided tour")
    write("s3, f2", "14")
    solved(1)
    press("Next")
    write("s3, f0", "-9")
    solved(2)
    press("Next")
    grid = page.get_by_role("grid", name="Layer Norm, output")
    to(grid.locator("[tabindex='0']"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    write("s3, f1", "4")
    solved(3)
    press("Next")
    to(page.get_by_role("checkbox", name="n samples"))
    page.keyboard.press("Space")
    solved(4)
    press("Next")
    to(page.get_by_role("slider", name="Which of"))
    page.keyboard.press("End")
    solved(5)
    press("Next")
    to(page.get_by_role("slider", name="training"))
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    solved(6)
    press("Next")
    to(page.locator("#shard-s3"))
    page.keyboard.press("ArrowRight")
    to(page.locator("#shard-s2"))
    page.keyboard.press("ArrowLeft")
    solved(7)
    press("Next")
    to(page.get_by_label("Sequence 0, position 6"))
    for _ in range(26):
        page.keyboard.press("ArrowUp")
        if "Solved" in page.get_by_label("Guided tour").inner_text():
            break
    solved(8)
    press("Next")
    to(page.get_by_role("slider"))
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    solved(9)
    link = page.evaluate("location.hash")
    expect(opened(link).get_by_label("Guided tour")).to_contain_text("Solved")
