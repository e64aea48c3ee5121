from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparseserve.checkpoint.artifact import Manifest
from sparseserve.errors import ServingError
from tests.serving.conftest import dense_manifest

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
QKV = "model.layers.0.self_attn.qkv_proj"


def packed_config(**changes: object) -> dict[str, Any]:
    config = {
        "quant_method": "sparseserve",
        "version": 2,
        "format": "packed24",
        "pattern": "2:4",
        "modules": [Q, K, V],
        "weights": {"type": "float", "bits": 16, "group_size": None},
        "activations": None,
    }
    return {**config, **changes}


def parse(config: dict[str, Any]) -> Any:
    from sparseserve.serving.plugin.config import SparseServeConfig

    return SparseServeConfig.from_config(config)


def test_a_packed_config_knows_its_modules() -> None:
    config = parse(packed_config())
    assert config.is_packed
    assert set(config.packed) == {Q, K, V}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 3),
        ("version", "2"),
        ("version", True),
        ("weights", {"type": "int", "bits": 3, "group_size": None}),
        ("activations", {"type": "int", "bits": 8}),
        ("format", "dense"),
        ("pattern", "4:8"),
        ("modules", []),
        ("modules", "all"),
        ("modules", None),
        ("modules", [Q, 7]),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(ServingError, match=key):
        parse(packed_config(**{key: value}))


@pytest.mark.parametrize("key", ["version", "format", "pattern", "modules", "weights"])
def test_a_missing_key_is_refused_by_its_name(key: str) -> None:
    config = packed_config()
    del config[key]
    with pytest.raises(ServingError, match=key):
        parse(config)


@pytest.mark.parametrize(
    "foreign", [{"quant_method": "gptq", "bits": 4}, {}, {"quant_method": None}, None, "awq"]
)
def test_checkpoints_of_other_methods_are_left_to_them(foreign: Any) -> None:
    from sparseserve.serving.plugin.config import SparseServeConfig

    assert SparseServeConfig.override_quantization_method(foreign, "gptq", hf_config=None) is None


def test_a_merged_layer_is_known_by_the_modules_it_merges() -> None:
    config = parse(packed_config(modules=[Q, V]))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    found = config.checkpoint_modules(QKV)
    assert [(module.name, module.sparse) for module in found] == [
        (Q, True),
        (K, False),
        (V, True),
    ]


def test_a_layer_stored_merged_is_known_by_its_own_name() -> None:
    config = parse(packed_config(modules=[QKV]))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    (module,) = config.checkpoint_modules(QKV)
    assert (module.name, module.sparse) == (QKV, True)


def test_names_follow_the_renaming_of_the_model() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = parse(packed_config(modules=["gpt_neox.layers.0.mlp.dense_h_to_4h"]))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"gpt_neox.": "model."}))
    assert config.packed == {
        "gpt_neox.layers.0.mlp.dense_h_to_4h": "model.layers.0.mlp.dense_h_to_4h"
    }


def test_the_config_survives_the_way_to_a_worker_process() -> None:
    copied = pickle.loads(pickle.dumps(parse(packed_config())))
    assert set(copied.packed) == {Q, K, V}


def test_what_vllm_does_not_run_as_a_linear_is_left_to_it() -> None:
    config = parse(packed_config(modules=["model.layers.0.mlp.experts.3.up_proj"]))
    assert config.get_quant_method(nn.Module(), "model.layers.0.mlp.experts") is None
    assert config.get_quant_method(nn.Module(), "") is None


def write(manifest: Manifest, folder: Path) -> None:
    (folder / "sparseserve.json").write_text(json.dumps(manifest.to_json()))


class TestADenseCheckpoint:
    @staticmethod
    def config() -> Any:
        from sparseserve.serving.plugin.config import SparseServeConfig

        return SparseServeConfig()

    def test_must_be_two_four_in_every_linear_without_a_manifest(self, tmp_path: Path) -> None:
        config = self.config()
        config.maybe_update_config(str(tmp_path))
        (module,) = config.checkpoint_modules("anything.at.all")
        assert module.sparse

    def test_must_be_two_four_where_its_manifest_says_so(self, tmp_path: Path) -> None:
        write(dense_manifest([Q]), tmp_path)
        config = self.config()
        config.maybe_update_config(str(tmp_path))
        assert [config.checkpoint_modules(name)[0].sparse for name in (Q, K)] == [True, False]

    def test_of_another_pattern_is_refused(self, tmp_path: Path) -> None:
        write(dense_manifest([Q], pattern="50%"), tmp_path)
        with pytest.raises(ServingError, match="pattern"):
            self.config().maybe_update_config(str(tmp_path))

    def test_whose_manifest_lists_nothing_is_refused(self, tmp_path: Path) -> None:
        write(dense_manifest([]), tmp_path)
        with pytest.raises(ServingError, match="pruned"):
            self.config().maybe_update_config(str(tmp_path))
