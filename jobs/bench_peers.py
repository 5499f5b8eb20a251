"""Environments of their own for the libraries that benchmarks compare with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from schemas.errors import ConfigError
from schemas.hashing import Digest

PEERS = {
    "rectools": ("torch==2.13.0", "rectools[torch]==0.19.0", "pytorch-lightning==2.5.2"),
    # RecBole 1.2.1 uses what later NumPy, pandas, SciPy and setuptools took out
    "recbole": (
        "torch==2.13.0", "recbole==1.2.1", "numpy==1.26.4", "pandas==2.1.4", "scipy==1.12.0", "setuptools<81",
    ),
}  # fmt: skip


def peer_python(name: str, pins: tuple[str, ...], store: Path) -> Path:
    """The interpreter of an environment with these packages, made once a set of pins under the store.

    Raises ConfigError when it cannot be made.
    """
    folder = (store / "peers" / f"{name}-{Digest().add(json.dumps(pins)).hexdigest()[:12]}").resolve()
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    print(f"installing {', '.join(pins)} into {folder}; some minutes, about 1.5 GB", file=sys.stderr, flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins],
    ):
        made = subprocess.run(command, stdout=sys.stderr, check=False)
        if made.returncode:
            raise ConfigError(f"{' '.join(command)} ended with {made.returncode}; see above")
    done.touch()
    return python
