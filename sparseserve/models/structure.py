"""What of a model can be pruned: its decoder layers and the linear operators that share inputs.

Nothing here knows an architecture by name. The model runs twice on one short window: the first
pass finds the list of decoder layers, the second sees which linear operators of a layer consume
the very same tensor and in what order the data reaches them. Whatever does not fit this picture
is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparseserve.huggingface.experts import ExpertLinears, experts_in, routers_in
from sparseserve.models.hooks import TensorIdentity, as_batch, hooks, run_model
from sparseserve.models.layer_list import find_decoder_layers, linear_modules
from sparseserve.models.refusals import (
    loose_matrices,
    refuse_mostly_dense,
    refuse_odd_weights,
    shared_weights,
)

# Gates and mixing coefficients are smaller: nothing is saved there, and all tokens depend on them.
_SMALLEST = 16


@dataclass(frozen=True, slots=True)
class Operator:
    """A linear operator of a layer.

    Attributes:
        name: Relative to its layer, such as ``self_attn.q_proj``.
        out_features: Rows of the weight as pruning sees it.
        in_features: Columns of the weight as pruning sees it.
        transposed: Whether the module stores the weight as ``[in, out]``, as GPT-2's Conv1D does.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class OperatorGroup:
    """Operators that consume the very same input tensor, in the order they run.

    Attributes:
        operators: At least one.
        experts: Name in the layer of the experts that one of them belongs to, which sees only the
            tokens that a router sends to it; None where all tokens are seen.
    """

    operators: tuple[Operator, ...]
    experts: str | None = None

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.operators[0].in_features


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix of a layer that cannot be pruned as an operator, and why; it stays dense.

    ``name`` is that of its module where it is the module's ``weight``.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class LayerStructure:
    """A decoder layer.

    Attributes:
        name: Its full name.
        groups: Its operators, in the order the data reaches them.
        dense: Its other linears and matrices; convolutions and embeddings are not counted.
    """

    name: str
    groups: tuple[OperatorGroup, ...]
    dense: tuple[DenseMatrix, ...] = ()

    @property
    def operators(self) -> tuple[Operator, ...]:
        """All operators of the layer, group by group."""
        return tuple(operator for group in self.groups for operator in group.operators)

    @property
    def common_groups(self) -> tuple[OperatorGroup, ...]:
        """The groups that see all tokens, as experts do not."""
        return tuple(group for group in self.groups if group.experts is None)

    def full_name(self, operator: Operator) -> str:
        """Return the name of ``operator`` in the model."""
        return f"{self.name}.{operator.name}"


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """The decoder layers of a model, in the order they run."""

    layers: tuple[LayerStructure, ...]


def trace_structure(model: nn.Module, input_ids: Tensor) -> ModelStructure:
    """Find the decoder layers and their operators by running ``model`` on ``input_ids``.

    A linear whose weight is shared with another module, or which is used more than once, not
    reached, or sees other rows than the tokens, stays dense.

    Args:
        model: A causal language model in evaluation mode.
        input_ids: Token ids ``[T]`` or ``[1, T]``; a dozen are enough.

    Raises:
        UnsupportedModelError: There is no list of decoder layers chained one after the other, a
            linear is quantised or computed, or most of the layers would stay dense.
    """
    tokens = as_batch(input_ids)
    layers = find_decoder_layers(model, tokens)
    refuse_odd_weights(layers)
    shared = shared_weights(model, layers)
    watches = [
        _LayerWatch(name, layer, tokens.shape[1], shared.get(name, {})) for name, layer in layers
    ]
    with hooks([handle for watch in watches for handle in watch.handles()]):
        run_model(model, tokens)
    structure = ModelStructure(tuple(watch.structure() for watch in watches))
    refuse_mostly_dense(
        layers,
        {
            layer.full_name(operator): operator.out_features * operator.in_features
            for layer in structure.layers
            for operator in layer.operators
        },
    )
    return structure


