"""The candidates of one case: a call to be timed, and what it gives, for each library that can run it."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Problem
from .op import Node, Tensors, Unavailable

OPSET, IR_VERSION = 23, 11


@dataclass(frozen=True)
class Candidate:
    """One library on one case."""

    call: Callable[[], Any]
    results: Callable[[], Tensors]


def normwise(case: Case, problem: Problem, threads: int) -> Candidate:
    """Ours."""
    return eager(case.op.normwise, case, problem)


def torch_eager(case: Case, problem: Problem, threads: int) -> Candidate:
    """PyTorch, as its users write it."""
    return eager(case.op.torch, case, problem)


def torch_compile(case: Case, problem: Problem, threads: int) -> Candidate:
    """The same compiled, for these sizes alone."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.cpp.threads = threads  # part of the key of the compiler's cache, unlike torch.get_num_threads
    return eager(case.op.torch, case, problem, lambda function: torch.compile(function, dynamic=False))


def eager(
    function: Callable[..., Any],
    case: Case,
    problem: Problem,
    change: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Candidate:
    """A function of tensors, or a layer, which takes its parameters when it is made."""
    leaves = set(case.op.leaves) if case.backward else set()
    tensors = {name: tensor.detach().requires_grad_(name in leaves) for name, tensor in problem.tensors.items()}
    tensors |= {name: tensors[name].clone() for name in tensors if name.startswith("running")}  # changed in place
    if isinstance(function, type):
        layer = function(case.shape[case.op.channels])
        for name in ("weight", "bias"):
            tensors[name] = torch.nn.Parameter(tensors[name].detach(), requires_grad=name in leaves)
            setattr(layer, name, tensors[name])
        run, args = change(layer), [tensors["x"]]
    else:
        run, args = change(function), list(tensors.values())
    wanted, dys = [tensors[name] for name in case.op.leaves], list(problem.cotangents.values())

    def forward() -> Any:
        return run(*args)

    def forward_backward() -> Any:
        y = run(*args)
        return y, torch.autograd.grad(y, wanted, dys)

    def results() -> Tensors:
        y, grads = forward_backward() if case.backward else (forward(), ())
        return named(case, [y] if isinstance(y, Tensor) else y, grads)

    return Candidate(forward_backward if case.backward else forward, results)


def named(case: Case, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensors:
    """Outputs and gradients by name."""
    names = [*case.op.gives, *(f"d{leaf}" for leaf in case.op.leaves)]
    return {name: value.detach() for name, value in zip(names, [*outputs, *grads], strict=False)}


def jax(case: Case, problem: Problem, threads: int) -> Candidate:
    """JAX, compiled; channels that come last in memory are its last axis."""
    import jax

    last = case.channels_last

    def array(tensor: Tensor) -> Any:
        return jax.numpy.from_dlpack(tensor.movedim(1, -1) if last and tensor.dim() > 1 else tensor)

    def tensor(array: Any) -> Tensor:
        found = torch.from_dlpack(array)
        return found.movedim(-1, 1) if last and found.dim() > 1 else found

    function = case.op.jax(-1 if last else case.op.channels)
    arrays = {name: array(tensor) for name, tensor in problem.tensors.items()}
    leaves = tuple(arrays[name] for name in case.op.leaves)
    fixed = tuple(value for name, value in arrays.items() if name not in case.op.leaves)
    cotangents = tuple(map(array, problem.cotangents.values()))

    def forward(leaves: Any, fixed: Any, cotangents: Any) -> Any:
        outputs, state = function(*leaves, *fixed)
        return outputs, (), state

    def forward_backward(leaves: Any, fixed: Any, cotangents: Any) -> Any:
        outputs, backward, state = jax.vjp(lambda *leaves: function(*leaves, *fixed), *leaves, has_aux=True)
        return outputs, backward(cotangents), state

    compiled = jax.jit(forward_backward if case.backward else forward)

    def call() -> Any:
        return jax.block_until_ready(compiled(leaves, fixed, cotangents))

    def results() -> Tensors:
        outputs, grads, _ = call()
        return named(case, [tensor(t) for t in outputs], [tensor(t) for t in grads])

    return Candidate(call, results)


def onnxruntime(case: Case, problem: Problem, threads: int) -> Candidate:
    """ONNX Runtime, forward; the parameters are part of the model, the output is the runtime's own memory."""
    if case.backward:
        raise Unavailable("ONNX Runtime has no backward")
    import onnx
    import onnxruntime as ort

    kind = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}[case.dtype]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # not while the others are timed
    options.log_severity_level = 4
    tensors = {name: in_memory_order(case, tensor) for name, tensor in problem.tensors.items()}
    model = onnx_model(onnx, case, tensors, kind)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for node in session.get_inputs():
        value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(as_numpy(tensors[node.name]), kind)
        binding.bind_ortvalue_input(node.name, value)

    def call() -> Any:
        binding.clear_binding_outputs()  # else the output of the call before is written to again
        for name in case.op.gives:
            binding.bind_output(name)
        session.run_with_iobinding(binding)

    def results() -> Tensors:
        call()
        found = [from_pointer(value, tensors["x"]) for value in binding.get_outputs()]
        return named(case, [y.movedim(-1, 1) if case.channels_last else y for y in found], ())

    return Candidate(call, results)


def onnx_model(onnx: Any, case: Case, tensors: Tensors, kind: int) -> Any:
    """The operation as a model, with all but x and residual in it."""
    nodes = case.op.onnx(case.channels_last, case.dtype)
    given = [name for name in tensors if name in ("x", "residual")]
    held = [name for name in tensors if name not in given]
    graph = onnx.helper.make_graph(
        [as_onnx_node(onnx, node) for node in nodes],
        case.op.name,
        [onnx.helper.make_tensor_value_info(name, kind, tensors["x"].shape) for name in given],
        [onnx.helper.make_tensor_value_info(name, kind, tensors["x"].shape) for name in case.op.gives],
        [
            onnx.helper.make_tensor(name, kind, tensors[name].shape, as_numpy(tensors[name]).tobytes(), raw=True)
            for name in held
        ],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def as_onnx_node(onnx: Any, node: Node) -> Any:
    """A dash stands for an output that is not wanted."""
    inputs, outputs = ([name.strip("-") for name in names.split()] for names in (node.inputs, node.outputs))
    return onnx.helper.make_node(node.kind, inputs, outputs, domain=node.domain, **node.attributes)


def in_memory_order(case: Case, tensor: Tensor) -> Tensor:
    """With the axes as they lie in memory."""
    return tensor.movedim(1, -1) if case.channels_last and tensor.dim() > 1 else tensor


def as_numpy(tensor: Tensor) -> Any:
    """The values, or for bfloat16, which numpy lacks, their bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_pointer(value: Any, like: Tensor) -> Tensor:
    """A copy of an output of ONNX Runtime, of a type that numpy may lack."""
    memory = (ctypes.c_char * like.nbytes).from_address(value.data_ptr())
    return torch.frombuffer(memory, dtype=like.dtype).reshape(like.shape).clone()


def copy(case: Case, problem: Problem, threads: int) -> Candidate:
    """As many bytes as the operation must move, copied into memory that is there already."""
    source = torch.ones(case.moved // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    return Candidate(lambda: target.copy_(source), dict)


CANDIDATES: dict[str, Callable[[Case, Problem, int], Candidate]] = {
    "normwise": normwise,
    "torch": torch_eager,
    "compile": torch_compile,
    "onnxruntime": onnxruntime,
    "jax": jax,
    "copy": copy,
}
"""In the order in which they take turns."""


def candidate(name: str, case: Case, problem: Problem, threads: int) -> Candidate:
    """One library on one case.

    Raises:
        Unavailable: If it is not installed or cannot run the case; the message gives its reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CANDIDATES[name](case, problem, threads)
    except Unavailable:
        raise
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    except Exception as error:  # whatever a library throws is why it cannot
        raise Unavailable(reason(error)) from error


def reason(error: Exception) -> str:
    """The first line of an error, not too long."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
