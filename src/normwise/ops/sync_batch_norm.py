"""Batch Norm with the statistics of all processes of a group: the operators of a batch in parts, joined."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .common import OPS, Function, select
from .exchange import Place, refuse_second_derivative

collected: dict[str, list[list[Tensor]]] | None = None
"""While someone collects them: dweight and dbias summed over all processes, of each backward of each layer."""


def normalize_over_processes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    reproducible: bool,
    place: Place,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y of this process's examples; mean, biased variance and count of all processes'."""
    sums = OPS.batch_norm_sums.default(x, eps, mask, reproducible)
    mean, var, count = OPS.batch_norm_moments.default(OPS.sum_over_processes.default(sums, *place, "forward"))
    return OPS.batch_norm.default(x, mean, var, weight, bias, eps, mask), mean, var, count


class SyncBatchNorm(Function):
    """The same with a gradient: ``apply(x, weight, bias, eps, mask, reproducible, place) -> (y, mean, var, count)``.

    dweight and dbias are those of this process's examples, as every other parameter's gradient is in data-parallel
    training, where the processes' gradients are averaged afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mask: Tensor | None,
        reproducible: bool,
        place: Place,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, mean, var, count = normalize_over_processes(x, weight, bias, eps, mask, reproducible, place)
        ctx.save_for_backward(x, weight, mean, var, count, mask)
        ctx.mark_non_differentiable(mean, var, count)
        ctx.arguments = None if bias is None else bias.dtype, eps, reproducible, place
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_statistics: Any) -> Any:
        x, weight, mean, var, count, mask = ctx.saved_tensors
        bias_dtype, eps, reproducible, place = ctx.arguments
        refuse_second_derivative(place[1], "use batch_norm")
        wants_dx, *wanted = ctx.needs_input_grad[:3]
        sums = OPS.batch_norm_gradient_sums.default(dy, x, mean, var, eps, mask, reproducible)
        common = dy, x, mean, var, eps, mask

        def gradients(of: Tensor, dx: bool, dweight: bool, dbias: bool) -> list[Tensor]:
            return list(
                OPS.batch_norm_backward_of_sums.default(*common, of, count, weight, bias_dtype, [dx, dweight, dbias])
            )

        dx = None
        if wants_dx or collected is not None:
            total = OPS.sum_over_processes.default(sums, *place, "backward")
            dx, *of_all = gradients(total, wants_dx, collected is not None, collected is not None)
            if collected is not None:
                collected.setdefault(place[1], []).append(of_all)
        return *select((wants_dx, *wanted), [dx, *gradients(sums, False, *wanted)[1:]]), None, None, None, None
