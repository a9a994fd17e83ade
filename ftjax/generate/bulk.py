"""Many answers, batch by batch: what a whole data set of prompts is answered with.

    found = answer_all(model, params, tokenizer, prompts, Sampling(max_new_tokens=128), samples=1, batch=32)
    found[0]                                   # [Answer(text=" 4", tokens=2, ended=True)]

Prompts of like length go together, so that little is padded. An answer depends on its prompt and the sampling alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.generate.api import completion, continued, generate_ids
from ftjax.generate.decode import Speaker
from ftjax.generate.sampling import Sampling
from ftjax.params import Store


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
      text: without special tokens.
      tokens: how many are new, the one that ended it not counted.
      ended: the model ended it; otherwise it is as long as it was allowed to be.
    """

    text: str
    tokens: int
    ended: bool


def answer_all(
    model: Speaker,
    params: Store,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    samples: int,
    batch: int,
) -> list[list[Answer]]:
    """Answers to every prompt, in their order.

    Args:
      model: a decoder, or an encoder with one.
      params: its weights.
      tokenizer: of transformers.
      prompts: token ids, each at least one.
      sampling: how to choose.
      samples: answers to each prompt, drawn independently.
      batch: rows that are decoded together.

    Returns:
      `samples` answers for each prompt; none where it leaves no room in the model's context.
    """
    size = model.context
    room = [sampling.max_new_tokens if size is None else min(sampling.max_new_tokens, size - len(p)) for p in prompts]
    order = [int(i) for i in np.argsort([len(p) for p in prompts], kind="stable") if room[i] > 0]
    out: list[list[Answer]] = [[] for _ in prompts]
    step = max(1, batch // samples)
    for start in range(0, len(order), step):
        chosen = [i for i in order[start : start + step] for _ in range(samples)]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # of answers that the context cuts short: they are told by `ended`
            ids = generate_ids(model, params, tokenizer, [prompts[i] for i in chosen], sampling)
        for i, said in zip(chosen, ids, strict=True):
            text = completion(tokenizer, continued(model, prompts[i]), said, sampling.stop)
            out[i].append(Answer(text, len(said), len(said) < room[i]))
    return out
