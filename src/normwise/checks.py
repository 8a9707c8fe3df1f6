"""What the arguments of a norm must satisfy, checked before anything is allocated or changed.

Every error is one sentence: what must hold; what came; what to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .definitions import parse_axes
from .reference import Rows


def check_last_axes(
    name: str,
    x: object,
    normalized_shape: Sequence[int],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> None:
    """All that layer_norm and its kin ask of their arguments; what is plainly right passes in one glance.

    Raises:
        TypeError: See the checks below.
        ValueError: Likewise.
    """
    if (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and isinstance(normalized_shape, tuple)
        and normalized_shape
        and x.shape[-len(normalized_shape) :] == normalized_shape
        and 0 <= eps < math.inf
        and _fits(x, normalized_shape, weight)
        and _fits(x, normalized_shape, bias)
    ):
        return
    x = check_input(name, x)
    check_eps(name, eps)
    check_normalized_shape(name, x, normalized_shape)
    check_parameters(name, x, tuple(normalized_shape), weight=weight, bias=bias)


def check_group_norm(
    name: str,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
) -> None:
    """All that group_norm asks of its arguments.

    Raises:
        TypeError: See the checks below.
        ValueError: Likewise.
    """
    check_input(name, x, 2)
    check_eps(name, eps)
    check_channels(name, x, num_groups)
    check_parameters(name, x, x.shape[1:2], weight=weight, bias=bias)
    check_mask(name, x, mask)
    check_values_per_group(name, x, num_groups)


def check_batch_norm(
    name: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None = None,
) -> None:
    """All that batch_norm and its kin ask of their arguments.

    Raises:
        TypeError: See the checks below; or if the residual has not the type of ``x``.
        ValueError: Likewise.
    """
    check_input(name, x, 2)
    check_eps(name, eps)
    check_parameters(
        name, x, x.shape[1:2], weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    check_running_pair(name, running_mean, running_var)
    check_mask(name, x, mask)
    if residual is not None:
        check_residual(name, x, residual)
        if residual.dtype != x.dtype:
            raise TypeError(
                f"{name}: residual must have the type of x, {_type(x)}; got {_type(residual)}; convert one with .to()."
            )
    if training:
        check_values_per_channel(name, x, mask)


def check_input(name: str, x: object, min_dim: int = 1) -> Tensor:
    """The input is a floating-point tensor of at least ``min_dim`` dimensions.

    Returns:
        The input.

    Raises:
        TypeError: If ``x`` is no tensor, or not of a real floating-point type.
        ValueError: If it has too few dimensions.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a torch.Tensor; got {type(x).__name__}; convert it with torch.as_tensor.")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be floating point; got {_type(x)}; convert it with x.float().")
    if x.dim() < min_dim:
        shape = "(N, C, ...)" if min_dim == 2 else f"{min_dim} dimensions or more"
        raise ValueError(f"{name}: x must have {shape}; got shape {_shape(x)}; add the missing axes with unsqueeze.")
    return x


def check_module(name: str, model: object) -> nn.Module:
    """The model is a module.

    Returns:
        The model.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module; got {type(model).__name__}; pass the model itself.")
    return model


def check_residual(name: str, x: Tensor, residual: object) -> None:
    """The residual is a floating-point tensor shaped like ``x``, where ``x`` is.

    Raises:
        TypeError: If it is no tensor, or not of a real floating-point type.
        ValueError: If it has another shape or device.
    """
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"{name}: residual must be a torch.Tensor; got {type(residual).__name__}; convert it with torch.as_tensor."
        )
    if residual.shape != x.shape:
        raise ValueError(
            f"{name}: residual must have the shape of x, {_shape(x)}; got {_shape(residual)}; "
            "expand it with residual.expand_as(x)."
        )
    check_parameters(name, x, x.shape, residual=residual)


def check_eps(name: str, eps: float) -> None:
    """The number eps is 0 or more.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name}: eps must be 0 or more and finite; got {eps}; use for example 1e-5.")


def check_normalized_shape(name: str, x: Tensor, normalized_shape: Sequence[int]) -> None:
    """The last axes of ``x`` are ``normalized_shape``.

    Raises:
        TypeError: If ``normalized_shape`` is a number.
        ValueError: If they are not, or ``normalized_shape`` is empty.
    """
    if isinstance(normalized_shape, int):
        raise TypeError(
            f"{name}: normalized_shape must be a sequence of sizes; got {normalized_shape}; "
            f"write ({normalized_shape},)."
        )
    k = len(normalized_shape)
    if k == 0:
        raise ValueError(f"{name}: normalized_shape must name at least one axis; got (); use for example x.shape[-1:].")
    if x.dim() < k or tuple(x.shape[-k:]) != tuple(normalized_shape):
        raise ValueError(
            f"{name}: the last {k} axes of x must be normalized_shape {tuple(normalized_shape)}; x is {_shape(x)}; "
            "change normalized_shape or move the axes to the end."
        )


def check_channels(name: str, x: Tensor, num_groups: int) -> None:
    """The channels of ``x`` split evenly into groups.

    Raises:
        ValueError: If they do not.
    """
    if num_groups <= 0 or x.shape[1] % num_groups:
        raise ValueError(
            f"{name}: num_groups must divide the {x.shape[1]} channels; got {num_groups} for x {_shape(x)}; "
            "choose a divisor."
        )


