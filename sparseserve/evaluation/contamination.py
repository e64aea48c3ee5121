"""Whether a text that a model is judged by was used to prune it."""

from __future__ import annotations

from pathlib import Path

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.errors import ArtifactError, CalibrationError
from sparseserve.text import TextSource


def assert_not_calibration(model_dir: Path, source: TextSource) -> None:
    """Refuse to evaluate a pruned checkpoint on a file it was calibrated with.

    A folder without a manifest was not pruned here, so there is nothing to compare with.

    Raises:
        CalibrationError: a file of ``source`` has the hash of a calibration file; names both.
        ArtifactError: the manifest is damaged.
    """
    if not (model_dir / MANIFEST_FILE).is_file():
        return
    calibrated_with = _calibration_files(model_dir)
    for file in source.files:
        if file.sha256 in calibrated_with:
            raise CalibrationError(
                f"text {file.name} is the text {calibrated_with[file.sha256]} that {model_dir} "
                "was calibrated with, so its perplexity would say nothing: give another --text"
            )


def _calibration_files(model_dir: Path) -> dict[str, str]:
    """Return the names of the calibration files in the manifest by their sha256."""
    sources = Artifact.open(model_dir).manifest.calibration.get("sources", [])
    try:
        return {source["sha256"]: source["name"] for source in sources}
    except (TypeError, KeyError) as error:
        raise ArtifactError(
            f"{model_dir / MANIFEST_FILE}: calibration sources lack a name or sha256"
        ) from error
