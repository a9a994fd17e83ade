"""ViT: a transformer over image patches with a class token (Dosovitskiy et al. 2021, arXiv:2010.11929).

h = [cls; patches E] + positions;   h = h + attention(norm(h));   h = h + mlp(norm(h));   logits from norm(h)[0]

    model, params = load_pretrained("google/vit-base-patch16-224")
    model.apply(params, {"pixel_values": pixels}).logits
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from ftjax.errors import ConfigError
from ftjax.models.base import FamilyConfig, Model, Output
from ftjax.models.heads import ScoreHead
from ftjax.models.hfconfig import HFConfig
from ftjax.models.layers import ACTIVATIONS, KV, LayerNorm, Linear, Seq, attend, run_stack
from ftjax.models.vision import Conv, to_nhwc
from ftjax.params import ParamSpec, Store, Table, declare, leaf, nest, site, stack
from ftjax.registry import register


@dc.dataclass(frozen=True)
class ViTConfig(FamilyConfig):
    """The numbers of a ViT; names as in `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    image_size: int
    patch_size: int
    num_channels: int
    qkv_bias: bool
    initializer_range: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Reads `config.json`; every number that decides the function must be there."""
        c = HFConfig(config)
        read = cls(
            hidden_size=c.int("hidden_size"),
            intermediate_size=c.int("intermediate_size"),
            num_hidden_layers=c.int("num_hidden_layers"),
            num_attention_heads=c.int("num_attention_heads"),
            hidden_act=c.raw("hidden_act"),
            layer_norm_eps=c.float("layer_norm_eps"),
            image_size=c.int("image_size"),
            patch_size=c.int("patch_size"),
            num_channels=c.int("num_channels"),
            qkv_bias=c.bool("qkv_bias"),
            initializer_range=c.float("initializer_range", implied=0.02),
        )
        if read.hidden_act not in ACTIVATIONS:
            raise c.wrong("hidden_act", read.hidden_act, " or ".join(ACTIVATIONS))
        if read.hidden_size % read.num_attention_heads:
            raise c.wrong("num_attention_heads", read.num_attention_heads, f"a divisor of {read.hidden_size}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "pooler_output_size",
                     "pooler_act"):  # fmt: skip
            c.raw(name)  # of pre-training, and of a pooler that the classifier does not have
        c.finish()
        return read

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers opens."""
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return {"model_type": "vit", **dc.asdict(self), **dropout}

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ViTEntrance(nn.Module):
    """pixels [B, H, W, C] -> h [B, T, D], the class token first; the site "input" where soft prompts enter."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> Seq:
        c, dtype = self.config, x.dtype
        B, D = x.shape[0], c.hidden_size

        def own(name: str, tokens: int, hf: str) -> jax.Array:
            spec = ParamSpec((1, tokens, D), (None, None, "embed"), "embed", std=c.initializer_range, hf=hf)
            return leaf(self, name, spec).astype(dtype)

        names = "vit.embeddings.patch_embeddings.projection"
        h = Conv(D, c.patch_size, names, c.patch_size, use_bias=True, std=c.initializer_range, name="patches")(x)
        cls = own("cls", 1, "vit.embeddings.cls_token")
        h = jnp.concatenate([jnp.broadcast_to(cls, (B, 1, D)), h.reshape(B, -1, D)], axis=1)
        h = h + own("positions", c.tokens, "vit.embeddings.position_embeddings")
        at = jnp.broadcast_to(jnp.arange(c.tokens, dtype=jnp.int32), (B, c.tokens))
        seq = Seq(h, at, jnp.zeros_like(at), jnp.full_like(at, jnp.iinfo(jnp.int32).max // 2))
        return _Input(D, name="input")(seq)


class _Input(nn.Module):
    """Declares the site where soft prompts enter."""

    dim: int

    @nn.compact
    def __call__(self, seq: Seq) -> Seq:
        return site(self, "tap", seq, None, ParamSpec((self.dim,), ("embed",), "site"))


class ViTBlock(nn.Module):
    """One layer, norms first. Sites: attn_kv (keys and values), attn_out, mlp_out, residual."""

    config: ViTConfig

    @nn.compact
    def __call__(self, h: jax.Array, seq: Seq) -> jax.Array:
        c = self.config
        spec = ParamSpec((c.hidden_size,), ("embed",), "site")
        a = self.attention(LayerNorm(c.layer_norm_eps, f"{_LAYER}.layernorm_before", name="ln1")(h), seq)
        h = h + site(self, "attn_out", a, seq, spec, residual=h)
        x = LayerNorm(c.layer_norm_eps, f"{_LAYER}.layernorm_after", name="ln2")(h)
        x = self.linear(c.intermediate_size, ("embed", "mlp"), "up", "intermediate.dense")(x)
        y = self.linear(c.hidden_size, ("mlp", "embed"), "down", "output.dense")(ACTIVATIONS[c.hidden_act](x))
        h = h + site(self, "mlp_out", y, seq, spec, residual=h)
        return site(self, "residual", h, seq, spec)

    def linear(self, out: int, axes: tuple[str, str], name: str, hf: str, *, bias: bool = True) -> Linear:
        """A projection of this block."""
        return Linear(out, axes, f"{_LAYER}.{hf}", bias, self.config.initializer_range, name=name)

    def attention(self, x: jax.Array, seq: Seq) -> jax.Array:
        """Self-attention of all patches [B, T, D]."""
        c = self.config
        N = c.num_attention_heads
        H = c.hidden_size // N

        def project(name: str, hf: str, axis: str) -> jax.Array:
            make = self.linear(N * H, ("embed", axis), name, f"attention.attention.{hf}", bias=c.qkv_bias)
            return make(x).reshape(*x.shape[:2], N, H)

        q, k, v = project("q", "query", "heads"), project("k", "key", "kv"), project("v", "value", "kv")
        kv = KV(k, v, seq.positions, seq.segments)
        kv = site(self, "attn_kv", kv, seq, ParamSpec((N, H), ("kv", "head"), "site"), hidden=x)
        a = attend(q, kv, seq, scale=H**-0.5, causal=False)
        return self.linear(c.hidden_size, ("heads", "embed"), "o", "attention.output.dense")(a)


_LAYER = "vit.encoder.layer.{}"


@register("family", "vit")
@dc.dataclass(frozen=True)
class ViT(Model):
    """ViT for image classification."""

    family: ClassVar[str] = "vit"
    Config: ClassVar[type[FamilyConfig]] = ViTConfig
    heads: ClassVar[dict[str, str]] = {"image_classification": "ViTForImageClassification"}
    prefix: ClassVar[str] = "vit."
    # The pooler of a bare ViTModel, and the mask token of pre-training: the classifier reads the class token itself.
    buffers: ClassVar[tuple[str, ...]] = ("vit.pooler.*", "vit.embeddings.mask_token")

    @property
    def norm(self) -> nn.Module:
        """The norm before the head."""
        return LayerNorm(self.config.layer_norm_eps, "vit.layernorm")

    @property
    def head_module(self) -> nn.Module:
        """One output per label, from the class token."""
        return ScoreHead(len(self.head.labels), "classifier", self.config.initializer_range)

    @cached_property
    def table(self) -> Table:
        """Every parameter and site, by path."""
        c = self.config
        pixels: Any = jax.ShapeDtypeStruct((1, c.image_size, c.image_size, c.num_channels), self.dtype)
        h: Any = jax.ShapeDtypeStruct((1, c.tokens, c.hidden_size), self.dtype)
        flat: Any = jax.ShapeDtypeStruct((1, c.tokens), jnp.int32)
        return {
            **declare(ViTEntrance(c), pixels),
            **stack(declare(ViTBlock(c), h, Seq(None, flat, flat, flat)), c.num_hidden_layers),
            **{f"norm/{k}": s for k, s in declare(self.norm, h).items()},
            **declare(self.head_module, h, None, None),
        }

    def apply(
        self, params: Store, inputs: dict[str, jax.Array], *, cache: Any = None, first: bool = True, train: bool = False
    ) -> Output:
        """The class token's last values [B, D] and the head.

        Args:
          params: store keyed as `table`, adapters and taps in place.
          inputs: "pixel_values" [B, C, image_size, image_size].
          cache: no use here.
          first: no use here.
          train: of no consequence: there are no running statistics.

        Raises:
          ConfigError: the images have another size than the positions are for.
        """
        c, p = self.config, nest(params)
        x = to_nhwc(jnp.asarray(inputs["pixel_values"]), c.num_channels)
        if x.shape[1:3] != (c.image_size, c.image_size):
            raise ConfigError(f"images of {x.shape[1]} x {x.shape[2]}; the model takes {c.image_size} x {c.image_size}")
        entered: Any = ViTEntrance(c).apply({"params": {"input": {}} | p}, x.astype(self.dtype))
        block, rest = ViTBlock(c), dc.replace(entered, h=None)

        def body(layer_params: dict, h: jax.Array, layer: Any, cache: Any) -> tuple[jax.Array, Any]:
            out: Any = block.apply({"params": layer_params}, h, rest)
            return out, cache

        n = self.numerics
        h, _ = run_stack(body, p["layers"], entered.h, None, unroll=n.layers == "unroll", remat=n.remat)
        h = h[:, -c.tokens]  # the class token; whatever a soft prompt put in front stands before it
        h = self.norm.apply({"params": p["norm"]}, h)
        made: Any = self.head_module.apply({"params": p}, h, None, None)
        hidden, head = made
        return Output(hidden, head)