class _LayerWatch:
    """The calls of the linear operators of one layer during a forward pass."""

    def __init__(self, name: str, layer: nn.Module, tokens: int, dense: Mapping[str, str]) -> None:
        self._name = name
        self._layer = layer
        self._tokens = tokens
        self._dense = {**loose_matrices(layer), **dense}
        self._running = False
        self._called: set[str] = set()
        self._inputs: list[tuple[TensorIdentity, list[Operator]]] = []
        self._groups: list[tuple[list[Operator], str | None]] = []
        self._experts = experts_in(layer)
        # Routers are never pruned: their choices decide what everything after them sees.
        routers = routers_in(layer)
        self._dense |= dict.fromkeys(routers, "sends tokens to experts")
        of_experts = tuple(f"{experts}." for experts in self._experts)
        self._linears = {
            linear: module
            for linear, module in linear_modules(layer)
            if linear not in routers and not linear.startswith(of_experts)
        }

    def handles(self) -> Iterator[RemovableHandle]:
        """Register the hooks on the layer, its experts, and every other linear operator in it."""
        yield self._layer.register_forward_pre_hook(lambda _, args: self._enter())
        yield self._layer.register_forward_hook(lambda _, args, output: self._leave())
        for name, experts in self._experts.items():
            yield experts.register_forward_pre_hook(
                lambda module, args, name=name: self._call_experts(name, module)
            )
        for name, module in self._linears.items():
            yield module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: self._call(name, module, args, kwargs),
                with_kwargs=True,
            )

    def structure(self) -> LayerStructure:
        """Return the groups seen, and the matrices that are in none."""
        for name, _ in linear_modules(self._layer):
            if name not in self._called:
                self._dense.setdefault(name, "is not called as a linear when the layer runs")
        groups = []
        for operators, experts in self._groups:
            kept = tuple(operator for operator in operators if operator.name not in self._dense)
            groups += [OperatorGroup(kept, experts)] if kept else []
        dense = (DenseMatrix(name, self._dense[name]) for name in sorted(self._dense))
        return LayerStructure(self._name, tuple(groups), tuple(dense))

    def _enter(self) -> None:
        self._running = True

    def _leave(self) -> None:
        self._running = False
        self._inputs.clear()  # frees the activations of this layer

    def _call(
        self, name: str, module: nn.Module, args: Sequence[object], kwargs: dict[str, object]
    ) -> None:
        operator = operator_of(name, module)
        value = args[0] if args else next(iter(kwargs.values()), None)
        reason = self._reason_against(operator)
        if not isinstance(value, Tensor):
            reason = reason or "is called on something else than a tensor"
        elif (rows := value.numel() // operator.in_features) != self._tokens:
            reason = reason or f"sees {rows} rows for {self._tokens} tokens"
        elif reason is None:
            self._group_of(value).append(operator)
        if reason is not None:
            self._dense.setdefault(name, reason)
        self._called.add(name)

    def _call_experts(self, name: str, experts: ExpertLinears) -> None:
        """Add the groups of each expert: first all that read hidden states, then what follows."""
        for linears in experts.linears_by_input():
            operators = []
            for linear in linears:
                operator = operator_of(f"{name}.{linear}", experts.get_submodule(linear))
                if (reason := self._reason_against(operator)) is not None:
                    self._dense.setdefault(operator.name, reason)
                self._called.add(operator.name)
                operators.append(operator)
            self._groups.append((operators, name))

    def _reason_against(self, operator: Operator) -> str | None:
        """Say why a linear that is called now is no operator of this layer."""
        if not self._running:
            return "is called from outside its layer"
        if operator.name in self._called:
            return "is called more than once when the layer runs"
        if min(operator.in_features, operator.out_features) < _SMALLEST:
            shape = f"{operator.out_features} x {operator.in_features}"
            return f"is {shape}, too small to gain anything"
        return None

    def _group_of(self, value: Tensor) -> list[Operator]:
        for identity, operators in self._inputs:
            if identity.is_same(value):
                return operators
        operators = []
        self._inputs.append((TensorIdentity(value), operators))
        self._groups.append((operators, None))
        return operators


def operator_of(name: str, module: nn.Module) -> Operator:
    """Describe the linear ``module`` under ``name``."""
    weight = module.get_parameter("weight")
    transposed = not isinstance(module, nn.Linear)
    rows, columns = weight.shape
    if transposed:
        rows, columns = columns, rows
    return Operator(name, out_features=rows, in_features=columns, transposed=transposed)
