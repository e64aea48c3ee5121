"""Making plain transformers open packed24 checkpoints, in programs that never import us.

transformers lets quantizers be registered, but has no way to find those of others. torch has one:
``import torch`` calls every entry point of the group ``torch.backends``, which is meant for devices
(https://docs.pytorch.org/docs/stable/notes/extension_autoload.html). Ours waits until transformers
has imported its table of quantizers, and adds one line to it. ``import sparseserve`` does the same,
for programs that turn torch's autoload off (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``).

Every program that imports torch runs this, so nothing but the standard library is imported.
"""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Let transformers open packed24 checkpoints, now or as soon as it is imported.

    It may be called at any time, and more than once.
    """
    if (table := _table()) is not None:
        _add_to(table)
    elif not any(isinstance(finder, _WaitForTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForTable())


class _WaitForTable:
    """Finds no module but transformers' table, and sees when that has been imported.

    torch, and so this, may itself be imported by the table. Then it is too late to see the table's
    import, but other modules follow before a model can be read, and this is asked for each.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the table as Python would, to go on when it has run; nothing else."""
        if (table := _table()) is not None and self in sys.meta_path:
            sys.meta_path.remove(self)
            _add_to(table)
        if name != _TABLE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                _add_to(module)

            # Python made this loader for this one import.
            spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec


def _table() -> ModuleType | None:
    """Return transformers' table of quantizers once it is imported to its end."""
    table = sys.modules.get(_TABLE)
    # Python's own mark, which the standard library reads in the same way.
    ready = table is not None and not getattr(table.__spec__, "_initializing", False)
    return table if ready else None


def _add_to(table: ModuleType) -> None:
    """Add our quantizer to transformers' ``table``; without it, transformers must go on working."""
    try:
        from sparseserve.huggingface.quantizer import add_to
    except ImportError as error:
        warnings.warn(
            f"sparseserve cannot teach this release of transformers to open packed24 ({error}): "
            'pip install "transformers>=5.0", or export checkpoints with --format dense',
            stacklevel=2,
        )
        return
    add_to(table)
