"""Reading `config.json` by allow-list: what decides the function must be present, understood and of the right type."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from typing import Any

from ftjax.errors import DataError

_HARMLESS = {
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "dtype", "model_type", "torch_dtype",
    "transformers_version", "use_cache", "pretraining_tp", "id2label", "label2id", "num_labels", "_num_labels", "problem_type",
    "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "is_decoder", "torchscript",
    "chunk_size_feed_forward", "add_cross_attention", "tie_encoder_decoder", "finetuning_task", "task_specific_params",
    "tokenizer_class", "prefix", "sep_token_id", "cross_attention_hidden_size", "tf_legacy_loss", "pruned_heads",
    "_attn_implementation_autoset", "unsloth_version", "unsloth_fixed", "gradient_checkpointing", "cache_implementation",
}  # fmt: skip


class HFConfig:
    """A `config.json` that remembers what was read, so that nothing in it is ignored unseen.

    Raises (from its methods):
      DataError: a number that decides the function is missing, of the wrong type, or unknown to ftjax.
    """

    def __init__(self, config: dict[str, Any]):
        self._config = config
        self._read: set[str] = set()

    def raw(self, name: str) -> Any:
        """The value as it stands, or None."""
        self._read.add(name)
        return self._config.get(name)

    def said(self, name: str) -> Any:
        """The value, which may be null but must be there: where it is absent, transformers puts a number of its own.

        Raises:
          DataError: the file does not say.
        """
        if name not in self._config:
            raise self.missing(name)
        return self.raw(name)

    def missing(self, name: str) -> DataError:
        """The error for a number that must be there."""
        return DataError(
            f"config.json: {name!r} is missing; it decides what the model computes and has no safe default"
        )

    def wrong(self, name: str, value: Any, allowed: str) -> DataError:
        """The error for a value that cannot be used."""
        return DataError(f"config.json: {name}={value!r} is not supported; expected {allowed}")

    def _typed(self, name: str, kind: type | tuple[type, ...], what: str, implied: Any) -> Any:
        value = self.raw(name)
        if value is None:
            if implied is None:
                raise self.missing(name)
            return implied
        if not isinstance(value, kind) or (isinstance(value, builtins.bool) and kind is not builtins.bool):
            raise self.wrong(name, value, what)
        return value

    def int(self, name: str, *, implied: int | None = None) -> builtins.int:
        """An integer; `implied` is what the format itself defines for an absent value."""
        return self._typed(name, builtins.int, "an integer", implied)

    def float(self, name: str, *, implied: float | None = None) -> builtins.float:
        """A number."""
        return builtins.float(self._typed(name, (builtins.int, builtins.float), "a number", implied))

    def bool(self, name: str, *, implied: bool | None = None) -> builtins.bool:
        """true or false."""
        return self._typed(name, builtins.bool, "true or false", implied)

    def choice(self, name: str, allowed: Iterable[str]) -> str:
        """One of the values that are implemented."""
        value = self.raw(name)
        if value is None:
            raise self.missing(name)
        if value not in (names := list(allowed)):
            raise self.wrong(name, value, f"one of {', '.join(names)}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty when absent or null."""
        return self._typed(name, dict, "an object", {})

    def token(self, name: str) -> builtins.int | None:
        """A token id or None; of a list the first."""
        ids = self.tokens(name)
        return ids[0] if ids else None

    def tokens(self, name: str) -> tuple[builtins.int, ...]:
        """Token ids: one, several or none."""
        value = self.raw(name)
        return () if value is None else tuple(value) if isinstance(value, list) else (value,)

    def require(self, name: str, expected: Any, *, absent_ok: builtins.bool = False) -> None:
        """Refuses any other value than the one that is implemented."""
        value = self.raw(name)
        if value is None and absent_ok:
            return
        if value != expected:
            raise self.wrong(name, value, repr(expected))

    def finish(self) -> None:
        """Refuses settings that nobody read: they might change the function."""
        unknown = sorted(set(self._config) - self._read - _HARMLESS)
        unknown = [k for k in unknown if self._config[k] not in (None, False, [], {})]
        if unknown:
            raise DataError(f"config.json: unknown settings of this model: {', '.join(unknown)}")
