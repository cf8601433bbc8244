"""The weights of a network, by the types of its layers."""

__all__ = ["is_reparametrised", "padding_rows", "weights_of"]

from torch import Tensor, nn


def weights_of(net: nn.Module) -> set[str]:
    """Returns the names of the weights: what layers multiply with their inputs; of a tied weight the first name.

    Layers of torch, and those derived from them, are known by their types. What another module holds is a weight unless
    it has three or more dimensions and is broadcast: along the data, with a first size of 1, as class tokens and
    position embeddings are, or along all dimensions but one, as layer scales are.
    """
    first = {id(p): name for name, p in net.named_parameters()}
    return {
        first[id(p)]
        for module in net.modules()
        for attribute, p in module._parameters.items()
        if p is not None and _is_weight(module, attribute, p)
    }


def _is_weight(module: nn.Module, attribute: str, parameter: Tensor) -> bool:
    if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() < 2 or isinstance(module, _NORMALISATIONS):
        return False
    if isinstance(module, _LAYERS) and "weight" in attribute:
        return True
    return parameter.dim() == 2 or (parameter.shape[0] != 1 and sum(size != 1 for size in parameter.shape) > 1)


def padding_rows(net: nn.Module) -> dict[str, int]:
    """Returns the rows of embeddings' weights that stay zero, those of padding tokens, by the names of the weights.

    A row that was given other numbers is a row like any other, and so is one whose weight another layer shares, which
    trains it.
    """
    rows: dict[int, set[int | None]] = {}
    for module in net.modules():
        row = module.padding_idx if isinstance(module, _EMBEDDINGS) else None
        for parameter in module._parameters.values():
            rows.setdefault(id(parameter), set()).add(row)
    sole = {name: next(iter(found)) for name, p in net.named_parameters() if len(found := rows[id(p)]) == 1}
    return {name: row for name, row in sole.items() if row is not None and not net.get_parameter(name)[row].any()}


def is_reparametrised(net: nn.Module, name: str) -> bool:
    """Tells whether a layer computes its weight from a parameter, as ``weight_norm`` has it."""
    path, _, attribute = name.rpartition(".")
    target, _, end = attribute.rpartition("_")
    computed = vars(net.get_submodule(path)).get(target)  # "weight" beside weight_g, weight_v or weight_orig
    return "parametrizations" in path.split(".") or (end in ("g", "v", "orig") and isinstance(computed, Tensor))


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, *_CONVOLUTIONS, *_RECURRENT, *_EMBEDDINGS)
_NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm)
