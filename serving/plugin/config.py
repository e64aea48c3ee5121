"""What vLLM asks about a sparseserve checkpoint: which layers are sparse, and how each runs.

Two kinds of checkpoint are served. A ``packed24`` one names its packed modules in config.json
(docs/format.md). A dense one whose weights happen to be 2:4 is served with
``--quantization sparseserve``; its manifest, if it has one, names the modules that must be 2:4,
else every linear must.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.checkpoint.written_tensors import require_written_tensors
from sparseserve.errors import ServingError
from sparseserve.serving.plugin.method import LORA_REFUSED, METHOD_NAME
from sparseserve.sparsity import TWO_FOUR

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper

    from sparseserve.serving.kernels.choice.choose import TimedLayers
    from sparseserve.serving.plugin.linear import CheckpointModule

FORMAT_VERSION = 1
FORMAT_NAME = "packed24"


def packed_modules(config: Mapping[str, object]) -> frozenset[str]:
    """Return the packed modules that a checkpoint's ``quantization_config`` lists.

    Raises:
        ServingError: A key is missing or has a value that this release does not read.
    """
    readable = {"version": FORMAT_VERSION, "format": FORMAT_NAME, "pattern": str(TWO_FOUR)}
    for key, value in readable.items():
        if config.get(key) != value:
            raise ServingError(
                f"quantization_config: {key} is {config.get(key)!r}, this release reads only "
                f"{value!r}: install the sparseserve release that wrote the checkpoint, "
                "or export it again"
            )
    return _names(config.get("modules"), "quantization_config: modules")


class SparseServeConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is checked as Any
    """Tells vLLM how each layer of one checkpoint is stored and computed.

    Attributes:
        packed: Modules stored as ``packed24``; empty for a dense checkpoint.
        dense: Modules of a dense checkpoint that must be 2:4; None is every linear.
        is_packed: Which of the two kinds the checkpoint is.
    """

    def __init__(self, packed: frozenset[str] | None = None) -> None:
        """Describe a packed checkpoint, or with no argument a dense one, as vLLM asks for."""
        super().__init__()
        self.is_packed = packed is not None
        self.packed = packed or frozenset()
        self.dense: frozenset[str] | None = None
        self._timed: TimedLayers | None = None

    def get_name(self) -> str:
        """Return the name vLLM knows this method by."""
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes the values may be computed in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU will do: where no sparse kernel runs, the dense one does."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: a dense checkpoint has no configuration file of ours to look for."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> SparseServeConfig:
        """Read the ``quantization_config`` of config.json.

        Raises:
            ServingError: A key is missing or has a value that this release does not read.
        """
        return cls(packed_modules(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: object, user_quant: str | None, hf_config: object = None
    ) -> None:
        """Leave every checkpoint to the method it names.

        vLLM asks this for every quantized checkpoint, also for those of others.
        """
        return

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follow vLLM's names for the modules of this model."""
        self.packed = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.packed)))
        if self.dense is not None:
            self.dense = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.dense)))

    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        """Compare the tensors with those that were written, and learn which modules were pruned.

        Raises:
            ArtifactError: A tensor is missing or was added; says which.
            ServingError: The manifest says that the weights are not 2:4.
        """
        from vllm.transformers_utils.repo_utils import file_or_path_exists, get_hf_file_to_dict

        if Path(model_name).is_dir():
            require_written_tensors(Path(model_name))
        if self.is_packed or not file_or_path_exists(model_name, MANIFEST_FILE, revision):
            return
        manifest = get_hf_file_to_dict(MANIFEST_FILE, model_name, revision) or {}
        if manifest.get("pattern") != str(TWO_FOUR):
            raise ServingError(
                f"{model_name}: {MANIFEST_FILE} gives the pattern {manifest.get('pattern')!r}, "
                f"not {TWO_FOUR}: serve it without --quantization {METHOD_NAME}"
            )
        self.dense = _names(manifest.get("pruned"), f"{model_name}: {MANIFEST_FILE}: pruned")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how the layer ``prefix`` is loaded and run; None leaves it to vLLM.

        Raises:
            ServingError: The checkpoint packs a module that vLLM does not run as a linear, or
                LoRA is asked for.
        """
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from sparseserve.serving.kernels.choice.choose import TimedLayers
        from sparseserve.serving.plugin.embedding import PanelEmbeddingMethod
        from sparseserve.serving.plugin.linear import Dense24LinearMethod, Packed24LinearMethod

        engine = get_current_vllm_config_or_none()
        if engine is not None and engine.lora_config is not None:
            raise ServingError(LORA_REFUSED)
        if not isinstance(layer, LinearBase):
            self._refuse_packed(layer, prefix)
            return (
                PanelEmbeddingMethod(prefix) if isinstance(layer, VocabParallelEmbedding) else None
            )
        modules = self.checkpoint_modules(prefix)
        if not any(module.sparse for module in modules):
            return UnquantizedLinearMethod()
        self._timed = self._timed or TimedLayers()
        method = Packed24LinearMethod if self.is_packed else Dense24LinearMethod
        return method(prefix, modules, self._timed)

    def checkpoint_modules(self, prefix: str) -> tuple[CheckpointModule, ...]:
        """Return the modules of the checkpoint that vLLM merges into its layer ``prefix``."""
        from sparseserve.serving.plugin.linear import CheckpointModule

        parent, dot, leaf = prefix.rpartition(".")
        merged = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}{dot}{name}" for name in merged]
        # A checkpoint may store as one what the model's own mapping expects in parts.
        if prefix in (self.packed if self.is_packed else self.dense or ()):
            names = [prefix]
        return tuple(CheckpointModule(name, self._is_sparse(name)) for name in names)

    def _is_sparse(self, name: str) -> bool:
        if self.is_packed:
            return name in self.packed
        return self.dense is None or name in self.dense

    def _refuse_packed(self, layer: torch.nn.Module, prefix: str) -> None:
        for name in sorted(self.packed):
            if name == prefix or name.startswith(f"{prefix}."):
                raise ServingError(
                    f"{name} is packed, but vLLM runs it inside {type(layer).__name__}, "
                    "not as a linear: export the checkpoint with --format dense"
                )


def _names(value: object, where: str) -> frozenset[str]:
    if not isinstance(value, list | tuple) or not value:
        raise ServingError(f"{where} is not a list of module names: export the checkpoint again")
    if wrong := [name for name in value if not isinstance(name, str)]:
        raise ServingError(f"{where} holds {wrong[0]!r}, which is no module name")
    return frozenset(value)
