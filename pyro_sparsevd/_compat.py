"""Every private name of torch and Pyro that the package uses, and why; all were seen in torch 2.13.0 and Pyro 1.9.2."""

__all__ = ["in_backward_pass", "in_function_transform", "without_torch_function"]

import torch

# torch's notes on extending it use this name; there is no public one.
without_torch_function = torch._C.DisableTorchFunctionSubclass


def in_backward_pass() -> bool:
    """Tells whether autograd is computing gradients, and what runs is a checkpoint's forward pass once more.

    torch.utils.checkpoint asks in the same way; there is no public function.
    """
    return torch._C._current_graph_task_id() != -1


def in_function_transform() -> bool:
    """Tells whether a transform of torch.func, such as vmap, is at work.

    ``torch.autograd.Function.apply`` asks in the same way; there is no public function.
    """
    return torch._C._are_functorch_transforms_active()
