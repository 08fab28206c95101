"""The empirical Fisher matrix: the second moment of the gradients of single targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trace_offline.estimators.ggn import OutputCurvature


class EmpiricalFisherOperator(OutputCurvature):
    """``F = (1/N) Σ_t g_t g_tᵀ`` with ``g_t = ∂ℓ_t/∂θ``, the gradient of the cross-entropy of ONE target.

    Per target, not per sequence: in a language model every token is an observation, and the loss is a mean over them.
    With ``g_t = J_tᵀ (p_t − y_t)`` it has the form of the base class, ``S_t = (p_t − y_t)(p_t − y_t)ᵀ``, so that no
    gradient of a single target is ever formed. It is not the Fisher information: the labels are the data's, not the
    model's, and away from a well-specified optimum the two differ (Kunstner, Balles & Hennig, NeurIPS 2019, arXiv
    1905.12558). Its trace is the mean squared norm of the gradients of single targets.
    """

    def inner(self, logits: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """``(p − y) (p − y)ᵀ d``."""
        score = logits.softmax(-1) - functional.one_hot(targets, logits.shape[-1]).to(logits.dtype)
        return score * torch.linalg.vecdot(score, directions).unsqueeze(-1)
