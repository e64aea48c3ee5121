"""The compiled kernels of the processor, found and called through ctypes.

They are an optional part of the package: where there was no C++ compiler at installation, the
library is missing, and layers run dense.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from sparseserve.errors import ServingError

_MODULE = "sparseserve.serving.kernels.cpu.native._kernels"
_VERSION = 6


class Unit(IntEnum):
    """Vector units that the kernels are compiled for, the best last."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2


class Int8Unit(IntEnum):
    """Vector units that int8 products are compiled for, the best last."""

    PORTABLE = 0
    AVX2 = 1
    AVX_VNNI = 2
    AVX512_VNNI = 3


class Bf16Unit(IntEnum):
    """Vector units that products of bfloat16 are compiled for, the best last."""

    PORTABLE = 0
    AVX512_BF16 = 1


class Bf16Operation(IntEnum):
    """What the library multiplies bfloat16 activations with; see bf16.h."""

    TWO_FOUR = 0
    DENSE = 1
    TILES = 2


class Tiles(IntEnum):
    """Whether products may use the processor's matrix unit, AMX."""

    READY = 0
    MISSING = 1
    REFUSED = 2


class Operation(IntEnum):
    """What the library can do; see kernels.h."""

    DIRECT = 0
    UNPACKED = 1
    UNPACK = 2
    DENSE = 3


# The fields of Request in library.cpp. ctypes converts arguments one by one, and slowly: a small
# product notices eleven of them.
_REQUEST = struct.Struct("=11q")

# Those of Int8Request and Bf16Request.
_INT8_REQUEST = struct.Struct("=12q")
_BF16_REQUEST = struct.Struct("=13q")

