"""One function, any norm: the pattern says which axes share one mean and variance."""

import torch
from torch.nn import functional as F

import normwise as nw
from normwise.definitions import Pattern, facts

PATTERNS = [
    ("n c h w -> c", "Batch Norm, training", {}),
    ("n c h w -> n", "Layer Norm of whole samples", {}),
    ("n c h w -> n h w", "Layer Norm of channels (ConvNeXt)", {}),
    ("n (g c) h w -> n g", "Group Norm, 4 groups", {"g": 4}),
    ("n c h w -> n c", "Instance Norm", {}),
    ("n c h w -> n c w", "each image column by itself", {}),
]


def main() -> None:
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(6, 8, 10, 12)
    torchs = {
        "n c h w -> c": F.batch_norm(x, None, None, training=True),
        "n c h w -> n": F.layer_norm(x, x.shape[1:]),
        "n c h w -> n h w": F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
        "n (g c) h w -> n g": F.group_norm(x, 4),
        "n c h w -> n c": F.instance_norm(x),
    }
    print("pattern              averaged   values   sample 0 moves with the others   from torch   norm")
    for text, name, sizes in PATTERNS:
        pattern = Pattern.parse(text)
        fact = facts(pattern, pattern.sizes(x.shape, sizes))
        y = nw.functional.normalize(x, text, **sizes)
        others = torch.cat([x[:1], x[1:] * 10])
        moves = not torch.allclose(nw.functional.normalize(others, text, **sizes)[0], y[0])
        assert moves == fact.depends_on_other_examples
        kept = [i for i, item in enumerate(pattern.left) if set(item) <= set(pattern.right)]
        axes = [i for i in range(4) if i not in kept]
        grouped = y.unflatten(1, (4, 2)).mean((2, 3, 4)) if sizes else y.mean(axes)
        assert grouped.abs().max() < 1e-5
        apart = "no such norm"
        if text in torchs:
            difference = (y - torchs[text]).abs().max().item()
            assert difference < 1e-5
            apart = f"{difference:.0e}"
        averaged = " ".join(fact.normalizes_across)
        print(
            f"{text:20} {averaged:10} {fact.values_per_statistic:6}   {'yes' if moves else 'no':31}  {apart:12} {name}"
        )


if __name__ == "__main__":
    main()
