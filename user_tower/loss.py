"""InfoNCE over sampled negatives or the whole catalog, in chunks of positions.

Shapes: P positions with a target, S positions of one chunk, M negatives, D vector width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits of one chunk, in elements: small enough for a CPU's cache, enough rows for products at full speed. Two
# buffers of that size exist at once, in bfloat16 three
CHUNK_ELEMENTS = 1 << 21


class _SameGroup:
    """Which negatives are of each position's group. They are few: their places cost less than a mask [S, M]."""

    def __init__(self, positive_groups: Tensor, negative_groups: Tensor) -> None:
        groups, self.order = negative_groups.sort()
        self.first = torch.searchsorted(groups, positive_groups)
        self.counts = torch.searchsorted(groups, positive_groups, right=True) - self.first

    def mask(self, logits_SM: Tensor, part: slice) -> None:
        """Set their logits to minus infinity, for the positions of one chunk."""
        first_S, counts_S = self.first[part], self.counts[part]
        rows = torch.repeat_interleave(counts_S)
        before_S = counts_S.cumsum(0) - counts_S
        numbers = torch.arange(len(rows), device=rows.device) + (first_S - before_S)[rows]
        logits_SM[rows, self.order[numbers]] = -torch.inf


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b; a product in bfloat16 is rounded to it before."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, likewise."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b


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
        same = _SameGroup(positive_groups, negative_groups)
        # one buffer for all chunks: memory fresh from the system costs more than the product that fills it
        buffer = queries_PD.new_empty(min(size, count), len(negatives_MD) + 1)
        for start in range(0, len(queries_PD), size):
            part = slice(start, start + size)
            queries_SD, positives_SD = queries_PD[part], positives_PD[part]
            queries_low = queries_SD.to(low)
            cosines_S = (queries_SD * positives_SD).sum(-1)
            logits = buffer[: len(queries_SD)]
            against = logits[:, :-1]
            _product_into(against, queries_low, negatives_low.T)
            if near is not None:
                against.masked_fill_(positives_SD @ negatives_MD.T > near, -torch.inf)
            same.mask(against, part)
            logits[:, -1] = cosines_S
            logits *= scale
            if negative_log_q is not None:
                assert positive_log_q is not None
                against -= negative_log_q
                logits[:, -1] -= positive_log_q[part]
            own_S = logits[:, -1].clone()
            largest_S1 = logits.amax(-1, keepdim=True)
            powers = logits.sub_(largest_S1).exp_()  # in place: a second buffer would push the first out of the cache
            sum_S1 = powers.sum(-1, keepdim=True)  # at least 1
            total += (largest_S1[:, 0] + sum_S1[:, 0].log() - own_S).sum()
            pull_S1 = powers[:, -1:] / sum_S1 - 1
            powers_low = powers[:, :-1].to(low)
            mean_negative_SD = (powers_low @ negatives_low).to(queries_SD.dtype) / sum_S1
            d_queries[part] = mean_negative_SD + pull_S1 * positives_SD
            d_positives[part] = pull_S1 * queries_SD
            if ctx.needs_input_grad[2]:  # cached vectors are constants
                _add_product(d_negatives, powers_low.T, (queries_SD / sum_S1).to(low))
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