_STORED = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
STORED_DTYPES = tuple(_STORED)


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The loaded library.

    Attributes:
        handle: As ctypes has it.
        best: The best vector unit of this processor.
        parallel: Address of ``GOMP_parallel`` in the OpenMP library that torch runs on; None if
            there is none, and then one thread does all.
        int8_units: The vector units of this processor that int8 products know, the best last.
        bf16_units: Those that products of bfloat16 know.
        tiles: Whether AMX can be used beside them.
    """

    handle: ctypes.CDLL
    best: Unit
    parallel: int | None
    int8_units: tuple[Int8Unit, ...]
    bf16_units: tuple[Bf16Unit, ...]
    tiles: Tiles

    def run(
        self,
        operation: Operation,
        panels: Tensor,
        inputs: Tensor | None,
        outputs: Tensor,
        *,
        columns: int,
        unit: Unit | None,
    ) -> None:
        """Run one operation on as many threads as torch has. Nothing is checked here.

        Args:
            operation: Which.
            panels: Of ``cpu_layout``.
            inputs: ``[batch, columns]`` float32; None for ``UNPACK``.
            outputs: ``[batch, rows]`` float32; for ``UNPACK`` ``[columns, rows]``, all rows of the
                panels.
            columns: A multiple of 32.
            unit: Which vector unit, which the processor must have; None is the best.
        """
        batch, rows = outputs.shape
        request = _REQUEST.pack(
            self.best if unit is None else unit,
            operation,
            _STORED[panels.dtype],
            panels.data_ptr(),
            0 if inputs is None else inputs.data_ptr(),
            outputs.data_ptr(),
            batch,
            rows,
            columns,
            torch.get_num_threads(),
            self.parallel or 0,
        )
        if self.handle.sparseserve_run(request):
            raise ValueError(f"the library knows no {operation!r} of {panels.dtype} on {unit!r}")

    def run_int8(
        self,
        panels: Tensor,
        scale: Tensor,
        inputs: Tensor,
        bias: Tensor | None,
        outputs: Tensor,
        *,
        unit: Int8Unit | None,
    ) -> None:
        """Quantize and multiply on as many threads as torch has. Nothing is checked here.

        Args:
            panels: Of ``int8_layout``.
            scale: float32 ``[rows]``.
            inputs: ``[batch, columns]``, bfloat16 or float32; columns are a multiple of 4.
            bias: ``[rows]`` in the dtype of the inputs, or None.
            outputs: ``[batch, rows]`` in the dtype of the inputs.
            unit: Which vector unit, which the processor must have; None is the best.
        """
        batch, rows = outputs.shape
        request = _INT8_REQUEST.pack(
            self.int8_units[-1] if unit is None else unit,
            _STORED[inputs.dtype],
            panels.data_ptr(),
            scale.data_ptr(),
            inputs.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            outputs.data_ptr(),
            batch,
            rows,
            inputs.shape[1],
            torch.get_num_threads(),
            self.parallel or 0,
        )
        if self.handle.sparseserve_int8(request):
            raise ValueError(f"the library knows no int8 product of {inputs.dtype} on {unit!r}")

    def run_bf16(
        self,
        operation: Bf16Operation,
        panels: Tensor,
        inputs: Tensor,
        bias: Tensor | None,
        outputs: Tensor,
        *,
        groups: Tensor | None = None,
        unit: Bf16Unit | None,
    ) -> None:
        """Multiply bfloat16 values on as many threads as torch has. Nothing is checked here.

        Args:
            operation: With what.
            panels: Of ``cpu_layout``, 2:4 or dense, in bfloat16; of several weights of one shape
                after another, where there are ``groups``.
            inputs: ``[batch, columns]``; for a 2:4 weight columns are a multiple of 4.
            bias: ``[rows]`` or None; with ``groups`` ``[weights, rows]``.
            outputs: ``[batch, rows]``.
            groups: int64 ``[groups, 3]``: the number of a weight, the first of the tokens that it
                multiplies, and how many; None is one weight for all tokens.
            unit: Which vector unit, which the processor must have; None is the best.
        """
        batch, rows = outputs.shape
        request = _BF16_REQUEST.pack(
            self.bf16_units[-1] if unit is None else unit,
            operation,
            panels.data_ptr(),
            inputs.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            outputs.data_ptr(),
            0 if groups is None else groups.data_ptr(),
            batch if groups is None else len(groups),
            0 if groups is None else panels[0].nbytes,
            rows,
            inputs.shape[1],
            torch.get_num_threads(),
            self.parallel or 0,
        )
        if self.handle.sparseserve_bf16(request):
            raise ValueError(f"the library knows no bfloat16 {operation!r} on {unit!r}")


@cache
def native_library() -> NativeLibrary:
    """Load the library.

    Raises:
        ServingError: It was not built, cannot be loaded, or is that of another release.
    """
    found = importlib.util.find_spec(_MODULE)
    if found is None or found.origin is None:
        raise ServingError(
            "the compiled kernels were not built: install a C++17 compiler, then sparseserve again "
            "with pip install --force-reinstall --no-deps"
        )
    try:
        handle = ctypes.CDLL(found.origin)
    except OSError as error:
        raise ServingError(
            f"the compiled kernels cannot be loaded: {error}: install sparseserve again with "
            "pip install --force-reinstall --no-deps"
        ) from error
    version = handle.sparseserve_version()
    if version != _VERSION:
        raise ServingError(
            f"{found.origin} has version {version}, this release needs {_VERSION}: install it again"
        )
    handle.sparseserve_run.argtypes = [ctypes.c_char_p]
    handle.sparseserve_int8.argtypes = [ctypes.c_char_p]
    handle.sparseserve_bf16.argtypes = [ctypes.c_char_p]
    int8, bf16 = handle.sparseserve_int8_units(), handle.sparseserve_bf16_units()
    return NativeLibrary(
        handle,
        Unit(handle.sparseserve_unit()),
        _parallel_of_torch(),
        tuple(unit for unit in Int8Unit if int8 >> unit & 1),
        tuple(unit for unit in Bf16Unit if bf16 >> unit & 1),
        Tiles(handle.sparseserve_tiles()),
    )


def missing_library() -> str | None:
    """Return why there is no library, or None if there is."""
    try:
        native_library()
    except ServingError as error:
        return str(error)
    return None


def _parallel_of_torch() -> int | None:
    """Return the address of ``GOMP_parallel`` in the OpenMP library that torch itself runs on.

    torch loads it for the whole process, unless another that has the symbol was loaded before, as
    LLVM's and Intel's have; then torch runs on that one, too.
    """
    process = ctypes.CDLL(None)
    if not hasattr(process, "GOMP_parallel"):
        return None
    return ctypes.cast(process.GOMP_parallel, ctypes.c_void_p).value
