"""python -m pyro_sparsevd."""

import runpy

import pyro
import torch

import pyro_sparsevd


def test_the_report_says_what_is_installed(capsys):
    runpy.run_module("pyro_sparsevd", run_name="__main__")
    printed = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.replace("loops in C", "loops").splitlines()
    )
    assert printed["pyro_sparsevd"] == pyro_sparsevd.__version__
    assert (printed["torch"], printed["pyro"]) == (torch.__version__, pyro.__version__)
    assert printed["loops"].startswith(("compiled", "not compiled"))
    assert printed["devices"].startswith("cpu")
