"""What bytes say, read in the plainest way: what the program's answers are compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32},
    **{"U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def plain_safetensors(data: bytes) -> dict[str, Tensor]:
    """Read a safetensors file, by its specification."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            dtype = _DTYPES[entry["dtype"]]
            flat = torch.frombuffer(bytearray(body[start:stop] or b"\0" * 8), dtype=dtype)
            count = (stop - start) // dtype.itemsize
            found[name] = flat[:count].reshape(entry["shape"])
    return found


def plain_packed_weight(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Unpack a weight, group by group, as docs/format.md says."""
    values, indices = tensors[f"{module}.weight"], tensors[f"{module}.weight_indices"]
    scale = tensors.get(f"{module}.weight_scale")
    if scale is not None:
        values = _plain_values(values, scale.float())
    rows, kept = values.shape
    dense = torch.zeros(rows, 2 * kept, dtype=values.dtype)
    row = torch.arange(rows)
    for group in range(kept // 2):
        nibble = indices[:, group // 2].long() >> (4 * (group % 2))
        for place, value in ((nibble & 3, 2 * group), (nibble >> 2 & 3, 2 * group + 1)):
            dense[row, 4 * group + place] = values[:, value]
    return dense


def _plain_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply each code by its scale, column by column."""
    if codes.dtype == torch.uint8:
        halves = [(codes[:, byte] >> shift & 15).long() - 8 for byte, shift in _halves(codes)]
        codes = torch.stack(halves, dim=1)
    kept, groups = codes.shape[1], scale.shape[1]
    columns = [codes[:, k].float() * scale[:, k * groups // kept] for k in range(kept)]
    return torch.stack(columns, dim=1)


def _halves(codes: Tensor) -> list[tuple[int, int]]:
    return [(byte, shift) for byte in range(codes.shape[1]) for shift in (0, 4)]


def plain_texts(suffix: str, data: bytes) -> list[object] | None:
    """Return the documents of a text; None where only a library knows."""
    if suffix not in (".txt", ".json", ".jsonl"):
        return None
    text = data.decode("utf-8-sig")
    if suffix == ".txt":
        return [text]
    if suffix == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    column = "text" if "text" in rows[0] else "messages"
    documents = [row[column] for row in rows if row[column] is not None]
    return [
        text
        if isinstance(text, str)
        else [{key: item for key, item in message.items() if item is not None} for message in text]
        for text in documents
    ]
