"""What was done and measured, as values: pruning, operator by operator, and perplexity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparseserve.errors import NumericalError
from sparseserve.machine import installed_versions, processor_name


@dataclass(frozen=True, slots=True)
class OperatorReport:
    """One pruned operator.

    Attributes:
        name: Full module name.
        shape: ``[out_features, in_features]``.
        sparsity: Share of exact zeros in the stored weight.
        relative_error: ``||W X* - W0 X||_F / ||W0 X||_F`` of the pruned weight on the calibration
            tokens, before reconstruction and retraining; ``X`` as the error correction sees it.
        gram_products: Products with the Gram matrix that the pruner spent.
        seconds: Wall time of the pruner, without the statistics.
        transposed: Whether the model stores the dense weight ``[in, out]``.
        converged: Whether the pruner's iteration met its own tolerance; None if it has none.
        residual: What was left of it, relative; None likewise.
        tokens: How many calibration tokens an expert saw. Where they are fewer than
            ``in_features``, others were mixed in (docs/method.md). None for what sees all tokens.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    relative_error: float
    gram_products: int
    seconds: float
    transposed: bool
    converged: bool | None = None
    residual: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ReconstructionReport:
    """What reconstruction did to a decoder layer, on windows held out from it.

    Attributes:
        epochs: Passes over the training windows that are kept; 0 if none made it better.
        learning_rate: Of Adam, as the last epochs were trained, at its highest and relative to the
            root mean square of each tensor.
        error_before: Root mean square over tokens of ``||s (f(h*) - f0(h))|| / ||f0(h)||``, the
            error of what leaves the layer as it was pruned; ``s`` are the gains it is read with. Of
            the last layer, if predictions follow from its output alone, root of their mean
            divergence in nats.
        error_after: The same of the layer that is kept.
    """

    epochs: int
    learning_rate: float
    error_before: float
    error_after: float


@dataclass(frozen=True, slots=True)
class RotationReport:
    """What the rotation of a layer's attention values did, on the dense weights.

    Attributes:
        values: Full name of the operator that makes the values.
        outputs: That of the operator that reads them.
        width: Values of a head; each head has a rotation of its own.
        loss_before: What the pattern removes of the two operators, a share of their energy, summed
            by the scores of the optimal brain surgeon.
        loss_after: The same after the rotation.
    """

    values: str
    outputs: str
    width: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One decoder layer.

    Attributes:
        name: Full module name.
        operators: Those that were pruned.
        seconds: Wall time, statistics included.
        reconstruction: What training it did, if there was any.
        unseen: Full names of the operators of experts that no calibration token reached. They stay
            dense.
        rotations: Where attention values were rotated before pruning.
        scaled: Full names of the modules whose channels were scaled before rounding.
    """

    name: str
    operators: tuple[OperatorReport, ...]
    seconds: float
    reconstruction: ReconstructionReport | None = None
    unseen: tuple[str, ...] = ()
    rotations: tuple[RotationReport, ...] = ()
    scaled: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerReport:
        """Read back what ``dataclasses.asdict`` wrote."""
        operators = tuple(
            OperatorReport(**{**item, "shape": tuple(item["shape"])}) for item in data["operators"]
        )
        reconstruction = data.get("reconstruction")
        return cls(
            data["name"],
            operators,
            data["seconds"],
            ReconstructionReport(**reconstruction) if reconstruction else None,
            tuple(data.get("unseen", ())),
            tuple(RotationReport(**item) for item in data.get("rotations", ())),
            tuple(data.get("scaled", ())),
        )


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Means over the held-out windows, in nats a token: the loss, and its cross-entropy alone."""

    loss: float
    cross_entropy: float


