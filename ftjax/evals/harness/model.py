"""A model of ours for lm-evaluation-harness: log-likelihoods, perplexities and answers by our own code.

    lm = HarnessModel(model, params, tokenizer, batch=8)
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])["results"]

Texts become tokens, and tokens texts, as its Hugging Face backend does it (lm-eval 0.4.13): a context that is too long
loses its beginning, an answer is decoded apart from its prompt, and it ends before the first stop text.
"""

# The harness is an extra, which need not be there when types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses as dc
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ftjax.errors import ConfigError, DataError
from ftjax.evals.likelihood import likelihoods, room_of
from ftjax.generate.api import generate_ids
from ftjax.generate.sampling import Sampling
from ftjax.params import Store

MAX_GEN_TOKS = 256  # where a task does not say; the harness' own number
# What transformers calls by another name, or what changes nothing at this value.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True, False), "num_beams": (1,), "repetition_penalty": (1, 1.0), "use_cache": (True,),
    "num_return_sequences": (1,), "top_k": (None,), "top_p": (None,), "min_p": (None,),
}  # fmt: skip
SAMPLED = ("temperature", "top_k", "top_p", "min_p")


class HarnessModel(TemplateLM):
    """One of our language models behind the harness' interface.

    Args:
      model: a decoder, or an encoder with one.
      params: its weights, adapters in place.
      tokenizer: of transformers.
      batch: rows per call.
      template: Jinja text of the chat template; empty: the tokenizer's own.
      seed: of sampled answers.
      label: what the model is called in the results.

    Raises:
      ConfigError: the model does not speak.
    """

    def __init__(
        self, model: Any, params: Store, tokenizer: Any, *, batch: int = 8, template: str = "", seed: int = 0,
        label: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        if model.head.kind not in ("causal_lm", "seq2seq_lm"):
            raise ConfigError(
                f"lm-evaluation-harness needs a language model; the head of this one is {model.head.kind}"
            )
        self.model, self.params, self.batch, self.seed = model, params, batch, seed
        self.tokenizer: Any = tokenizer
        self.template, self.label = template, label
        self.backend = "seq2seq" if model.reads_apart else "causal"
        self.max_length = room_of(model, params)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, else EOS.

        Raises:
          DataError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError("the tokenizer has neither BOS nor EOS, one of which stands before a text without context")

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness' caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        return {"model_source": "ftjax", "model_family": self.model.family, "model_label": self.label}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, but no second BOS."""
        if add_special_tokens is None:
            return self.tokenizer.encode(string, **self._specials(string))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _specials(self, string: str) -> dict[str, bool]:
        begins = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return {"add_special_tokens": False} if begins else {}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, chat_template=self.template or None,
            add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the harness' record of what was asked."""
        return self.template if chat_template and self.template else super().chat_template(chat_template)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, answer) for _, context, answer in requests]
        found = likelihoods(self.model, self.params, pairs, batch=self.batch, room=self.max_length)
        answers = [(one.logprob, one.greedy) for one in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows as long as the context, every token once."""
        windows: list[tuple[int, Any]] = []
        texts = [str(_args(request)[0]) for request in requests]
        for i, text in enumerate(texts):
            pieces = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(i, (None, *utils.make_disjoint_window(piece))) for piece in pieces]
        totals = [0.0] * len(texts)
        for (i, _), (value, _) in zip(windows, self._loglikelihood_tokens([w for _, w in windows]), strict=True):
            totals[i] += value
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to its stop texts.

        Raises:
          ConfigError: a task asks for what we do not have, such as beams, or for more tokens than the context holds.
        """
        out = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(_args(request)[1])].append(i)
        number = 0
        for members in groups.values():
            sampling, stops = self._sampling(_args(requests[members[0]])[1])
            prompts = {i: self._prompt(_args(requests[i])[0], sampling.max_new_tokens) for i in members}
            order = sorted(members, key=lambda i: -len(prompts[i]))
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                # Equal prompts in different batches are drawn anew.
                answers = self._answers([prompts[i] for i in chosen], sampling, seed=(self.seed + number) % 2**31)
                number += 1
                for i, answer in zip(chosen, answers, strict=True):
                    text = self.tokenizer.decode(answer, skip_special_tokens=True)
                    out[i] = postprocess_generated_text(text, stops, None)
                    self.cache_hook.add_partial("generate_until", _args(requests[i]), out[i])
        return out

    def _answers(self, prompts: Sequence[np.ndarray], sampling: Sampling, *, seed: int) -> list[list[int]]:
        """Token ids; the batch is filled up so that its shape is compiled once."""
        filled = [*prompts, *[prompts[-1]] * (self.batch - len(prompts))]
        wanted = dc.replace(sampling, seed=seed)
        return generate_ids(self.model, self.params, self.tokenizer, filled, wanted)[: len(prompts)]

    def _prompt(self, text: str, new: int) -> np.ndarray:
        limit = self.max_length - (0 if self.model.reads_apart else new)
        if limit < 1:
            raise ConfigError(
                f"{new} new tokens leave no room for a prompt in the model's context of {self.max_length}"
            )
        return np.asarray(self.tokenizer.encode(text, **self._specials(text))[-limit:], np.int32)

    def _sampling(self, asked: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """How to answer and where to stop, from a task's `generation_kwargs`."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked, MAX_GEN_TOKS))
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops = [s for s in handle_stop_sequences(kwargs.pop("until"), end) if s]
        numbers: dict[str, Any] = {k: kwargs.pop(k) for k in SAMPLED if kwargs.get(k) is not None}
        if not kwargs["do_sample"]:
            numbers = {}  # greedy, whatever else is said
        new = kwargs.pop("max_gen_toks")
        unknown = [f"{k}={v!r}  is not available" for k, v in kwargs.items() if v not in NEUTRAL.get(k, ())]
        if unknown:
            raise ConfigError("generation_kwargs of a task", unknown)
        return Sampling(**numbers, max_new_tokens=new, stop=tuple(stops)), stops


def _args(request: Instance) -> tuple[Any, ...]:
    """What a request asks: a context and a continuation, a text, or a context and how to answer."""
    return request.args
