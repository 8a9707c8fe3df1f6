"""The kernels in forked children, workers and threads, and their outputs as tensors like any other."""

from __future__ import annotations

import copy
import io
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import normwise.functional as nf

LIMIT = 30.0
"""Seconds after which a child hangs: it needs less than one, and more where other processes want the same cores."""

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: nf.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: nf.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x: nf.group_norm(x, 4),
    "batch_norm": lambda x: nf.batch_norm(x, None, None, training=True),
    "batch_norm_eval": lambda x: nf.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])),
}


def forward_and_backward(name: str, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Nothing of torch's own that takes threads: after a bare fork it hangs."""
    leaf = x.detach().requires_grad_()
    y = CALLS[name](leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy)]


def images(seed: int = 0, examples: int = 24, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """x and dy with values enough for several threads."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn((examples, 16, 32, 32), generator=generator) + mean for mean in (3, 0.5))
    return (
        (x.to(memory_format=torch.channels_last), dy.to(memory_format=torch.channels_last))
        if channels_last
        else (x, dy)
    )


def digest(tensors: list[Tensor]) -> bytes:
    return b"".join(t.numpy().tobytes() for t in tensors)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_fork(work: Callable[[], bytes]) -> bytes:
    """What ``work`` returns in a child after a bare fork; a child that hangs is killed and fails the test."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(work())
        finally:
            os._exit(0)
    os.close(writer)
    received, end = b"", time.monotonic() + LIMIT
    try:
        while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(reader, 1 << 20)
            if not part:
                return received
            received += part
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child hangs")
    finally:
        os.close(reader)
        os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of a fork with threads
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_forked_child_computes_the_bits_of_its_parent(name: str, channels_last: bool):
    if channels_last and ("layer" in name or "rms" in name):
        return  # which would copy
    torch.set_num_threads(2)
    x, dy = images(channels_last=channels_last)
    expected = digest(forward_and_backward(name, x, dy))
    assert in_fork(lambda: digest(forward_and_backward(name, x, dy))) == expected
    assert digest(forward_and_backward(name, x, dy)) == expected


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_a_forked_child_computes_the_same():
    x, dy = images()
    expected = digest(forward_and_backward("layer_norm", x, dy))
    assert in_fork(lambda: in_fork(lambda: digest(forward_and_backward("layer_norm", x, dy)))) == expected


class Normalized(Dataset):
    """An output and its gradient for each index, computed where the index is asked for."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        return forward_and_backward(("layer_norm", "batch_norm")[index % 2], *images(index, 4))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_the_bits_of_the_parent(start: str):
    expected = [Normalized()[i] for i in range(4)]
    loader = DataLoader(Normalized(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=LIMIT)
    for got, want in zip(loader, expected, strict=True):
        assert digest(got) == digest(want)


@pytest.mark.parametrize("inner", [1, 2, 3])
def test_many_python_threads_compute_the_bits_of_one(inner: int):
    torch.set_num_threads(1)
    work = [(name, *images(seed, 4)) for seed in range(2) for name in list(CALLS)[:4]]
    expected = [digest(forward_and_backward(*item)) for item in work]
    found: list[bytes | None] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        torch.set_num_threads(inner)
        start.wait(LIMIT)
        for _ in range(3):
            found[i] = digest(forward_and_backward(*work[i]))

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert found == expected


def double(received: torch.multiprocessing.Queue, returned: torch.multiprocessing.Queue) -> None:
    """Change what arrives in place and send back a norm of it."""
    x = received.get(timeout=LIMIT)
    y = nf.layer_norm(x.mul_(2), x.shape[-1:])
    returned.put(y)
    received.get(timeout=LIMIT)  # until the parent has taken it: the memory is this process's


def test_outputs_pass_through_queues_of_processes():
    context = torch.multiprocessing.get_context("spawn")
    sent, returned = context.Queue(), context.Queue()
    child = context.Process(target=double, args=(sent, returned), daemon=True)
    child.start()
    try:
        y = output()
        expected = nf.layer_norm(y * 2, y.shape[-1:])
        before = y.clone()
        sent.put(y)
        assert torch.equal(returned.get(timeout=LIMIT), expected)
        assert torch.equal(y, before * 2)  # sending moved it to shared memory, where the child doubled it
        sent.put(None)
        child.join(LIMIT)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.kill()


# An output is a tensor like any other, wherever its memory comes from: that of a large one is used again.


def output(seed: int = 0, shape: tuple[int, ...] = (64, 32, 160)) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return nf.layer_norm(x, shape[-1:])


def saved_and_loaded(t: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file)


def set_to(t: Tensor) -> Tensor:
    return torch.empty(0).set_(t.untyped_storage(), 0, t.shape, t.stride()) if t.dtype == torch.float32 else t.clone()


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": Tensor.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "save": saved_and_loaded,
    "numpy": lambda t: torch.from_numpy(t.numpy().copy()),
    "dlpack": lambda t: torch.from_dlpack(t).clone(),
    "view": lambda t: t.view(-1).view(t.shape),
    "storage": set_to,
    "shared": lambda t: t.clone().share_memory_(),
}


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (300, 1000)], ids=str)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_an_output_has_its_values_and_outlives_it(way: str, shape: tuple[int, ...]):
    y = output(0, shape)
    expected = y.tolist()
    other = COPIES[way](y)
    del y
    others = [output(seed, shape) for seed in range(1, 4)]  # which may take over its memory
    assert other.tolist() == expected
    assert all(o.tolist() == output(seed, shape).tolist() for seed, o in enumerate(others, 1))


def test_outputs_that_live_do_not_share_memory():
    outputs = [output(seed) for seed in range(8)]
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 8
    expected = [y.clone() for y in outputs]
    for y in outputs[::2]:
        y.fill_(7)
    assert all(torch.equal(y, e) for y, e in zip(outputs[1::2], expected[1::2], strict=True))


def test_an_output_owns_memory_of_its_own_size():
    y = output()
    assert y.is_contiguous()
    assert y.storage_offset() == 0
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
    assert y.untyped_storage().device == torch.device("cpu")
    assert y.data_ptr() % 16 == 0


def test_an_output_can_be_changed_in_place():
    y, z = output(), output()
    z += 1
    assert torch.equal(z, y + 1)
    z[:, 0].zero_()
    assert not z[:, 0].any()
    array = y.numpy()
    array[0, 0, 0] = 5
    assert y[0, 0, 0] == 5


@pytest.mark.parametrize("shape", [(1, 2), (0,), (64, 16, 320)], ids=str)
def test_an_output_can_be_resized_within_its_memory(shape: tuple[int, ...]):
    y = output()
    before = y.flatten().clone()
    y.resize_(shape)
    assert torch.equal(y.flatten(), before[: y.numel()])
    y.fill_(1)
    assert y.sum() == y.numel()


def test_a_small_output_can_grow():
    y = output(0, (4, 8))
    before = y.flatten().clone()
    y.resize_(8, 8)
    assert torch.equal(y.flatten()[:32], before)
    storage = y.untyped_storage()
    storage.resize_(0)
    assert storage.nbytes() == 0


def test_a_large_output_cannot_grow_and_says_so():
    """Memory that is used again has no allocator to ask for more."""
    y = output()
    view = y.view(y.shape)
    before = y.clone()
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(128, 32, 160)
    with pytest.raises(RuntimeError, match="not resizable"):
        view.untyped_storage().resize_(0)
    assert torch.equal(view, before)


def test_an_output_can_be_moved_to_shared_memory():
    y = output()
    before = y.clone()
    assert y.share_memory_() is y
    assert y.is_shared()
    assert torch.equal(y, before)
    y += 1
    assert torch.equal(y, before + 1)


def test_an_output_can_take_over_other_memory():
    y, other = output(), torch.ones(3)
    y.set_(other)
    assert torch.equal(y, other)
    z = output()
    z.data = other
    assert z.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("free_in_thread", [False, True])
def test_memory_freed_by_another_thread_is_used_again_safely(free_in_thread: bool):
    """Outputs are made in one thread and dropped in another, as those of a data loader with a pinning thread are."""
    expected = [output(seed).clone() for seed in range(4)]
    for _ in range(20):
        outputs = [output(seed) for seed in range(4)]
        assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
        if free_in_thread:
            thread = threading.Thread(target=outputs.clear)
            thread.start()
            thread.join(LIMIT)


def test_a_thread_may_end_before_its_outputs():
    outputs: list[Tensor] = []
    threads = [threading.Thread(target=lambda s=seed: outputs.append(output(s))) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    sums = sorted(y.double().abs().sum().item() for y in outputs)
    assert sums == sorted(output(seed).double().abs().sum().item() for seed in range(4))