@dataclass(frozen=True, slots=True)
class RetrainReport:
    """What retraining did.

    Attributes:
        before: The loss of the pruned model.
        after: That of the model as it was left, in its stored dtype.
        epochs: That after each epoch, before rounding to the stored dtype.
        kept_epoch: The epoch that was kept, from 1; 0 if the model was left as it was.
        trained_parameters: Number of trained values.
        steps: Steps of the optimiser.
        seconds: Wall time.
    """

    before: HeldOutLoss
    after: HeldOutLoss
    epochs: tuple[HeldOutLoss, ...]
    kept_epoch: int
    trained_parameters: int
    steps: int
    seconds: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RetrainReport:
        """Read back what ``dataclasses.asdict`` wrote."""
        losses = {
            "before": HeldOutLoss(**data["before"]),
            "after": HeldOutLoss(**data["after"]),
            "epochs": tuple(HeldOutLoss(**epoch) for epoch in data["epochs"]),
        }
        return cls(**{**data, **losses})


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What rounding the kept weights to codes did.

    Attributes:
        to: ``int8``, ``fp8`` or ``int4``.
        group_size: Inputs that share a scale; None for all of a row.
        mean_relative_error: Of the outputs of the operators against those of the pruned weights,
            unweighted mean; None where each weight was rounded to the nearest, without any text.
        seconds: Wall time.
        scaled: Inputs of operators whose channels were scaled first, so that rounding what enters
            them loses less.
    """

    to: str
    group_size: int | None
    mean_relative_error: float | None = None
    seconds: float = 0.0
    scaled: int = 0


@dataclass(frozen=True, slots=True)
class Environment:
    """The software and machine a result came from."""

    python: str
    torch: str
    transformers: str
    sparseserve: str
    machine: str

    @classmethod
    def here(cls) -> Environment:
        """Describe this process."""
        versions = installed_versions()
        return cls(
            python=versions["python"],
            torch=versions["torch"],
            transformers=versions["transformers"],
            sparseserve=versions["sparseserve"],
            machine=processor_name(),
        )


@dataclass(frozen=True, slots=True)
class PruneReport:
    """A whole run.

    Attributes:
        layers: The decoder layers, first to last.
        dense_modules: Linears and other matrices inside decoder layers that were left dense.
        seconds: Wall time of all layers, with that of the layers an interrupted run had finished.
        peak_memory_bytes: Largest resident size of the process, or of the CUDA allocator.
        environment: Where it ran.
        compute_dtype: What products inside layers were computed in while text ran through them and
            while they were trained; None where it was not recorded.
        retraining: What training of the whole model did at the end, if there was any.
        dense_reasons: Why, by name, of those of ``dense_modules`` that the recipe did not exclude.
        quantization: What rounding did at the very end, if there was any.
    """

    layers: tuple[LayerReport, ...]
    dense_modules: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    environment: Environment
    compute_dtype: str | None = None
    retraining: RetrainReport | None = None
    dense_reasons: Mapping[str, str] = field(default_factory=dict)
    quantization: QuantizationReport | None = None

    @property
    def operators(self) -> tuple[OperatorReport, ...]:
        """All pruned operators in the order in which they were pruned."""
        return tuple(operator for layer in self.layers for operator in layer.operators)

    @property
    def mean_relative_error(self) -> float:
        """Unweighted mean over operators; 0 if none was pruned."""
        errors = [operator.relative_error for operator in self.operators]
        return statistics.fmean(errors) if errors else 0.0

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON data."""
        return {**asdict(self), "mean_relative_error": self.mean_relative_error}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruneReport:
        """Read back what ``to_json`` wrote."""
        retraining, quantization = data.get("retraining"), data.get("quantization")
        return cls(
            layers=tuple(LayerReport.from_json(layer) for layer in data["layers"]),
            dense_modules=tuple(data["dense_modules"]),
            seconds=data["seconds"],
            peak_memory_bytes=data["peak_memory_bytes"],
            environment=Environment(**data["environment"]),
            compute_dtype=data.get("compute_dtype"),
            retraining=RetrainReport.from_json(retraining) if retraining else None,
            dense_reasons=data.get("dense_reasons", {}),
            quantization=QuantizationReport(**quantization) if quantization else None,
        )


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Perplexity over ``tokens`` predicted tokens."""

    perplexity: float
    tokens: int

    @classmethod
    def from_negative_log_likelihood(cls, total: float, tokens: int) -> PerplexityResult:
        """Return exp(``total`` / ``tokens``), ``total`` being in nats.

        Raises:
            NumericalError: ``total`` is not finite, or the perplexity is too large for a float.
        """
        if tokens < 1:
            raise ValueError("perplexity of no tokens")
        mean = total / tokens
        if not math.isfinite(mean) or mean > math.log(1e300):
            raise NumericalError(
                f"mean negative log-likelihood is {mean}, so there is no perplexity: "
                "the model's weights or activations are not finite or overflow"
            )
        return cls(math.exp(mean), tokens)
