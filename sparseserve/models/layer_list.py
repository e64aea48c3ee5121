"""Finding a model's decoder layers by watching it run."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.hooks import (
    TensorIdentity,
    hidden_argument,
    hidden_output,
    hooks,
    run_model,
)


def find_decoder_layers(model: nn.Module, tokens: Tensor) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of the decoder layers, in the order they run.

    They are the ``ModuleList`` with the most linear parameters among those whose elements are
    called once each, in order, each on the unchanged output of the one before. They may be of
    several classes, such as attention and state-space layers.

    Args:
        model: A causal language model in evaluation mode.
        tokens: Token ids ``[1, T]`` for one forward pass.

    Raises:
        UnsupportedModelError: No list behaves so, or a larger list than the one that does runs
            in another way, so that most of the model would be left out.
    """
    watches = [
        _ListWatch(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _linear_parameters(module)
    ]
    with hooks([handle for watch in watches for handle in watch.handles()]):
        run_model(model, tokens)
    reached = [watch for watch in watches if watch.calls]
    if not reached:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no decoder layers found: no ModuleList holds layers with "
            "linear operators that the forward pass calls; only models built as such a list of "
            "layers can be pruned"
        )
    return _largest_sound(reached, type(model).__name__).layers


def linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules of all linear operators below ``module``, itself excluded."""
    for name, child in module.named_modules():
        if child is not module and is_linear(child):
            yield name, child


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear operator: ``nn.Linear`` or GPT-2's transposed ``Conv1D``."""
    return isinstance(module, (nn.Linear, Conv1D))


class _ListWatch:
    """What one ModuleList did during a forward pass: how often it was called, its first fault."""

    def __init__(self, name: str, modules: nn.ModuleList) -> None:
        self.layers = [(f"{name}.{index}", module) for index, module in enumerate(modules)]
        self.parameters = _linear_parameters(modules)
        self.calls = 0
        self.fault: str | None = None
        self._hidden_place: int | str | None = None
        self._previous_output: TensorIdentity | None = None
        if len({id(module) for module in modules}) < len(self.layers):
            self.fault = f"{name} holds the same layer more than once"

    def handles(self) -> Iterator[RemovableHandle]:
        """Register the hooks on every element."""
        for index, (_, module) in enumerate(self.layers):
            yield module.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: self._enter(index, args, kwargs),
                with_kwargs=True,
            )
            yield module.register_forward_hook(lambda _, args, output: self._leave(output))

    def finish(self) -> None:
        """Note layers that were left out."""
        if self.fault is None and self.calls < len(self.layers):
            self.fault = f"{self.layers[self.calls][0]} was not called in the forward pass"

    def _enter(self, index: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.calls += 1
        if self.fault is None:
            self.fault = self._fault_on_entry(index, args, kwargs)

    def _fault_on_entry(
        self, index: int, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> str | None:
        name = self.layers[index][0]
        if self.calls != index + 1:
            return f"{name} was call {self.calls} of its list: layers must run once each, in order"
        place = hidden_argument(args, kwargs)
        if place is None:
            return f"{name} receives no hidden states"
        if index == 0:
            self._hidden_place = place
            return None
        hidden = args[0] if place == 0 else kwargs[str(place)]
        previous = self._previous_output
        assert isinstance(hidden, Tensor)
        if place != self._hidden_place or previous is None or not previous.is_same(hidden):
            before = self.layers[index - 1][0]
            return f"{name} does not receive the output of {before} unchanged"
        return None

    def _leave(self, output: object) -> None:
        hidden = hidden_output(output)
        self._previous_output = None if hidden is None else TensorIdentity(hidden)


def _largest_sound(watches: list[_ListWatch], model_name: str) -> _ListWatch:
    for watch in watches:
        watch.finish()
    most = max(watch.parameters for watch in watches)
    # A list that only wraps another has the same parameters; the longer one holds the layers.
    largest = sorted(
        (watch for watch in watches if watch.parameters == most),
        key=lambda watch: len(watch.layers),
        reverse=True,
    )
    for watch in largest:
        if watch.fault is None:
            return watch
    raise UnsupportedModelError(
        f"{model_name}: {largest[0].fault}; only layers chained one after the other can be pruned "
        "layer by layer"
    )


def _linear_parameters(module: nn.Module) -> int:
    return sum(
        parameter.numel()
        for _, linear in linear_modules(module)
        for parameter in linear.parameters(recurse=False)
    )
