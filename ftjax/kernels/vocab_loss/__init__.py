"""Cross entropy over the vocabulary without holding all logits.

    nll_t = logsumexp(z_t) - z_t[y_t],   z_t = head(h_t);   with label smoothing e:  (1 - e) nll_t + e (lse_t - mean z_t)

Logits exist for one chunk of tokens at a time. When the head is frozen, the gradient with respect to the hidden values is
formed in the forward pass, chunk by chunk (each row is linear in its cotangent), so nothing is recomputed and no gradient
of the head is formed (the idea of Liger kernels, arXiv:2410.10989). When the head is trained, the backward pass computes
the logits again. With `lse=True` the logsumexp of each token is given too, with its own gradient, e.g. for a z-loss.

    out = token_nll(head, hidden, targets, chunk=1024)
    loss = (out.nll * weights).sum() / weights.sum()
"""

from ftjax.kernels.vocab_loss.chunked import TokenNll, token_nll
from ftjax.kernels.vocab_loss.pair import over_pairs
from ftjax.kernels.vocab_loss.single import over_tokens

__all__ = ["TokenNll", "over_pairs", "over_tokens", "token_nll"]
