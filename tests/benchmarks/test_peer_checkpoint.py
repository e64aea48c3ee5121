"""Another tool's checkpoint, kept for scripts that ask it more than its perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor, nn

from benchmarks.peers import environment as peer_environment
from benchmarks.peers import worker as peer_worker
from benchmarks.peers.checkpoint import write_checkpoint
from benchmarks.peers.compare import compare
from benchmarks.peers.environment import Peer, PeerError
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import save_tiny_model
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan

SPEC = CalibrationSpec(samples=3, sequence_length=16, seed=5)
# A distribution that is installed here plays the other tool, so that its version can be read.
STAND_IN = "torch"


def prune_by_magnitude(model: nn.Module, windows: Tensor) -> None:
    prune_nothing(model, windows)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.weight.copy_(TWO_FOUR.project(module.weight))


def prune_nothing(model: nn.Module, windows: Tensor) -> None:
    for window in windows:
        model(input_ids=window[None])


@pytest.mark.further
def test_a_checkpoint_is_kept_only_where_the_tool_did_what_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker runs in this process with a function in the place of a tool."""
    dense = save_tiny_model("llama", tmp_path / "dense")
    prune = prune_by_magnitude
    monkeypatch.setitem(peer_worker.TOOLS, STAND_IN, lambda folder, method: prune)

    def in_this_process(command: Sequence[str]) -> None:
        peer_worker.main(command[3:])

    monkeypatch.setattr(peer_environment, "_call", in_this_process)
    operators = [name for name, _ in plan(Job(str(dense))).operators]
    out, peer = tmp_path / "kept" / "pruned", Peer(STAND_IN, ("any",))
    report = write_checkpoint(str(dense), out, peer, "any", SPEC, python=Path("python"))
    assert report.tokens == 3 * 16
    assert compare(out, dense, operators).zeros == 0.5
    assert [path.name for path in out.parent.iterdir()] == ["pruned"]
    with pytest.raises(PeerError, match=r"pruned is there already"):
        write_checkpoint(str(dense), out, peer, "any", SPEC, python=Path("python"))

    prune = prune_nothing
    with pytest.raises(PeerError, match="is not 2:4"):
        write_checkpoint(
            str(dense), tmp_path / "kept" / "bad", peer, "any", SPEC, python=Path("python")
        )
    assert [path.name for path in out.parent.iterdir()] == ["pruned"]
