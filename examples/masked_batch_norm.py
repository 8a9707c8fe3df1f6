"""Padding changes Batch Norm for every sequence of the batch; a mask undoes it."""

import torch

import normwise as nw

LENGTHS = [12, 7, 5, 3]
CHANNELS = 4


def pad(sequences: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (C, l) in one zero-padded batch (N, C, length), with the mask of its valid positions (N, length)."""
    batch = torch.zeros(len(sequences), CHANNELS, length)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        batch[i, :, : sequence.shape[1]] = sequence
        mask[i, : sequence.shape[1]] = True
    return batch, mask


def valid(batch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The valid values, (positions, C)."""
    return batch.transpose(1, 2)[mask]


def main() -> None:
    torch.manual_seed(0)
    sequences = [3 + 2 * torch.randn(CHANNELS, length) for length in LENGTHS]

    packed = nw.nn.BatchNorm1d(CHANNELS)
    truth = packed(torch.cat(sequences, 1).T)  # all real positions and nothing else
    print("largest error of the valid outputs, and running mean (true mean 3, momentum 0.1: about 0.3)")
    for length in (12, 24, 96):
        batch, mask = pad(sequences, length)
        unmasked, masked = nw.nn.BatchNorm1d(CHANNELS), nw.nn.BatchNorm1d(CHANNELS)
        without = (valid(unmasked(batch), mask) - truth).abs().max().item()
        with_mask = (valid(masked(batch, mask), mask) - truth).abs().max().item()
        print(
            f"  padded to {length:2}: without mask {without:.2f}, {unmasked.running_mean.mean():.3f}; "
            f"with mask {with_mask:.0e}, {masked.running_mean.mean():.3f}"
        )
        assert without > 0.3
        assert with_mask < 1e-6
        assert torch.allclose(masked.running_mean, packed.running_mean, atol=1e-6)
        assert torch.allclose(masked.running_var, packed.running_var, atol=1e-6)
        assert masked(batch, mask).transpose(1, 2)[~mask].eq(0).all()

    batch, mask = pad(sequences, 12)
    garbage = batch.masked_fill(~mask.unsqueeze(1), float("nan"))
    layer = nw.nn.BatchNorm1d(CHANNELS)
    assert torch.equal(layer(garbage, mask), layer(batch, mask))
    print("what stands in the padding does not matter: NaN there gives the same output")


if __name__ == "__main__":
    main()
