"""The discriminative variant: will this user click this item? (paper, section 3.3)

Late fusion: a learned [USER] token is appended to the history, and what the tower reads there meets the candidate in
one inner product; neither side knows the other, so both are made beforehand. Early fusion: the candidate itself is
appended, and the logit is read at its place: one pass of the tower for each candidate.

Shapes: B contexts, T events, P candidates of all contexts, N catalog items, D item vector, H hidden, F factors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from schemas.errors import ConfigError, StoreError
from schemas.hashing import Digest
from user_tower.candidates import CandidateBatch, Examples, candidate_batches
from user_tower.model import Catalog, UserTower
from user_tower.negatives import NegativeSampler
from user_tower.sequences import Batch
from user_tower.steps import query_loss, use_settings
from user_tower.train import TrainConfig

Fusion = Literal["late", "early"]


class RankerConfig(BaseModel):
    """Shape and loss of a ranker; its tower is that of ``[user_tower]``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fusion: Fusion = "late"
    """``late``: the history's vector and the candidate's meet in an inner product. ``early``: the candidate is read
    with the history; finds more, and costs a pass of the tower for each candidate."""
    factors: int = Field(default=64, gt=0)
    """For ``late``: F, length of that product beside the item's bias."""
    next_item_weight: float = Field(default=1.0, ge=0)
    """lambda of BCE + lambda x next-item loss. The paper has the sum and gives no value; 1.0 is ours."""


