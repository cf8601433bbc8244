"""Networks whose inputs are more than one tensor, or whose output is none, with inputs for them."""

from collections import UserDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Encoding(UserDict):
    """As Hugging Face's ``BatchEncoding``: a mapping that is no dict."""


@dataclass
class Output:
    """As Hugging Face's ``ModelOutput``, but no mapping."""

    logits: Tensor
    hidden: Tensor | None = None


class TextClassifier(nn.Module):
    """Has the arguments and the output of a Hugging Face model; the mask says which of the tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pooled: Any = None, use_cache: bool = True
    ) -> Output:
        if use_cache or pooled is not None:
            raise NotImplementedError("this network has no cache, and pools itself")
        hidden = self.body(self.embedding(input_ids)).relu()
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        return Output(logits=self.head(hidden.mean(1)))


class GraphNetwork(nn.Module):
    """Gives each node the sum over its neighbours of a layer, and one output, or the sums over several graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor | None = None, count: int = 0) -> Tensor:
        hidden = self.first(x).relu()
        sums = torch.zeros_like(hidden).index_add(0, edge_index[1], hidden[edge_index[0]])
        output = self.last(sums)
        return output if graph is None else output.new_zeros(count, 3).index_add(0, graph, output)


class TwoInputs(nn.Module):
    """Adds what two layers make of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(5, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.last((self.left(a) + self.right(b)).relu())


class OneDictionary(TwoInputs):
    """The same, of one argument."""

    def forward(self, inputs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(inputs["a"], inputs["b"])


class Kind(NamedTuple):
    """A network, inputs, how the network is called with them by hand, and how many targets they have."""

    network: Callable[[], nn.Module]
    make: Callable[[], Any]
    by_hand: Callable[[nn.Module, Any], Any]
    size: int
    logits: Callable[[Any], Tensor] = lambda output: output


def _tokens() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(7, (6, 5), generator=generator),
        "attention_mask": torch.arange(5).expand(6, 5) < torch.arange(1, 7)[:, None],
        "use_cache": False,
        "pooled": None,
    }


def _pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 5, generator=generator)


def _graph() -> tuple[Tensor, Tensor]:
    return _pair()[0], torch.tensor([[0, 1, 2, 3, 4, 5, 0, 3], [1, 2, 0, 4, 5, 3, 2, 5]])


def _of_text(net: nn.Module, x: Any) -> Any:
    return net(input_ids=x["input_ids"], attention_mask=x["attention_mask"], use_cache=False)


KINDS = {
    "tuple": Kind(TwoInputs, _pair, lambda net, x: net(x[0], x[1]), 6),
    "list": Kind(TwoInputs, lambda: list(_pair()), lambda net, x: net(x[0], x[1]), 6),
    "names": Kind(TwoInputs, lambda: dict(zip("ba", _pair()[::-1], strict=True)), lambda n, x: n(x["a"], x["b"]), 6),
    "one dictionary": Kind(
        OneDictionary, lambda: dict(zip("ab", _pair(), strict=True)), lambda net, x: net({"a": x["a"], "b": x["b"]}), 6
    ),
    "encoding": Kind(TextClassifier, lambda: Encoding(_tokens()), _of_text, 6, lambda output: output.logits),
    "nodes of a graph": Kind(GraphNetwork, _graph, lambda net, x: net(x[0], x[1]), 6),
    "graphs": Kind(
        GraphNetwork,
        lambda: (*_graph(), torch.tensor([0, 0, 0, 1, 1, 1]), 2),
        lambda net, x: net(x[0], x[1], x[2], 2),
        2,
    ),
}


def moved(x: Any, device: torch.device) -> Any:
    """Moves the tensors of inputs, in place where they are in a mapping."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple | list):
        return type(x)(moved(part, device) for part in x)
    if isinstance(x, MutableMapping):
        x.update({key: moved(part, device) for key, part in x.items()})
    return x
