"""The loss: logging, memory, global state and devices."""

import gc
import logging
import math
import random
import warnings
import weakref
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from checks import seeded
from problems import (
    NUM_DATA,
    bounded_twin,
    function_twin,
    model_and_guide,
    network_twin,
    normal_likelihood,
    regression_data,
    student_twin,
    trained_once,
)
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseNormal, SparseVD_ELBO, Supervised, bayesianize


class TestLogging:
    def test_a_sampled_divergence_is_logged_with_its_site_at_debug_level(self, device, caplog):
        twin = student_twin(device)
        with caplog.at_level(logging.DEBUG, logger="pyro_sparsevd"):
            SparseVD_ELBO().loss(twin.model, twin.guide)
        records = [r for r in caplog.records if r.name == "pyro_sparsevd.infer.kl"]
        assert [r.levelno for r in records] == [logging.DEBUG]
        assert records[0].getMessage().startswith("w: no closed form of KL(")
        assert "StudentT" in records[0].getMessage()

    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    @pytest.mark.parametrize("make", [network_twin, bounded_twin, function_twin])
    def test_closed_forms_are_not_logged(self, make, kl, device, caplog):
        twin = make(device)
        with caplog.at_level(logging.DEBUG, logger="pyro_sparsevd"):
            SparseVD_ELBO(kl).loss(twin.model, twin.guide, *twin.args)
        assert caplog.records == []

    @pytest.mark.parametrize("prior", [LogUniform(), dist.Normal(0.0, 1.0)], ids=repr)
    @pytest.mark.parametrize("local_reparam", [True, False])
    def test_latents_with_a_closed_form_have_no_density_computed(self, local_reparam, prior, device, monkeypatch):
        model, guide = model_and_guide(device, prior=prior)
        guide(*regression_data(device))

        def forbidden(self, value):
            raise AssertionError("a density that nobody reads")

        monkeypatch.setattr(SparseNormal, "log_prob", forbidden)
        monkeypatch.setattr(LogUniform, "log_prob", forbidden)
        assert math.isfinite(SparseVD_ELBO(local_reparam=local_reparam).loss(model, guide, *regression_data(device)))


