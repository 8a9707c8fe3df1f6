"""Put normwise's norms into a model, check that it still computes the same, and take them out again."""

import torch
from torch import nn

import normwise as nw


class SmallModel(nn.Module):
    """Three convolutional blocks with three kinds of norm, then a transformer layer over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, 32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.InstanceNorm2d(32, affine=True),
        )
        self.encoder = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``images`` (N, 3, H, W) -> logits (N, 10)."""
        tokens = self.features(images).flatten(2).transpose(1, 2)
        return self.head(self.encoder(tokens).mean(1))


def train_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """One forward and backward in training mode: the loss and the gradients."""
    model.train().zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def norms(model: nn.Module) -> dict[str, str]:
    return {
        name: f"{type(module).__module__.partition('.')[0]} {module}"
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
    }


def main() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    model = SmallModel()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    original = norms(model)

    loss, grads = train_step(model, images, labels)
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    eval_output = model.eval()(images)

    model.load_state_dict(start)
    nw.nn.replace(model)
    print("replaced:")
    for name, module in norms(model).items():
        print(f"  {name:16} {original[name].split('(')[0]:22} -> {module}")
    assert all(module.startswith("normwise") for module in norms(model).values())

    our_loss, our_grads = train_step(model, images, labels)
    gradient = max((our_grads[name] - grad).abs().max().item() for name, grad in grads.items())
    buffers = max(
        (value.double() - trained[key].double()).abs().max().item() for key, value in model.state_dict().items()
    )
    output = (model.eval()(images) - eval_output).abs().max().item()
    print(f"largest difference from torch: loss {abs(our_loss - loss):.1e}, gradients {gradient:.1e}, ", end="")
    print(f"state after the step {buffers:.1e}, eval output {output:.1e}")
    assert max(abs(our_loss - loss), gradient, buffers, output) < 1e-5

    nw.nn.restore(model)
    assert norms(model) == original
    model.load_state_dict(trained)
    assert torch.equal(model(images), eval_output)
    print("restored:", ", ".join(norms(model)))


if __name__ == "__main__":
    main()
