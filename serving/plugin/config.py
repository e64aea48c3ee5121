"""What vLLM asks about a sparseserve checkpoint: which layers are sparse, and how each runs.

Two kinds of checkpoint are served. A ``packed24`` one names its packed modules in config.json
(docs/format.md). A dense one whose weights happen to be 2:4 is served with
``--quantization sparseserve``; its manifest, if it has one, names the modules that must be 2:4,
else every linear must.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.checkpoint.formats import METHOD
from sparseserve.checkpoint.quantization import Quantization, read_dtype
from sparseserve.checkpoint.stacks import STACKS_KEY, ExpertStack, stacks_from_json
from sparseserve.checkpoint.verification import check_before_reading
from sparseserve.errors import ArtifactError, ServingError
from sparseserve.sparsity import TWO_FOUR

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper

    from sparseserve.serving.kernels.choice.choose import TimedLayers
    from sparseserve.serving.plugin.expert_timing import ExpertTimes
    from sparseserve.serving.plugin.shards import CheckpointModule

logger = init_logger("vllm.sparseserve")


class SparseServeConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is checked as Any
    """Tells vLLM how each layer of one checkpoint is stored and computed.

    Attributes:
        packed: Modules stored as ``packed24``, by the checkpoint's names, and vLLM's name of each,
            None where vLLM has no such module; empty for a dense checkpoint.
        transposed: Those whose dense weight is stored ``[in, out]``.
        quantization: How the values of packed modules are rounded.
        read_dtype: What code times scale is rounded to; None where values are no codes.
        stacks: Tensors of experts that vLLM loads whole, though the checkpoint packs each expert.
        dense: Modules of a dense checkpoint that must be 2:4; None is every linear.
        is_packed: Which of the two kinds the checkpoint is.
    """

    def __new__(cls, *_: object) -> SparseServeConfig:
        """Watch models from now on: also in a worker process, which is sent a made config."""
        from sparseserve.serving.plugin.incoming import watch_models

        watch_models()
        made: SparseServeConfig = super().__new__(cls)
        return made

    def __init__(self, packed: frozenset[str] | None = None) -> None:
        """Describe a packed checkpoint, or with no argument a dense one, as vLLM asks for."""
        super().__init__()
        self.is_packed = packed is not None
        self.packed: dict[str, str | None] = {name: name for name in packed or ()}
        self.quantization = Quantization()
        self.read_dtype: torch.dtype | None = None
        self.transposed: frozenset[str] = frozenset()
        self.stacks: tuple[ExpertStack, ...] = ()
        self.dense: frozenset[str] | None = None
        self.timed: TimedLayers | None = None
        self._expert_times: ExpertTimes | None = None

    def get_name(self) -> str:
        """Return the name vLLM knows this method by."""
        return METHOD

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
        with _as_serving_error():
            made = cls(packed24.packed_modules(config))
            made.quantization = Quantization.from_config(config)
            made.read_dtype = read_dtype(config)
            made.stacks = stacks_from_json("quantization_config", config.get(STACKS_KEY, {}))
        return made

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
        for name in self.packed:
            self.packed[name] = next(iter(hf_to_vllm_mapper.apply_list([name])), None)
        if self.dense is not None:
            self.dense = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.dense)))

    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        """Compare the folder with its manifest, and learn which modules were pruned.

        Raises:
            ArtifactError: A file or tensor is missing or was added; says which.
            ServingError: The manifest says that the weights are not 2:4.
        """
        from vllm.transformers_utils.repo_utils import file_or_path_exists, get_hf_file_to_dict

        if Path(model_name).is_dir():
            check_before_reading(Path(model_name), verified=False)
        if not file_or_path_exists(model_name, MANIFEST_FILE, revision):
            return
        manifest = get_hf_file_to_dict(MANIFEST_FILE, model_name, revision) or {}
        if self.is_packed:
            self.transposed = frozenset(manifest.get("transposed", ()))
            return
        if manifest.get("pattern") != str(TWO_FOUR):
            raise ServingError(
                f"{model_name}: {MANIFEST_FILE} gives the pattern {manifest.get('pattern')!r}, "
                f"not {TWO_FOUR}: serve it without --quantization {METHOD}"
            )
        where = f"{model_name}: {MANIFEST_FILE}: pruned"
        with _as_serving_error():
            self.dense = packed24.module_names(manifest.get("pruned"), where)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how the layer ``prefix`` is loaded and run; None leaves it to vLLM.

        Raises:
            ServingError: The checkpoint packs only part of a layer that vLLM runs as one.
        """
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from sparseserve.serving.kernels.choice.choose import TimedLayers
        from sparseserve.serving.plugin.embedding import PanelEmbeddingMethod
        from sparseserve.serving.plugin.linear import (
            Dense24LinearMethod,
            Packed24LinearMethod,
            UnnamedLinearMethod,
        )

        engine = get_current_vllm_config_or_none()
        if engine is not None and engine.lora_config is not None:
            logger.warning_once(
                "with LoRA, 2:4 layers run dense: vLLM's LoRA layers read dense ones"
            )
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, VocabParallelEmbedding):
            return PanelEmbeddingMethod(prefix) if _takes_panels(engine) else None
        if not isinstance(layer, LinearBase):
            return self._experts_method(layer, prefix) if isinstance(layer, RoutedExperts) else None
        modules = self.checkpoint_modules(prefix)
        self.timed = self.timed or TimedLayers()
        absorbed = _is_absorbed(prefix)
        if absorbed or not any(module.sparse for module in modules):
            return UnquantizedLinearMethod() if absorbed else UnnamedLinearMethod()
        if self.is_packed:
            return Packed24LinearMethod(
                prefix, modules, self.timed, self.quantization, self.read_dtype
            )
        return Dense24LinearMethod(prefix, modules, self.timed)

    def checkpoint_modules(self, prefix: str) -> tuple[CheckpointModule, ...]:
        """Return the modules of the checkpoint that vLLM merges into its layer ``prefix``."""
        from sparseserve.serving.plugin.shards import CheckpointModule

        parent, dot, leaf = prefix.rpartition(".")
        merged = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}{dot}{name}" for name in merged]
        # A checkpoint may store as one what the model's own mapping expects in parts.
        if prefix in (self.packed.values() if self.is_packed else self.dense or ()):
            names = [prefix]
        return tuple(CheckpointModule(name, self._is_sparse(name)) for name in names)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """Return how experts are run where some of them were pruned; None leaves them to vLLM."""
        from vllm.platforms import current_platform

        from sparseserve.serving.plugin.expert_timing import ExpertTimes
        from sparseserve.serving.plugin.experts import TwoFourExpertsMethod

        pruned = self.packed.values() if self.is_packed else self.dense
        inside = pruned is None or any(str(name).startswith(f"{prefix}.") for name in pruned)
        if not (inside and current_platform.is_cpu()):
            return None
        self._expert_times = self._expert_times or ExpertTimes()
        return TwoFourExpertsMethod(layer.moe_config, self._expert_times)

    def _is_sparse(self, name: str) -> bool:
        if self.is_packed:
            return name in self.packed.values()
        return self.dense is None or name in self.dense


def _is_absorbed(prefix: str) -> bool:
    """Whether vLLM takes the weight of a layer and never runs it.

    Latent attention (MLA) multiplies this one into its queries and outputs.
    """
    return prefix.rpartition(".")[2] == "kv_b_proj"


@contextmanager
def _as_serving_error() -> Iterator[None]:
    """Tell vLLM's user what is wrong with the checkpoint as what stops the server."""
    try:
        yield
    except ArtifactError as error:
        raise ServingError(str(error)) from error


def _takes_panels(engine: VllmConfig | None) -> bool:
    """Whether the embedding and the head may be kept in panels.

    Only processors have kernels for them. A head in another dtype than the model's
    (``head_dtype``) is something that vLLM computes from an ordinary weight alone.
    """
    from vllm.platforms import current_platform

    model = None if engine is None else engine.model_config
    same = model is None or model.head_dtype == model.dtype
    return bool(current_platform.is_cpu() and same)
