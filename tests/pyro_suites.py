"""Runs test files of a checkout of Pyro on this package: ``python tests/pyro_suites.py guide|bound CHECKOUT``.

The guide stands in for ``AutoNormal``, the bound for ``TraceMeanField_ELBO``. Further arguments are pytest's.
"""

import math
import re
import sys
from typing import NamedTuple

import pyro.infer.autoguide
import pytest

import pyro_sparsevd as svd


class SparseVD_ELBO(svd.SparseVD_ELBO):  # noqa: N801 # Pyro's naming
    """Takes the options of Pyro's bounds that say how, not what, is computed."""

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
    ) -> None:
        super().__init__(num_particles=num_particles)


class Suite(NamedTuple):
    """Files of Pyro's, which of their tests concern this package, and those that fail by design, with the reason."""

    files: tuple[str, ...]
    selected: str
    by_design: dict[str, str]


SUITES = {
    "guide": Suite(
        ("test_autoguide.py",),
        "AutoSparseNormal or AutoGuideList or auto_guide or auto_class or nested or dynamic",
        {
            r"test_scores\[": "the density of a latent is at its own site, where AutoNormal has a Delta",
            r"test_autonormal_dynamic_model": "a second guide has parameters of its own, not those of the first",
        },
    ),
    "bound": Suite(
        ("test_valid_models.py", "test_gradient.py", "test_inference.py"),
        "SparseVD_ELBO or mean_field or analytic_kl",
        {
            r"test_subsample_gradient.*(nonreparam|reparam-False)": "a guide without rsample is refused by name",
            "test_mean_field_warn": "a guide against the model's order gets its right bound, so there is no warning",
        },
    ),
}


class ByDesign:
    """A plugin of pytest's that expects the failures by design."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marks them."""
        for item in items:
            for pattern, reason in self.reasons.items():
                if re.match(pattern, item.name):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def main(name: str, checkout: str, *options: str) -> int:
    """Runs a suite and returns the exit status."""
    suite = SUITES[name]
    pyro.infer.autoguide.AutoNormal = svd.AutoSparseNormal
    pyro.infer.TraceMeanField_ELBO = SparseVD_ELBO
    sys.path.insert(0, checkout)  # for what the tests import of each other; Pyro itself is the one installed
    files = [f"{checkout}/tests/infer/{file}" for file in suite.files]
    settings = [
        "--rootdir",
        checkout,
        "-c",
        f"{checkout}/setup.cfg",
        "-p",
        "no:cacheprovider",
        "-q",
        "-rfxX",
        "--tb=line",
    ]
    return pytest.main([*settings, "-k", suite.selected, *files, *options], plugins=[ByDesign(suite.by_design)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
