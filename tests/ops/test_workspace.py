"""Memory is handed out again, and never while somebody holds it."""

import gc
import threading

import numpy as np
import pytest
import torch

from pyro_sparsevd.ops.memory import Workspace

LARGE = (128, 128)
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def like(device):
    return torch.ones(1, dtype=torch.float64, device=device)


class TestTensors:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16, torch.int64], ids=str)
    @pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 128, 128), (2, 3, 4), LARGE, (8, 32, 64)], ids=str)
    def test_tensor_is_contiguous_and_of_the_shape_dtype_and_device_asked_for(self, shape, dtype, device):
        other = torch.zeros(2, dtype=dtype, device=device)
        tensor = Workspace().empty(shape, other)
        assert tensor.shape == torch.Size(shape)
        assert tensor.is_contiguous()
        assert (tensor.dtype, tensor.device) == (other.dtype, other.device)
        assert not tensor.requires_grad

    def test_empty_like_takes_all_from_the_other_tensor_and_is_contiguous(self, device):
        other = torch.zeros(LARGE, dtype=torch.float32, device=device).t()
        tensor = Workspace().empty_like(other)
        assert (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
        assert tensor.is_contiguous()

    def test_tensor_can_be_written_and_read(self, like):
        tensor = Workspace().empty(LARGE, like)
        tensor.copy_(torch.arange(128 * 128, dtype=torch.float64, device=like.device).view(LARGE))
        assert tensor.sum().item() == 128 * 128 * (128 * 128 - 1) / 2


HOLDERS = {
    "itself": lambda t: t,
    "view": lambda t: t.view(-1)[5:7],
    "transpose": lambda t: t.t(),
    "detached": lambda t: t.detach(),
    "numpy": lambda t: t.numpy(),
    "storage": lambda t: t.untyped_storage(),
    "gradient": lambda t: _with_gradient(t),
    "graph": lambda t: (torch.ones(LARGE, dtype=t.dtype, requires_grad=True) * t).sum(),
    "list": lambda t: [[t]],
    "parameter": lambda t: torch.nn.Parameter(t),
}


def _with_gradient(tensor):
    parameter = torch.zeros(LARGE, dtype=tensor.dtype, requires_grad=True)
    parameter.grad = tensor
    return parameter


class TestReuse:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_memory_is_used_again_once_released(self, dtype):
        workspace, other = Workspace(), torch.ones(1, dtype=dtype)
        first = workspace.empty(LARGE, other)
        address = first.data_ptr()
        second = workspace.empty(LARGE, other)
        assert second.data_ptr() != address
        del first
        third = workspace.empty((64, 256), other)  # another shape of the same size
        assert third.data_ptr() == address

    def test_memory_of_another_size_or_dtype_is_not_used(self):
        workspace = Workspace()
        first = workspace.empty(LARGE, torch.ones(1))
        address = first.data_ptr()
        del first
        assert workspace.empty((128, 129), torch.ones(1)).data_ptr() != address
        assert workspace.empty(LARGE, torch.ones(1, dtype=torch.float64)).data_ptr() != address
        assert workspace.empty(LARGE, torch.ones(1)).data_ptr() == address

    @pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
    def test_memory_is_not_handed_out_twice_while_something_refers_to_it(self, holder):
        workspace, like = Workspace(), torch.ones(1)
        tensor = workspace.empty(LARGE, like).fill_(3.0)
        address = tensor.data_ptr()
        held = holder(tensor)
        del tensor
        others = [workspace.empty(LARGE, like).fill_(7.0) for _ in range(3)]
        assert address not in {t.data_ptr() for t in others}
        del held
        gc.collect()
        assert workspace.empty(LARGE, like).data_ptr() == address

    def test_gradient_that_autograd_accumulates_is_kept(self):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return (x * x).sum()

            @staticmethod
            def backward(ctx, grad):
                (x,) = ctx.saved_tensors
                return torch.mul(x, 2 * grad, out=workspace.empty_like(x))

        workspace = Workspace()
        x = torch.randn(LARGE, dtype=torch.float64, requires_grad=True)
        for number in (1, 2, 3):
            Square.apply(x).backward()
            torch.testing.assert_close(x.grad, 2 * number * x.detach())

    def test_threads_never_get_the_same_memory_at_once(self):
        workspace, like = Workspace(), torch.ones(1)
        barrier, mistakes = threading.Barrier(2), []

        def work(mark):
            barrier.wait()
            for _ in range(500):
                tensors = [workspace.empty(LARGE, like).fill_(mark) for _ in range(2)]
                if any(bool((t != mark).any()) for t in tensors):
                    mistakes.append(mark)

        threads = [threading.Thread(target=work, args=(mark,)) for mark in (1.0, 2.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not mistakes

    def test_memory_taken_in_inference_mode_can_be_used_for_training(self):
        workspace, like = Workspace(), torch.ones(1)
        with torch.inference_mode():
            address = workspace.empty(LARGE, like).data_ptr()
        tensor = workspace.empty(LARGE, like)
        assert tensor.data_ptr() == address
        assert not tensor.is_inference()
        tensor.add_(1)


class TestWhatIsHeld:
    def test_steps_that_release_their_memory_take_no_more(self):
        workspace, like = Workspace(), torch.ones(1)
        addresses = set()
        for _ in range(20):
            step = [workspace.empty(LARGE, like) for _ in range(3)]
            addresses |= {t.data_ptr() for t in step}
            del step
        assert len(addresses) == 3

    def test_small_tensors_hold_no_memory_of_the_workspace(self):
        workspace = Workspace()
        tensors = [workspace.empty((n,), torch.ones(1)) for n in (0, 1, 100, 2**13 - 1)]
        assert len({t.data_ptr() for t in tensors[1:]}) == 3
        assert not workspace._arrays

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64], ids=str)
    def test_other_dtypes_hold_no_memory_of_the_workspace(self, dtype):
        workspace = Workspace()
        workspace.empty(LARGE, torch.ones(1, dtype=dtype))
        assert not workspace._arrays

    def test_other_devices_have_their_own_allocator(self):
        workspace = Workspace()
        tensor = workspace.empty(LARGE, torch.ones(1, device="meta"))
        assert tensor.device.type == "meta"
        assert not workspace._arrays

    def test_memory_of_sizes_that_the_last_steps_did_not_need_is_given_back(self):
        workspace, like = Workspace(), torch.ones(1)
        for step in range(20):
            workspace.start_step()
            workspace.empty((2**13 + step,), like)
            workspace.empty(LARGE, like)
        sizes = {size for size, _ in workspace._arrays}
        assert sizes == {2**14, *(2**13 + step for step in range(16, 20))}

    def test_memory_in_use_survives_the_loss_of_its_size(self):
        workspace, like = Workspace(), torch.ones(1)
        tensor = workspace.empty((2**13,), like).fill_(3.0)
        for _ in range(5):
            workspace.start_step()
        assert not workspace._arrays
        others = [workspace.empty((2**13 + n,), like).fill_(7.0) for n in (1, 2, 0)]
        assert tensor.data_ptr() not in {t.data_ptr() for t in others}
        assert (tensor == 3).all()

    def test_tensor_outlives_its_workspace(self):
        workspace = Workspace()
        tensor = workspace.empty(LARGE, torch.ones(1)).fill_(3.0)
        del workspace
        gc.collect()
        np.full(LARGE, 7.0, dtype=np.float32)
        assert (tensor == 3).all()
