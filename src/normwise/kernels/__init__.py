"""Which implementation of the operators runs on which device here, and why not a faster one."""

from __future__ import annotations

import torch


def backends() -> dict[str, str]:
    """What runs the norms on each kind of device.

    Returns:
        For ``"cpu"`` and ``"cuda"`` a short text; one that starts with ``unavailable`` gives the reason.

    Example:
        >>> sorted(backends())
        ['cpu', 'cuda']
    """
    threads = torch.get_num_threads()
    cuda = "reference" if torch.cuda.is_available() else "unavailable: no CUDA device"
    return {"cpu": f"reference, {threads} thread{'s' if threads > 1 else ''}", "cuda": cuda}
