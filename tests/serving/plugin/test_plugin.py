from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparseserve.serving.plugin import register
from sparseserve.serving.plugin.method import METHOD_NAME

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_registering_twice_leaves_one_method_and_its_config() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    register()
    first = get_quantization_config(METHOD_NAME)
    register()

    assert QUANTIZATION_METHODS.count(METHOD_NAME) == 1
    assert get_quantization_config(METHOD_NAME) is first


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["sparseserve"] is register


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a processor without AMX")
def test_registering_asks_linux_for_the_tiles_of_amx() -> None:
    program = (
        "import ctypes\n"
        "from sparseserve.serving.plugin import register\n"
        "def tiles_are_allowed():\n"
        "    mask = ctypes.c_uint64()\n"
        "    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))  # ARCH_GET_XCOMP_PERM\n"
        "    return bool(mask.value >> 18 & 1)\n"
        "assert not tiles_are_allowed()\n"
        "register()\n"
        "assert tiles_are_allowed()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    program = (
        "import sys, sparseserve.serving.plugin\n"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
