"""InfoNCE over sampled negatives or the whole catalog, in chunks of positions.

Shapes: P positions with a target, S positions of one chunk, M negatives, D vector width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits of one chunk, in elements; a few buffers of that size in float32 and bfloat16 exist at once
CHUNK_ELEMENTS = 1 << 20


class _InfoNCE(torch.autograd.Function):
    """The mean loss; its gradients are taken in the forward pass, chunk by chunk, from the same logits.

    So [P, M] never exists whole, nothing is computed twice, and what is kept is [P, D] and [M, D].
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries_PD: Tensor,
        positives_PD: Tensor,
        negatives_MD: Tensor,
        positive_groups: Tensor,
        negative_groups: Tensor,
        scale: Tensor,
        positive_log_q: Tensor | None,
        negative_log_q: Tensor | None,
        near: float | None,
    ) -> Tensor:
        device = queries_PD.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        count = max(1, len(queries_PD))
        size = max(1, CHUNK_ELEMENTS // max(1, len(negatives_MD)))
        negatives_low = negatives_MD.to(low)
        d_queries, d_positives = torch.zeros_like(queries_PD), torch.zeros_like(positives_PD)
        d_negatives = torch.zeros_like(negatives_MD)
        total, d_scale = queries_PD.new_zeros(()), queries_PD.new_zeros(())
        for start in range(0, len(queries_PD), size):
            part = slice(start, start + size)
            queries_SD, positives_SD = queries_PD[part], positives_PD[part]
            queries_low = queries_SD.to(low)
            cosines_S = (queries_SD * positives_SD).sum(-1)
            logits = queries_SD.new_empty(len(queries_SD), len(negatives_MD) + 1)
            logits[:, :-1] = queries_low @ negatives_low.T
            same = positive_groups[part, None] == negative_groups
            if near is not None:
                same |= positives_SD @ negatives_MD.T > near
            logits[:, :-1].masked_fill_(same, -torch.inf)
            logits[:, -1] = cosines_S
            logits *= scale
            if negative_log_q is not None:
                assert positive_log_q is not None
                logits[:, :-1] -= negative_log_q
                logits[:, -1] -= positive_log_q[part]
            weights = logits.softmax(-1)
            # the largest weight is at least 1 / (M + 1): its logarithm is safe where the positive's may underflow
            normaliser_S = logits.amax(-1) - weights.amax(-1).log()
            total += (normaliser_S - logits[:, -1]).sum()
            pull_S1 = weights[:, -1:] - 1
            weights_low = weights[:, :-1].to(low)
            mean_negative_SD = (weights_low @ negatives_low).to(queries_SD.dtype)
            d_queries[part] = mean_negative_SD + pull_S1 * positives_SD
            d_positives[part] = pull_S1 * queries_SD
            if ctx.needs_input_grad[2]:  # cached vectors are constants
                d_negatives += weights_low.T @ queries_low
            d_scale += (queries_SD * mean_negative_SD).sum() + (pull_S1[:, 0] * cosines_S).sum()
        ctx.save_for_backward(d_queries, d_positives, d_negatives, d_scale, scale)
        ctx.count = count
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_queries, d_positives, d_negatives, d_scale, scale = ctx.saved_tensors
        mean = upstream / ctx.count
        share = mean * scale
        towards = (d_queries * share, d_positives * share, d_negatives * share)
        return *towards, None, None, d_scale * mean, None, None, None


def info_nce(
    queries_PD: Tensor,
    positives_PD: Tensor,
    negatives_MD: Tensor,
    positive_groups: Tensor,
    negative_groups: Tensor,
    scale: Tensor,
    positive_log_q: Tensor | None = None,
    negative_log_q: Tensor | None = None,
    near: float | None = None,
) -> Tensor:
    """Mean over positions of -log softmax of the positive among itself and the negatives (paper, eq. 1).

    queries_PD, positives_PD, negatives_MD: float32; positives: the target's vector of each position;
    positive_groups [P], negative_groups [M]: a negative of the positive's group (the same text, or the target
    itself) is masked; scale: a scalar, the factor of the logits. With the whole catalog as negatives this is the
    full softmax. log_q [P] and [M]: the logarithm of the probability with which an item is among the candidates,
    taken off its logit, the positive's alike (sampled softmax, Bengio and Senecal 2008); then the sampled loss has
    the optimum of the full one. Both or neither are given. near: for L2-normalised vectors, a negative whose cosine
    with the positive is above it is masked too (the official code's ``nce_thres``). Under autocast the three large
    products run in its dtype.
    """
    loss: Tensor = _InfoNCE.apply(
        queries_PD,
        positives_PD,
        negatives_MD,
        positive_groups,
        negative_groups,
        scale,
        positive_log_q,
        negative_log_q,
        near,
    )
    return loss


@torch.no_grad()
def share_apart(vectors_MD: Tensor, near: float) -> float:
    """Share of the pairs of different rows whose cosine is at most ``near``; 1.0 for fewer than two rows.

    vectors_MD: L2-normalised. What is left of the negatives once ``near`` has masked its part.
    """
    count = len(vectors_MD)
    if count < 2:
        return 1.0
    close = 0
    for start in range(0, count, max(1, CHUNK_ELEMENTS // count)):
        part = vectors_MD[start : start + max(1, CHUNK_ELEMENTS // count)]
        close += int((part @ vectors_MD.T > near).sum())
    return 1.0 - max(0, close - count) / (count * (count - 1))
