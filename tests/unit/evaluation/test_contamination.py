"""A model is not judged by the text it was pruned with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparseserve.checkpoint.artifact import Artifact, write_manifest
from sparseserve.errors import ArtifactError, CalibrationError
from sparseserve.evaluation.contamination import assert_not_calibration
from sparseserve.text import read_text
from tests.unit.evaluation.pruned import save_pruned, words


def test_calibration_text_is_refused_for_evaluation_under_any_name(tmp_path: Path) -> None:
    calibration = words(tmp_path / "calibration.txt", "to prune a model ")
    save_pruned("llama", tmp_path / "model", calibration)
    copy = tmp_path / "renamed.txt"
    copy.write_bytes(calibration.read_bytes())
    with pytest.raises(CalibrationError, match=r"renamed\.txt is the text calibration\.txt"):
        assert_not_calibration(tmp_path / "model", read_text(copy))


def test_other_text_and_models_without_a_manifest_are_evaluated(tmp_path: Path) -> None:
    calibration = words(tmp_path / "calibration.txt", "to prune a model ")
    other = words(tmp_path / "other.txt", "to judge a model ")
    save_pruned("llama", tmp_path / "model", calibration)
    assert_not_calibration(tmp_path / "model", read_text(other))
    assert_not_calibration(tmp_path, read_text(calibration))


def test_one_calibration_file_among_several_is_found(tmp_path: Path) -> None:
    calibration = words(tmp_path / "calibration.txt", "to prune a model ")
    save_pruned("llama", tmp_path / "model", calibration)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    words(mixed / "a.txt", "to judge a model ")
    (mixed / "b.txt").write_bytes(calibration.read_bytes())
    with pytest.raises(CalibrationError, match=r"b\.txt is the text calibration\.txt"):
        assert_not_calibration(tmp_path / "model", read_text(str(mixed)))


@pytest.mark.parametrize("sources", [[{"name": "c.txt"}], [{"sha256": "0"}], ["c.txt"], [None]])
def test_a_manifest_that_does_not_say_which_text_is_refused(
    tmp_path: Path, sources: list[object]
) -> None:
    text = words(tmp_path / "c.txt", "to prune a model ")
    manifest = save_pruned("llama", tmp_path / "model", text).manifest
    write_manifest(tmp_path / "model", replace(manifest, calibration={"sources": sources}))
    assert Artifact.open(tmp_path / "model").manifest.calibration == {"sources": sources}
    with pytest.raises(ArtifactError, match="calibration sources lack a name or sha256"):
        assert_not_calibration(tmp_path / "model", read_text(text))