def check_parameters(name: str, x: Tensor, shape: tuple[int, ...], **parameters: Tensor | None) -> None:
    """Weight, bias and running statistics have the given shape, a floating-point type, and live where ``x`` does.

    Raises:
        TypeError: If one is not floating point.
        ValueError: If one has another shape or device.
    """
    for key, parameter in parameters.items():
        if parameter is None or _fits(x, shape, parameter):
            continue
        if parameter.shape != shape:
            raise ValueError(
                f"{name}: {key} must have shape {tuple(shape)} to fit x {_shape(x)}; got {_shape(parameter)}; "
                "build the layer for this input."
            )
        if not parameter.dtype.is_floating_point:
            raise TypeError(f"{name}: {key} must be floating point; got {_type(parameter)}; convert it with .float().")
        raise ValueError(
            f"{name}: {key} must be on x's device {x.device}; it is on {parameter.device}; move one with .to()."
        )


def check_mask(name: str, x: Tensor, mask: Tensor | None) -> None:
    """The mask marks valid examples (N) or positions (N, *x.shape[2:]) of ``x``.

    Raises:
        TypeError: If it is not boolean.
        ValueError: If it has another shape or device.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be boolean, True where valid; got {_type(mask)}; convert it with .bool().")
    allowed = ((x.shape[0],), (x.shape[0], *x.shape[2:]))
    if tuple(mask.shape) not in allowed:
        shapes = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(allowed))
        raise ValueError(
            f"{name}: mask must have shape {shapes} for x {_shape(x)}; "
            f"got {_shape(mask)}; mark examples or positions, not channels."
        )
    if mask.device != x.device:
        raise ValueError(f"{name}: mask must be on x's device {x.device}; it is on {mask.device}; move it with .to().")


def check_values_per_channel(name: str, x: Tensor, mask: Tensor | None) -> None:
    """There is more than one value for each channel, so that it has a variance.

    Raises:
        ValueError: If there is one. An empty batch passes, as in PyTorch.
    """
    values = x.shape[0] * math.prod(x.shape[2:])
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if type(mask) is Tensor and not mask.is_meta and not traced:  # the count of valid positions is data
        values = values // max(mask.numel(), 1) * int(mask.sum())
    if values == 1:
        valid = "" if mask is None else "valid "
        raise ValueError(
            f"{name}: 1 {valid}value per channel in training has no variance (x is {_shape(x)}); "
            "use a larger batch, eval() or layer_norm."
        )


def check_values_of_all(name: str, x: Tensor, count: Tensor) -> None:
    """All processes together have more than one value for each channel.

    Raises:
        ValueError: If they have one. An empty batch passes, as in PyTorch.
    """
    if count.numel() and count[0].item() == 1:
        raise ValueError(
            f"{name}: 1 value per channel over all processes in training has no variance (x here is {_shape(x)}); "
            "use a larger batch, eval() or layer_norm."
        )


def check_values_per_group(name: str, x: Tensor, num_groups: int) -> None:
    """A batch of one has more than one value a group (PyTorch's rule: with more examples, one value a group gives 0).

    Raises:
        ValueError: If it has one.
    """
    if x.shape[0] * (x.shape[1] // num_groups) * math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"{name}: 1 value per group has no variance (x is {_shape(x)}, num_groups {num_groups}); "
            "use fewer groups or layer_norm."
        )


def check_values_per_instance(name: str, x: Tensor) -> None:
    """There is more than one position for each channel of each example.

    Raises:
        ValueError: If there is one.
    """
    if x.dim() < 3 or math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"{name}: 1 value per channel of an example has no variance (x is {_shape(x)}); "
            "use an input with positions (N, C, L), eval() with running statistics, or layer_norm."
        )


def check_running_pair(name: str, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Running statistics are given both or not at all.

    Raises:
        ValueError: If one is missing.
    """
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{name}: running_mean and running_var must come together; {missing} is None; pass both or neither."
        )


def check_running(name: str, running_mean: Tensor | None, running_var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Running statistics are there to normalize with.

    Returns:
        Both.

    Raises:
        ValueError: If one is missing.
    """
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{name}: eval needs running statistics; {missing} is None; pass it or use training=True.")
    return running_mean, running_var


def check_affine(name: str, rows: Rows, weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    """The affine axes are axes of the input, given when there is a weight or bias.

    Returns:
        The shape of weight and bias.

    Raises:
        ValueError: If they are not, or the batch is averaged away and leaves one value for a statistic.
    """
    if rows.pattern.averages_batch and rows.pattern.values_per_statistic(rows.sizes) == 1:
        raise ValueError(
            f"{name}: 1 value per statistic in training has no variance (pattern {rows.pattern}, sizes {rows.sizes}); "
            "use a larger batch or keep the batch axis on the right."
        )
    if not rows.affine and (weight is not None or bias is not None):
        raise ValueError(
            f"{name}: affine must name the axes of weight and bias; got none; write for example affine='c'."
        )
    items = parse_axes(rows.affine, f"{name}: affine")
    for axis in (axis for item in items for axis in item):
        if axis not in rows.sizes:
            raise ValueError(
                f"{name}: affine axes must stand in the pattern; {axis!r} does not in {str(rows.pattern)!r}; "
                f"choose from {' '.join(rows.sizes)}."
            )
    return tuple(math.prod([rows.sizes[axis] for axis in item]) for item in items)


def _fits(x: Tensor, shape: tuple[int, ...], parameter: Tensor | None) -> bool:
    """True if the parameter is None, or of this shape, floating point, and where ``x`` is."""
    return parameter is None or (
        parameter.shape == shape and parameter.is_floating_point() and parameter.device == x.device
    )


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
