"""State dicts of others: tensors by name out of .bin, .pt or .safetensors files, whole or in shards, never code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from schemas.errors import DataError

# what a folder is looked through for, in this order
_WHOLE = ("pytorch_model.bin", "model.safetensors")
_INDEX = ".index.json"
# under which training frameworks put the state dict of the model
_CONTAINERS = ("state_dict", "model", "module")
# what wrappers put before every name: DDP and DeepSpeed, Lightning Fabric, torch.compile
_WRAPPERS = ("module.", "_forward_module.", "_orig_mod.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, of the shards that an index names, or of the checkpoint in a folder; on the CPU, read
    from the disk when they are used.

    What wrappers put before all names is taken off. Raises DataError: nothing there, damaged, a shard or a name of
    the index missing, or anything in it that is not a tensor (nothing pickled is ever run).
    """
    source = _find(path)
    if not source.name.endswith(_INDEX):
        return _unwrapped(_load(source))
    try:
        where = json.loads(source.read_text())["weight_map"]
        shards = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{source} is not the index of a sharded checkpoint: {error}; fetch it again") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise DataError(f"{source} names {shard!r}, which is not a file beside it")
        state |= _load(source.parent / shard)
    missing = sorted(set(where) - set(state))
    if missing:
        raise DataError(f"{source} names {missing}, which its shards do not hold; fetch them again")
    return _unwrapped(state)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"checkpoint.weights = {str(path)!r}: there is no such file or folder")
    for name in (*_WHOLE, *(f"{whole}{_INDEX}" for whole in _WHOLE)):
        if (path / name).is_file():
            return path / name
    if (path / "zero_to_fp32.py").is_file():
        raise DataError(
            f"{path} is a DeepSpeed checkpoint in pieces; run `python zero_to_fp32.py . OUT` in it, and import OUT"
        )
    raise DataError(f"{path} holds none of {[*_WHOLE, *(f'{whole}{_INDEX}' for whole in _WHOLE)]}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is damaged, or holds more than tensors, which is not opened ({str(error).splitlines()[0]}); "
            f"save the state dict alone, as zero_to_fp32.py does"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} cannot be read: {reason}; fetch it again") from error
    if isinstance(found, dict):
        found = next((found[name] for name in _CONTAINERS if isinstance(found.get(name), dict)), found)
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds {type(found).__name__}, not a state dict of tensors")
    other = sorted(str(name) for name, value in found.items() if not isinstance(value, Tensor))
    if other:
        raise DataError(f"{path}: {other} are not tensors; save the state dict alone, as zero_to_fp32.py does")
    return {str(name): value for name, value in found.items()}


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while wrapper := next((each for each in _WRAPPERS if all(name.startswith(each) for name in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state
