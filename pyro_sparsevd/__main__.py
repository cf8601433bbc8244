"""``python -m pyro_sparsevd`` prints what a report of a fault should say of the machine."""

import platform

import matplotlib
import numpy as np
import pyro
import torch

from . import __version__
from .ops import fused


def report() -> str:
    """Returns the versions, whether the loops in C are compiled, and the devices."""
    devices = [f"cuda:{number} {torch.cuda.get_device_name(number)}" for number in range(torch.cuda.device_count())]
    lines = {
        "pyro_sparsevd": __version__,
        "loops in C": "compiled" if fused.serve(torch.ones(1)) else "not compiled; torch computes the same, slower",
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "devices": ", ".join(["cpu", *devices]),
        "threads": torch.get_num_threads(),
    }
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items())


if __name__ == "__main__":
    print(report())
