"""Public data for the demo, fetched from PyPI and checked; nothing of it is part of this project."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pipeline.files import new_folder
from schemas.errors import DownloadError

RECBOLE = "recbole==1.2.1"
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
MOVIELENS = "recbole/dataset_example/ml-100k/"


def fetch_movielens(folder: Path) -> None:
    """Put MovieLens-100K (RecBole atomic files) into ``folder``, taken out of the recbole wheel.

    MovieLens data may be used for research and must not be redistributed. Raises DownloadError when the wheel
    cannot be fetched or is not the expected one.
    """
    with tempfile.TemporaryDirectory() as aside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", aside, RECBOLE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(aside).glob("recbole-*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = done.stderr.strip().splitlines() or ["pip said nothing"]
            raise DownloadError(
                f"MovieLens-100K lies in the PyPI wheel {RECBOLE}, which pip could not fetch: {lines[-1]}; "
                f"connect to PyPI, or put the files ml-100k.item and ml-100k.inter into {folder}"
            )
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != RECBOLE_SHA256:
            raise DownloadError(f"{wheels[0].name} has sha256 {found}, expected {RECBOLE_SHA256}; try again")
        with new_folder(folder) as target, zipfile.ZipFile(wheels[0]) as wheel:
            for name in ("ml-100k.item", "ml-100k.inter"):
                (target / name).write_bytes(wheel.read(MOVIELENS + name))
