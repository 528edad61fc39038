"""An example for `optim.name`: an optimizer of your own. docs/OWN_CODE.md explains it."""

import torch


class SignSGD(torch.optim.Optimizer):
    """SGD by the sign of a moving average of the gradient, with decoupled weight decay."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """Update all weights. Every operation is elementwise, as the flat shards of ZeRO 1 to 3 need it."""
        for group in self.param_groups:
            for weight in (each for each in group["params"] if each.grad is not None):
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(average.sign(), alpha=group["lr"])
