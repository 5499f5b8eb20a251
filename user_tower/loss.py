"""InfoNCE over sampled negatives or the whole catalog, in chunks of positions.

Shapes: P positions with a target, M negatives, D vector width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# logits of one chunk, in elements: 64 Mi of bfloat16 and float32 copies stay under half a GiB
CHUNK_ELEMENTS = 1 << 26


def _chunk_loss(
    queries_PD: Tensor,
    positives_PD: Tensor,
    negatives_MD: Tensor,
    positive_groups: Tensor,
    negative_groups: Tensor,
    scale: Tensor,
) -> Tensor:
    positive_P = (queries_PD * positives_PD).sum(-1) * scale
    logits_PM = (queries_PD @ negatives_MD.T).float() * scale
    same = positive_groups[:, None] == negative_groups[None, :]
    logits_PM = logits_PM.masked_fill(same, float("-inf"))
    total_P = torch.logaddexp(positive_P, torch.logsumexp(logits_PM, dim=-1))
    return (total_P - positive_P).sum()


def info_nce(
    queries_PD: Tensor,
    positives_PD: Tensor,
    negatives_MD: Tensor,
    positive_groups: Tensor,
    negative_groups: Tensor,
    scale: Tensor,
) -> Tensor:
    """Mean over positions of -log softmax of the positive among itself and the negatives (paper, eq. 1).

    positives_PD: the target's vector of each position; positive_groups [P], negative_groups [M]: a negative
    of the positive's group (the same text, or the target itself) is masked. With the whole catalog as
    negatives this is the full softmax. [P, M] never exists whole: chunks are recomputed on the way back.
    """
    size = max(1, CHUNK_ELEMENTS // max(1, len(negatives_MD)))
    total = queries_PD.new_zeros(())
    for start in range(0, len(queries_PD), size):
        part = slice(start, start + size)
        arguments = (
            queries_PD[part],
            positives_PD[part],
            negatives_MD,
            positive_groups[part],
            negative_groups,
            scale,
        )
        if len(queries_PD) <= size:
            total = total + _chunk_loss(*arguments)
        else:
            total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False)
    return total / max(1, len(queries_PD))