class Ranker(nn.Module):
    """A user tower with one more token and a head."""

    def __init__(self, tower: UserTower, fusion: Fusion, factors: int) -> None:
        """Raises ConfigError when the tower's history has no place for a token beside an event."""
        super().__init__()
        if tower.config.history < 2:
            raise ConfigError(f"user_tower.history = {tower.config.history}: a ranker needs 2, an event and a token")
        self.tower, self.fusion, self.factors = tower, fusion, factors
        hidden = tower.hidden
        width = hidden if tower.item_dim is None else tower.item_dim
        # [USER] itself, or what marks the candidate among the events
        self.token = nn.Parameter(torch.randn(hidden) * 0.02)
        if fusion == "late":
            self.user_head = nn.Linear(hidden, factors)
            self.item_head = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, factors + 1)
            )
        else:
            self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))

    @property
    def context_length(self) -> int:
        """Events that are read: the token has the newest place of the tower's history."""
        return self.tower.config.history - 1

    def item_factors(self, catalog: Catalog, rows: Tensor | None = None) -> Tensor:
        """``late``: what a candidate brings to the product, its bias last; float32 [N, F + 1], or of ``rows``. Once
        for each snapshot."""
        vectors = self.tower.item_vectors(catalog, rows)
        return self.item_head(vectors).float()

    def user_factors(self, catalog: Catalog, context: Batch) -> Tensor:
        """``late``: what a context brings to the product, a 1 for the item's bias last; float32 [B, F + 1]. Once for
        each user, whatever the candidates."""
        return self._late(catalog, context)[0]

    def forward(self, catalog: Catalog, batch: CandidateBatch) -> tuple[Tensor, Tensor]:
        """Logits float32 [P], and what was read of the contexts' own events [B, T, H], which knows nothing of the
        candidates: the tower is causal."""
        device = self.token.device
        owners, candidates = torch.from_numpy(batch.owners).to(device), torch.from_numpy(batch.candidates).to(device)
        if self.fusion == "late":
            users_BF, read_BTH = self._late(catalog, batch.context)
            return (users_BF[owners] * self.item_factors(catalog, candidates)).sum(-1), read_BTH
        context = Batch(*(array[batch.owners] for array in batch.context))
        tokens_PH = self.tower.inputs(catalog, candidates) + self.token
        read_PTH, at_PH = self._read(catalog, context, tokens_PH)
        logits = self.head(at_PH).float().squeeze(-1)
        return logits, read_PTH[torch.from_numpy(batch.first).to(device)]

    def _late(self, catalog: Catalog, context: Batch) -> tuple[Tensor, Tensor]:
        read_BTH, at_BH = self._read(catalog, context, self.token.expand(len(context.lengths), -1))
        users_BF = self.user_head(at_BH).float()
        return torch.cat([users_BF, users_BF.new_ones(len(users_BF), 1)], dim=-1), read_BTH

    def _read(self, catalog: Catalog, context: Batch, tokens_BH: Tensor) -> tuple[Tensor, Tensor]:
        """The tower over events and one token after them: [B, T, H] at the events, [B, H] at the token.

        The token takes the time of the newest event: that of the question is not known when users' vectors are made.
        """
        device = self.token.device
        items, lengths, _, times = (torch.from_numpy(array).to(device) for array in context)
        at_BT = torch.arange(items.shape[1] + 1, device=device) == lengths[:, None]
        newest = times.gather(1, (lengths - 1).clamp(min=0)[:, None])
        x_BTH = F.pad(self.tower.inputs(catalog, items), (0, 0, 0, 1))
        x_BTH = torch.where(at_BT[..., None], tokens_BH[:, None].to(x_BTH.dtype), x_BTH)
        read_BTH = self.tower.read(x_BTH, lengths + 1, torch.where(at_BT, newest, F.pad(times, (0, 1))))
        return read_BTH[:, :-1], read_BTH[torch.arange(len(lengths), device=device), lengths]

    def fingerprint(self) -> str:
        """Hash of tower, head and fusion; 32 hexadecimal characters."""
        digest = Digest().add(self.tower.fingerprint()).add(self.fusion)
        for name, tensor in sorted(self._own().items()):
            digest.add(name).add(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _own(self) -> dict[str, Tensor]:
        """The weights beside the tower's, on the CPU."""
        state = self.state_dict().items()
        return {name: tensor.contiguous().cpu() for name, tensor in state if not name.startswith("tower.")}

    def save(self, folder: Path) -> None:
        """Write the ranker with its tower into an existing folder."""
        self.tower.save(folder)
        save_file(self._own(), folder / "ranker.safetensors")
        (folder / "ranker.json").write_text(json.dumps({"fusion": self.fusion, "factors": self.factors}))

    @classmethod
    def load(cls, folder: Path) -> Ranker:
        """A ranker written by ``save``. Raises StoreError when a file is missing or damaged."""
        tower = UserTower.load(folder)
        try:
            settings = json.loads((folder / "ranker.json").read_text())
            ranker = cls(tower, settings["fusion"], settings["factors"])
            own = load_file(folder / "ranker.safetensors")
            ranker.load_state_dict(own | {f"tower.{name}": value for name, value in tower.state_dict().items()})
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise StoreError(f"ranker {folder} cannot be read: {error}; train it again") from error
        return ranker.eval()


class RankingStep(nn.Module):
    """Contexts with labelled candidates to the loss; a ``step`` of ``user_tower.train.fit``."""

    def __init__(
        self,
        ranker: Ranker,
        catalog: Catalog,
        sampler: NegativeSampler,
        next_item_weight: float,
        config: TrainConfig | None = None,
    ) -> None:
        super().__init__()
        if config is not None:
            use_settings(ranker.tower, config)
        self.ranker = ranker
        self.open_catalog = catalog
        self.sampler = sampler
        self.next_item_weight = next_item_weight

    def forward(self, batch: CandidateBatch, own: CandidateBatch, seed: int) -> Tensor:
        """BCE of this process's labels + lambda x InfoNCE of its positions (paper, section 3.3); a scalar.

        Both are means over what they are of; the loop weighs the sum by labels, so a process's InfoNCE is weighed by
        its positions against that: over all processes it is the mean over all positions.
        """
        catalog = self.open_catalog
        device = catalog.groups.device
        logits, read_BTH = self.ranker(catalog, own)
        loss = click_loss(logits, torch.from_numpy(own.labels).to(device))
        wanted = batch.context.targets[batch.context.targets >= 0]
        if not self.next_item_weight or not len(wanted):
            return loss
        targets = torch.from_numpy(own.context.targets).to(device)
        queries_PD = self.ranker.tower.project(read_BTH[targets >= 0])
        negatives = self.sampler.draw(torch.from_numpy(wanted).to(device), seed)
        next_item = query_loss(self.ranker.tower, catalog, queries_PD, targets[targets >= 0], negatives)
        share = own.context.positions / batch.context.positions
        return loss + self.next_item_weight * next_item * share * batch.positions / max(1, own.positions)


def click_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy, in nats, of the labels that are 0 or 1; logits float32 [P], labels int64 [P]."""
    real = labels >= 0
    total = F.binary_cross_entropy_with_logits(logits[real], labels[real].float(), reduction="sum")
    return total / max(1, int(real.sum()))


class CandidateScorer:
    """A ranker over an open catalog, for inference. ``late``: the items' factors are made once, here."""

    def __init__(self, ranker: Ranker, catalog: Catalog) -> None:
        self.ranker, self.catalog = ranker.eval(), catalog
        with torch.inference_mode():
            self.items = ranker.item_factors(catalog) if ranker.fusion == "late" else None

    @torch.inference_mode()
    def logits(self, batch: CandidateBatch) -> Tensor:
        """float32 [P]. ``late``: one pass of the tower for the contexts, then a product for each candidate."""
        if self.items is None:
            logits: Tensor = self.ranker(self.catalog, batch)[0]
            return logits
        users_BF = self.ranker.user_factors(self.catalog, batch.context)
        device = users_BF.device
        if len(users_BF) == 1:  # one user's candidates: a matrix product
            return (users_BF @ self.items[torch.from_numpy(batch.candidates).to(device)].T)[0]
        owners, candidates = torch.from_numpy(batch.owners).to(device), torch.from_numpy(batch.candidates).to(device)
        return (users_BF[owners] * self.items[candidates]).sum(-1)

    def score(self, examples: Examples, contexts: int, most: int) -> NDArray[np.float64]:
        """float64 [P] logits, so many contexts at once; most: candidates that one pass of ``early`` reads after a
        context. ``late`` reads each context once, however many candidates it has."""
        found = np.zeros(len(examples))
        every = max(1, len(examples)) if self.items is not None else most
        for batch in candidate_batches(examples, self.ranker.context_length, contexts, every):
            found[batch.examples] = self.logits(batch).double().cpu().numpy()
        return found
