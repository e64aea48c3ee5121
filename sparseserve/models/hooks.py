"""Watching a module tree run: the few hook mechanics that tracing and layer running share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class ForwardStopped(Exception):
    """Raised by a hook to end a forward pass whose remainder is not needed."""


@contextmanager
def hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Keep ``handles`` for the block and remove them however it ends.

    A :class:`ForwardStopped` raised by one of the hooks ends the block quietly.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        with suppress(ForwardStopped):
            yield


def run_model(model: nn.Module, tokens: Tensor) -> None:
    """Run ``model`` on the token ids ``[1, T]``, without gradients and without a cache.

    On a CPU, products of 16-bit tensors with more than a few tokens are computed in float32, as
    layers are pruned (``devices.pruning_dtype``): emulated 16-bit arithmetic is about
    three times slower (docs/log.md). For a few tokens it costs more to widen the weights.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    parameter = next(model.parameters(), None)
    device = tokens.device if parameter is None else parameter.device
    wide = device.type == "cpu" and tokens.numel() > _FEW_TOKENS
    with torch.no_grad(), _WideProducts() if wide else nullcontext():
        if isinstance(model, PreTrainedModel):
            model(tokens.to(device), use_cache=False)
        else:
            model(tokens.to(device))


class _WideProducts(TorchFunctionMode):
    """Computes products of 16-bit tensors in float32, one at a time, and rounds what comes out."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if function not in _PRODUCTS:
            return function(*args, **kwargs)
        halves = [value for value in (*args, *kwargs.values()) if _is_half(value)]
        if not halves:
            return function(*args, **kwargs)
        found = function(*map(_wide, args), **{name: _wide(kwargs[name]) for name in kwargs})
        assert isinstance(found, Tensor)
        assert isinstance(halves[0], Tensor)
        return found.to(halves[0].dtype)


_FEW_TOKENS = 32
_PRODUCTS = frozenset(
    {nn.functional.linear, torch.addmm, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__}
)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _wide(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and _is_half(value) else value


def as_batch(tokens: Tensor) -> Tensor:
    """Return the token ids ``[T]`` or ``[1, T]`` as ``[1, T]``."""
    batch = tokens if tokens.ndim == 2 else tokens.unsqueeze(0)
    if batch.ndim != 2 or len(batch) != 1 or batch.shape[1] == 0 or batch.is_floating_point():
        raise ValueError(f"one window of token ids [T] is needed, got {tuple(tokens.shape)}")
    return batch


def hidden_argument(args: Sequence[object], kwargs: Mapping[str, object]) -> int | str | None:
    """Return where a layer receives its hidden states: position 0, a keyword, or nowhere.

    They are the first positional argument, or else the first keyword, that holds a floating tensor.
    """
    if args:
        return 0 if _is_floating_tensor(args[0]) else None
    return next((name for name, value in kwargs.items() if _is_floating_tensor(value)), None)


def hidden_output(output: object) -> Tensor | None:
    """Return the hidden states in what a layer returned: the tensor itself or the first of many."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


class TensorIdentity:
    """A tensor as it was at one moment, to tell whether another is the very same data.

    Two tensors are the same when they start at one place in memory, hold as many rows of as many
    features at the same strides, and nothing was written into that memory in between. So ``.view``
    with other leading dimensions is the same tensor, and one changed in place is another.
    Holding the tensor keeps its memory from being given to a later one.
    """

    __slots__ = ("_key", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._key = _memory_key(tensor)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether ``tensor``, as it is now, is the remembered data."""
        return _memory_key(tensor) == self._key


def _memory_key(tensor: Tensor) -> tuple[object, ...]:
    # Leading dimensions that lie evenly in memory fold into one "rows" dimension without a copy.
    folded = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor
    if folded.data_ptr() != tensor.data_ptr():
        folded = tensor
    version = 0 if tensor.is_inference() else tensor._version
    place = (tensor.device, tensor.dtype, tensor.data_ptr(), version)
    return (*place, tuple(folded.shape), folded.stride())


def _is_floating_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
