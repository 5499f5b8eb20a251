"""Less memory, or more speed, from the layers of a transformers model; neither changes what is computed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: Any) -> None:
    """Compute each layer again in the backward pass instead of keeping its activations.

    Raises ValueError where the model has no such layers.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def mark_training(model: nn.Module, mode: bool) -> None:
    """Set what transformers asks for before it checkpoints a layer, ``layer.training``, and nothing within the layer:
    a model whose dropout is off is checkpointed as well."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = mode


def compile_layers(model: nn.Module) -> None:
    """``torch.compile`` each layer in place, for rows of any length; names of weights and saved files stay.

    The layers share one compiled program: seconds to a minute at the first call, whatever the depth.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers or [model]:
        layer.compile(dynamic=True)
