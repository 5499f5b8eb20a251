"""Low-rank adapters on a Hugging Face model (Hu et al. 2021), for as long as it is tuned. The only file that imports
peft."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from schemas.errors import ConfigError


class LoraSettings(BaseModel):
    """Adapters in place of the full weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    """The adapter's product is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    """Names of the linear layers that get one; by default every linear layer."""


def add_lora(model: nn.Module, settings: LoraSettings) -> Any:
    """The model with adapters, its own weights frozen; its layers are changed in place.

    Raises ConfigError when no layer is called as ``targets`` says.
    """
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = list(settings.targets) if settings.targets else "all-linear"
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.targets = {list(settings.targets or [])}: {str(error).splitlines()[0]}") from error


def merge_lora(adapted: Any) -> nn.Module:
    """The model that ``add_lora`` was given, the adapters added into its weights, all of which train again."""
    model: nn.Module = adapted.merge_and_unload()
    return model.requires_grad_(True)
