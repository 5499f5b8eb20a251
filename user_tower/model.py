"""The user tower: projections around a backbone, a temperature, and the candidates that it scores.

Shapes: B histories, T positions, N catalog items, V items of the id vocabulary, D item vector, H hidden.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from item_tower.decoders.packed import pack
from schemas.errors import ConfigError, StoreError
from schemas.hashing import Digest
from user_tower.backbones import CausalLM, make_backbone
from user_tower.lora import LoraSettings, add_lora, merge_lora
from user_tower.times import TimeFeatures

MAX_LOGIT_SCALE = math.log(100.0)


class UserTowerConfig(BaseModel):
    """Shape of the user tower (DESIGN 8)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: Literal["sasrec", "hstu", "llm"] = "sasrec"
    features: Literal["text", "id", "text+id"] = "text"
    """``text``: the cached item vectors. ``id``: a learned table, the ID baseline. ``text+id``: their sum."""
    timestamps: bool = False
    """Also read when each event happened (paper, table 12)."""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """For ``text+id``: share of ids that are hidden in training, so that it learns to do without."""
    hidden: int = Field(default=128, gt=0)
    layers: int = Field(default=2, gt=0)
    heads: int = Field(default=2, gt=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    history: int = Field(default=50, gt=0)
    """Events of a history that are read, the newest."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """``cosine`` with a learned temperature as in the paper; ``dot`` as in SASRec."""
    pretrained: str | None = None
    """For ``llm``: a Hugging Face model instead of a small one from hidden, layers and heads."""
    projections: bool = True
    """``false``: the backbone reads the item vectors themselves, their length included, and its output is the query,
    as in the paper's code; the backbone is then as wide as the item vectors, and ``features`` is ``text``."""

    @model_validator(mode="after")
    def _only_text_goes_without_projections(self) -> UserTowerConfig:
        if not self.projections and self.features != "text":
            raise ValueError(f"projections = false needs features = 'text', not {self.features!r}")
        return self


class Catalog(NamedTuple):
    """The items of one open catalog, by row.

    vectors: [N, D] float32, or None for a tower that reads ids; id_rows: [N] row in the tower's vocabulary,
    V where unknown, or None; groups: [N] items with the same key share a number; norms: [N] float32, those of the
    vectors before they were normalised, or None for a tower that does not read them.
    """

    vectors: Tensor | None
    id_rows: Tensor | None
    groups: Tensor
    norms: Tensor | None = None

    @property
    def size(self) -> int:
        """N."""
        return len(self.groups)


class UserTower(nn.Module):
    """History in, query vector out. One tower works with any catalog of the same item fingerprint."""

    def __init__(
        self,
        config: UserTowerConfig,
        item_dim: int | None,
        vocabulary: list[str] | None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        """item_dim: D of the cached vectors, None for ``id``; vocabulary: item ids, None for ``text``; architecture:
        see ``make_backbone``. Raises ConfigError when a tower without projections is not as wide as the vectors."""
        super().__init__()
        self.config = config
        self.item_dim = item_dim
        self.vocabulary = vocabulary
        self.backbone, self.hidden = make_backbone(
            config.backbone,
            hidden=config.hidden,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
            history=config.history,
            pretrained=config.pretrained,
            architecture=architecture,
        )
        hidden = self.hidden
        self.output: nn.Module = nn.Identity()
        if not config.projections and item_dim != hidden:
            raise ConfigError(
                f"user_tower.projections = false: the backbone is {hidden} wide, the item vectors {item_dim}; set "
                f"user_tower.hidden, or take a user_tower.pretrained as wide as the Item LLM"
            )
        if config.features != "id" and config.projections:
            assert item_dim is not None
            self.input = nn.Sequential(nn.Linear(item_dim, hidden), nn.LayerNorm(hidden))
            self.output = nn.Linear(hidden, item_dim)
        if config.features != "text":
            assert vocabulary is not None
            width = hidden if item_dim is None else item_dim
            self.ids = nn.Embedding(len(vocabulary) + 1, width)  # the last row is the cold vector
            nn.init.normal_(self.ids.weight, std=0.02 if item_dim is None else 0.1 * width**-0.5)
        self.times = TimeFeatures(hidden) if config.timestamps else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def catalog(
        self, item_ids: list[str], vectors: NDArray[np.floating] | None, groups: NDArray[np.int64]
    ) -> Catalog:
        """Bind this tower to a catalog: vectors [N, D] of a snapshot (normalised here), groups [N]."""
        device = self.logit_scale.device
        group_tensor = torch.from_numpy(groups).to(device)
        dense = norms = id_rows = None
        if self.config.features != "id":
            assert vectors is not None
            dense = torch.from_numpy(np.asarray(vectors, dtype=np.float32)).to(device)
            norms = None if self.config.projections else dense.norm(dim=-1)
            dense = F.normalize(dense, dim=-1)
        if self.vocabulary is not None:
            known = {item_id: row for row, item_id in enumerate(self.vocabulary)}
            id_rows = torch.tensor([known.get(item_id, len(known)) for item_id in item_ids], device=device)
        return Catalog(dense, id_rows, group_tensor, norms)

    def item_vectors(self, catalog: Catalog, rows: Tensor | None = None) -> Tensor:
        """The only source of candidates, for loss, evaluation and index; float32 [N, D or H]; or those of ``rows``.

        For text features these are the cached vectors themselves, for ``text+id`` they are moved by what was learned
        of each item; L2-normalised under ``cosine``. In training, ids are hidden at random, see ``id_dropout``.
        """
        vectors = catalog.vectors
        if vectors is not None and rows is not None:
            vectors = vectors[rows]
        if catalog.id_rows is None:
            assert vectors is not None
            return vectors
        id_rows = catalog.id_rows if rows is None else catalog.id_rows[rows]
        if self.training and vectors is not None:
            hidden = torch.rand(id_rows.shape, device=id_rows.device) < self.config.id_dropout
            id_rows = id_rows.masked_fill(hidden, self.ids.num_embeddings - 1)
        learned = self.ids(id_rows)
        vectors = learned if vectors is None else vectors + learned
        return F.normalize(vectors, dim=-1) if self.config.similarity == "cosine" else vectors

    def forward(self, catalog: Catalog, items: Tensor, lengths: Tensor, times: Tensor) -> Tensor:
        """items, times: int64 [B, T] catalog rows and milliseconds, right-padded; lengths: [B]. Returns queries
        [B, T, D or H].

        A query is in the space of ``item_vectors``, L2-normalised under ``cosine``. Positions count from the
        end (the newest event has history - 1), so that a short history looks like the end of a long one.
        """
        return self.project(self.read(self.inputs(catalog, items), lengths, times))

    def inputs(self, catalog: Catalog, items: Tensor) -> Tensor:
        """What the backbone reads of each item; items: int64 [...] catalog rows. Returns [..., H]."""
        if self.config.features == "id":
            assert catalog.id_rows is not None
            return self.ids(catalog.id_rows[items])
        if not self.config.projections:
            assert catalog.norms is not None
            return self.item_vectors(catalog, items) * catalog.norms[items][..., None]
        return self.input(self.item_vectors(catalog, items))

    def read(self, x_BTH: Tensor, lengths: Tensor, times: Tensor) -> Tensor:
        """The backbone over ``inputs``, right-padded; lengths: [B]; times: int64 [B, T]. Returns [B, T, H]."""
        if self.times is not None:
            x_BTH = x_BTH + self.times(times)
        steps = torch.arange(x_BTH.shape[1], device=x_BTH.device)
        positions = (self.config.history - lengths[:, None] + steps).clamp(0, self.config.history - 1)
        if isinstance(self.backbone, CausalLM) and self.backbone.packed:
            return _packed_states(self.backbone, x_BTH, positions, lengths)
        return self.backbone(x_BTH, positions, times)

    def project(self, read_H: Tensor) -> Tensor:
        """Queries of what was read, float32 [..., D or H]; read_H: [..., H]."""
        queries = self.output(read_H).float()
        return F.normalize(queries, dim=-1) if self.config.similarity == "cosine" else queries

    def scale(self) -> Tensor:
        """Factor of the logits: exp of the learned temperature, at most 100; 1 under ``dot``."""
        if self.config.similarity == "dot":
            return torch.ones((), device=self.logit_scale.device)
        return self.logit_scale.clamp(0, MAX_LOGIT_SCALE).exp()

    def queries(self, catalog: Catalog, items: Tensor, lengths: Tensor, times: Tensor) -> Tensor:
        """The query after the newest event of each history; float32 [B, D or H]."""
        outputs = self(catalog, items, lengths, times)
        return outputs[torch.arange(len(lengths), device=lengths.device), lengths - 1]

    @torch.no_grad()
    def start_from(self, other: UserTower) -> None:
        """Take over the weights of a tower of the same shape; of its ids those that this one knows too."""
        known = {item_id: row for row, item_id in enumerate(other.vocabulary or [])}
        state = other.state_dict()
        if self.vocabulary is not None:
            rows = [known.get(item_id, len(known)) for item_id in self.vocabulary]
            state["ids.weight"] = other.ids.weight[torch.tensor([*rows, len(known)])]
        self.load_state_dict(state)

    def architecture(self) -> dict[str, Any] | None:
        """Of an ``llm`` backbone, its Hugging Face configuration, see ``make_backbone``."""
        return self.backbone.architecture() if isinstance(self.backbone, CausalLM) else None

    def add_lora(self, settings: LoraSettings) -> None:
        """Train adapters instead of the weights of an ``llm`` backbone, until ``merge_lora``. Raises ConfigError."""
        if not isinstance(self.backbone, CausalLM):
            raise ConfigError(f"train.lora is for backbone llm; user_tower.backbone is {self.config.backbone}")
        self.backbone.model = add_lora(self.backbone.model, settings)

    def merge_lora(self) -> None:
        """The end of ``add_lora``: one set of weights again."""
        assert isinstance(self.backbone, CausalLM)
        self.backbone.model = merge_lora(self.backbone.model)

    def fingerprint(self) -> str:
        """Hash of weights, configuration and vocabulary; 32 hexadecimal characters."""
        # with projections, as before there was a choice: what was trained then stays what it is
        config = self.config.model_dump_json(exclude={"projections"} if self.config.projections else None)
        digest = Digest().add(config).add(json.dumps(self.vocabulary))
        for name, tensor in sorted(self.state_dict().items()):
            digest.add(name).add(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the tower into an existing folder."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "user_tower.safetensors")
        settings = {
            "config": self.config.model_dump(),
            "item_dim": self.item_dim,
            "vocabulary": self.vocabulary,
            "architecture": self.architecture(),
        }
        (folder / "user_tower.json").write_text(json.dumps(settings))

    @classmethod
    def load(cls, folder: Path) -> UserTower:
        """A tower written by ``save``. Raises StoreError when a file is missing or damaged."""
        try:
            settings = json.loads((folder / "user_tower.json").read_text())
            config = UserTowerConfig(**settings["config"])
            tower = cls(config, settings["item_dim"], settings["vocabulary"], settings.get("architecture"))
            tower.load_state_dict(load_file(folder / "user_tower.safetensors"))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise StoreError(f"user tower {folder} cannot be read: {error}; train it again") from error
        return tower.eval()


def _packed_states(backbone: CausalLM, x_BTH: Tensor, positions_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """What the backbone makes of right-padded inputs, the padding left out of its work; zero where padded."""
    lengths_B = lengths_B.clamp(min=1)  # an empty history is one padded position, as when it is padded
    real_BT = torch.arange(x_BTH.shape[1], device=x_BTH.device) < lengths_B[:, None]
    row = pack(lengths_B.cpu().numpy(), x_BTH.device, positions_BT[:, 0].cpu().numpy())
    states_PH = backbone.forward_packed(x_BTH[real_BT], row)
    return x_BTH.new_zeros(x_BTH.shape, dtype=states_PH.dtype).masked_scatter(real_BT[..., None], states_PH)
