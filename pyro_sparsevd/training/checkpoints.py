"""Files from which an interrupted training resumes."""

__all__ = ["Checkpoint", "CheckpointError", "load", "save"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import replacing


@dataclass(frozen=True)
class Checkpoint:
    """The file from which a training resumes, and what it must share with the training that wrote it.

    Args:
        path: The file.
        settings: What determines the training, such as its seed, by the name that an error should give it. Not the
            number of epochs, which may grow.

    Example:
        >>> Checkpoint("run.pt", {"seed": 0}).settings["seed"]
        0
    """

    path: str | Path
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


class CheckpointError(ValueError):
    """A checkpoint from which a training cannot resume."""


def save(checkpoint: Checkpoint, parts: dict[str, Any], history: list[dict[str, float]], device: torch.device) -> None:
    """Writes atomically the states of ``parts`` and random number generators, and the numbers of each epoch."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "settings": dict(checkpoint.settings), **_random_states(device)}
    with replacing(checkpoint.path) as new:
        torch.save(state, new)


def load(checkpoint: Checkpoint, parts: dict[str, Any], device: torch.device, epochs: int) -> list[dict[str, float]]:
    """Restores what :func:`save` wrote, and returns the numbers of each epoch so far.

    Raises ``CheckpointError``, before anything is changed, if the file cannot be read, or is of more than ``epochs``
    epochs, of other settings or of a loss with other parameters.
    """
    state = _read(checkpoint.path, device, {*parts, "history", "generator"})
    history: list[dict[str, float]] = state["history"]
    _check_settings(checkpoint, state.get("settings", {}))  # those of earlier versions have none
    if len(history) > epochs:
        raise CheckpointError(
            f"{checkpoint.path}: expected at most {epochs} epochs, but it has {len(history)}; remove it to "
            "start again, or ask for as many"
        )
    _check_shapes(checkpoint.path, _shapes(parts["loss"].state_dict()), _shapes(state["loss"]))
    for name, part in parts.items():
        part.load_state_dict(state[name])
    _set_random_states(state, device)
    return history


def _read(path: str | Path, device: torch.device, parts: set[str]) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # which one depends on where the file is damaged
        raise CheckpointError(
            f"{path}: expected a checkpoint, but it cannot be read ({type(error).__name__}); remove it to start again"
        ) from error
    if not (isinstance(state, dict) and parts <= state.keys()):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: expected a checkpoint of {', '.join(sorted(parts))}, but got {found}; choose another file"
        )
    return state


def _check_settings(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> None:
    for name, value in checkpoint.settings.items():
        if name in stored and stored[name] != value:
            raise CheckpointError(
                f"{checkpoint.path}: expected a training with {name} {value}, but it is of one with {name} "
                f"{stored[name]}; go on with {name} {stored[name]}, or remove the file to start again"
            )


def _check_shapes(path: str | Path, expected: dict[str, Any], stored: dict[str, Any]) -> None:
    for name in [*expected, *stored]:
        if expected.get(name) != stored.get(name):
            raise CheckpointError(
                f"{path}: expected parameters of this loss, {name} of shape {expected.get(name)}, but it has "
                f"{stored.get(name)}; go on with the network that it is of, or remove the file to start again"
            )


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"generator": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_generator"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["generator"].cpu())
    if device.type == "cuda" and "cuda_generator" in states:  # a checkpoint from a CPU has none
        torch.cuda.set_rng_state(states["cuda_generator"].cpu(), device)