class TestMemory:
    def _pair(self, device: torch.device, spy: list) -> tuple[Supervised, AutoSparseNormal, tuple]:
        # All tensors are large enough for the workspace.
        class Spy(nn.Linear):
            def forward(self, x):
                spy.append(weakref.ref(self.weight))
                return super().forward(x)

        torch.manual_seed(1)
        net = nn.Sequential(Spy(96, 96), nn.ReLU(), Spy(96, 96)).to(device)
        model = Supervised(bayesianize(net), lambda output: dist.Normal(output, 1.0).to_event(1), 128)
        data = torch.randn(128, 96, device=device), torch.randn(128, 96, device=device)
        guide = AutoSparseNormal(model)
        guide(*data)
        return model, guide, data

    @pytest.mark.parametrize("way", ["svi", "loss"])
    def test_no_more_is_held_after_twenty_steps_than_after_two(self, way, device):
        spy: list = []
        model, guide, data = self._pair(device, spy)
        elbo = SparseVD_ELBO()
        svi, loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo), elbo(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
        lengths = []
        gc.collect()
        gc.disable()  # so that no cycle is swept under the carpet
        try:
            spy.clear()
            for _ in range(20):
                if way == "svi":
                    svi.step(*data)
                else:
                    optimizer.zero_grad()
                    loss(*data).backward()
                    optimizer.step()
                lengths.append({key: len(arrays) for key, arrays in elbo._workspace._arrays.items()})
            assert len(spy) == 40
            assert [reference() for reference in spy] == [None] * 40
        finally:
            gc.enable()
        assert lengths[1] or device.type != "cpu"
        assert lengths[-1] == lengths[1]

    def test_the_graph_of_a_loss_is_freed_with_it(self, device):
        spy: list = []
        model, guide, data = self._pair(device, spy)
        elbo = SparseVD_ELBO()
        gc.collect()
        gc.disable()
        try:
            spy.clear()
            loss = elbo(model, guide)(*data)
            reference = weakref.ref(loss)
            assert len(spy) == 2
            del loss
            assert reference() is None
            assert [reference() for reference in spy] == [None, None]
        finally:
            gc.enable()


def _global_state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "validation": torch.distributions.Distribution._Distribution__validate_args
        if hasattr(torch.distributions.Distribution, "_Distribution__validate_args")
        else torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.infer.util.is_validation_enabled(),
        "pyro settings": pyro.settings.get(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": torch.initial_seed(),
        "filters": list(warnings.filters),
        "log level": logging.getLogger().level,
        "own log level": logging.getLogger("pyro_sparsevd").level,
        "handlers": (list(logging.getLogger().handlers), list(logging.getLogger("pyro_sparsevd").handlers)),
        "linear": F.linear,
        "python rng": random.getstate(),
        "numpy rng": np.random.get_state()[1].tolist(),  # noqa: NPY002 # the global one is meant
        "stack": list(poutine.runtime._PYRO_STACK),
    }


class TestGlobalState:
    @pytest.mark.parametrize("local_reparam", [True, False])
    def test_training_changes_nothing_global_but_the_state_of_the_generator(self, local_reparam, device):
        state = _global_state()
        generator = torch.get_rng_state()
        model, guide = model_and_guide(device)
        elbo = SparseVD_ELBO(local_reparam=local_reparam)
        torch.set_rng_state(generator)
        elbo.loss_and_grads(model, guide, *regression_data(device))
        after = _global_state()
        state["seed"] = after["seed"]  # the helpers of this test set it
        assert after == state
        assert not torch.equal(torch.get_rng_state(), generator) or device.type != "cpu"

    def test_an_error_leaves_nothing_global_behind(self, device):
        p = trained_once(device, "regression")
        state = _global_state()
        p.data[0][0] = math.nan
        with pytest.raises(ValueError, match=r"^x: expected finite"):
            p.svi.step(*p.data)
        assert _global_state() == state

    def test_two_evaluations_draw_different_noise_and_one_seed_the_same(self, device):
        model, guide = model_and_guide(device)
        guide(*regression_data(device))
        loss = SparseVD_ELBO()(model, guide)
        assert loss(*regression_data(device)) != loss(*regression_data(device))
        assert seeded(loss, *regression_data(device)) == seeded(loss, *regression_data(device))

    def test_memory_does_not_grow_with_the_number_of_batch_sizes(self, device):
        model = Supervised(
            bayesianize(nn.Linear(64, 256).to(device)), lambda x: dist.Normal(x, 1.0).to_event(1), 10_000
        )
        guide, elbo = AutoSparseNormal(model), SparseVD_ELBO()
        kept = []
        for size in range(200, 230):
            elbo(model, guide)(torch.ones(size, 64, device=device), torch.ones(size, 256, device=device)).backward()
            kept.append(sum(a.nbytes for arrays in elbo._workspace._arrays.values() for a in arrays))
        assert kept[-1] <= kept[5] * 1.2


class _Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in ("aten._local_scalar_dense.default", "aten.equal.default", "aten.is_nonzero.default")
        return func(*args, **(kwargs or {}))


class TestDevices:
    @pytest.mark.parametrize("check_finite", [True, False])
    @pytest.mark.parametrize("used_before", [True, False])
    @pytest.mark.parametrize("position", [0, 1])
    def test_an_argument_on_another_device_is_named(self, position, used_before, check_finite, device):
        model, guide = model_and_guide(device)
        loss = SparseVD_ELBO(check_finite=check_finite)(model, guide)
        data = list(regression_data(device))
        if used_before:
            loss(*data)
        data[position] = data[position].to("meta")
        with pytest.raises(ValueError, match=rf"^{'xy'[position]}: expected a tensor on {device}.*, but it is on meta"):
            loss(*data)

    def test_an_error_of_another_kind_does_not_blame_the_device(self, device):
        class Moving(nn.Linear):
            def forward(self, x):
                raise RuntimeError("mine")

        model = Supervised(bayesianize(Moving(4, 1)), normal_likelihood, NUM_DATA)
        with pytest.raises(RuntimeError, match=r"^mine"):
            SparseVD_ELBO(check_finite=False).loss(
                model, AutoSparseNormal(model), *(t.to("meta") for t in regression_data(device))
            )

    @pytest.mark.parametrize("check_finite", [True, False])
    @pytest.mark.parametrize("svi", [True, False])
    def test_a_step_waits_for_the_device_once_at_most(self, svi, check_finite, device):
        with pyro.validation_enabled(False):
            model, guide = model_and_guide(device)
            elbo = SparseVD_ELBO(check_finite=check_finite)
            step = partial(elbo.loss_and_grads, model, guide) if svi else elbo(model, guide)
            step(*regression_data(device))
            with _Waits() as waits:
                step(*regression_data(device))
        assert waits.count == (1 if svi or check_finite else 0)

    @pytest.mark.parametrize(
        "nest", [lambda x: {"x": x}, lambda x: [x], lambda x: ({"a": [x]},)], ids=["dict", "list", "deep"]
    )
    def test_values_that_are_not_finite_are_found_in_containers_of_data(self, nest, device):
        calls = []

        def model(batch):
            calls.append(batch)
            pyro.sample("w", LogUniform().expand([3]).to_event(1))

        guide = AutoSparseNormal(model)
        guide(nest(torch.ones(2, device=device)))
        calls.clear()
        with pytest.raises(ValueError, match=r"batch.*: expected finite numbers, but it holds NaN or infinities"):
            SparseVD_ELBO().loss(model, guide, nest(torch.tensor([1.0, math.nan], device=device)))
        assert not calls
