"""Pictures with a class each: how they become model input, augmentation, batches.

    examples = ImageExamples.of(pictures, labels, names=("cat", "dog"), recipe=Recipe(mean=(0.5,), std=(0.5,), padding=4))
    examples.build([[0], [1]])                            # held-out: as they are
    examples.build([[0], [1]], key=(seed, step))          # training: cropped and flipped

Augmentation is a function of the picture, its index and the key (the seed with the step or the epoch), so that resuming
gives the same batches. So is mix-up, of the batch and the key: x = s x_i + (1 - s) x_j with the labels likewise,
s ~ Beta(a, a) for each pair, j by a random order of the batch (Zhang et al. 2018, arXiv:1710.09412).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float32, Int32

from ftjax.config import Loader
from ftjax.data.encode import Encoded, EncodeReport
from ftjax.data.formats import DatasetType, TypedRows, rename
from ftjax.data.labels import SINGLE, class_names, class_of
from ftjax.data.layouts import Layout, add_layout, identity
from ftjax.data.rows import BadRows, Row
from ftjax.errors import ConfigError, DataError, did_you_mean
from ftjax.safefiles import read_json


@struct.dataclass
class ImageBatch:
    """Images with a class each; leading axes are free: [B] or [accumulate, B].

    Attributes:
      pixels: normalised, channels first, as transformers' ``pixel_values``.
      labels: class of each.
      weights: of each row; 0 for rows that only fill the batch.
      others: class of the picture that each is mixed with; None where nothing is mixed.
      share: of the first of the two, in the pixels and in the target; 1 is the picture alone.
    """

    pixels: Float32[Any, "*b c h w"]
    labels: Int32[Any, "*b"]
    weights: Float32[Any, "*b"]
    others: Int32[Any, "*b"] | None = None
    share: Float32[Any, "*b"] | None = None


@dataclass(frozen=True)
class Recipe:
    """How a picture becomes model input.

    Attributes:
      mean, std: of each channel, or one number for all; subtracted and divided by after scaling to [0, 1]. Empty: not.
      padding: while training, black border on each side out of which the original size is cut at random; 0: none.
      flip: while training, every second picture is mirrored, at random.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    padding: int = 0
    flip: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels [C, H, W], uint8 or float32 in [0, 1], with their recipe. As text, the hash of its content."""

    pixels: np.ndarray
    recipe: Recipe = Recipe()

    def __str__(self) -> str:
        content = np.ascontiguousarray(self.pixels)
        return hashlib.sha256(f"{content.shape}{content.dtype}".encode() + content.tobytes()).hexdigest()


# One picture -----------------------------------------------------------------------------------------------------------


def unit(pixels: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]; uint8 is divided by 255."""
    return pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels.astype(np.float32)


def normalise(pixels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """(pixels - mean) / std, channel by channel: [..., C, H, W] in [0, 1]."""
    if not recipe.mean:
        return pixels
    mean, std = (np.asarray(x, np.float32).reshape(-1, 1, 1) for x in (recipe.mean, recipe.std))
    return (pixels - mean) / std


def augment(pixels: np.ndarray, recipe: Recipe, *, key: tuple[int, ...], index: int) -> np.ndarray:
    """A random cut out of the black-bordered picture [C, H, W], mirrored or not, decided by (key, index) alone.

    Drawn from the raw Philox stream, which numpy keeps stable over versions.
    """
    down, right, mirror = np.random.Philox(np.random.SeedSequence((*key, index))).random_raw(3).tolist()
    p = recipe.padding
    if p:
        H, W = pixels.shape[1:]
        y, x = down % (2 * p + 1), right % (2 * p + 1)
        pixels = np.pad(pixels, ((0, 0), (p, p), (p, p)))[:, y : y + H, x : x + W]
    return pixels[:, :, ::-1] if recipe.flip and mirror >> 63 else pixels


def mix(batch: ImageBatch, alpha: float, *, real: int, key: tuple[int, ...]) -> ImageBatch:
    """Mix-up of the first `real` rows among themselves, decided by the key alone."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((*key, 0x6D6978, 1))))
    partner, share = np.arange(len(batch.labels)), np.ones(len(batch.labels), np.float32)
    partner[:real], share[:real] = rng.permutation(real), rng.beta(alpha, alpha, real)
    own = share[:, None, None, None]
    pixels = own * batch.pixels + (1 - own) * batch.pixels[partner]
    return ImageBatch(pixels, batch.labels, batch.weights, batch.labels[partner], share)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of pictures [..., H, W] to [..., size, size], as torch's `interpolate` without aligned corners."""

    def weights(n: int) -> np.ndarray:
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.minimum(at.astype(np.int64), max(n - 2, 0))
        out = np.zeros((size, n), np.float32)
        out[np.arange(size), low] += 1 - (at - low)
        out[np.arange(size), np.minimum(low + 1, n - 1)] += at - low
        return out

    H, W = pixels.shape[-2:]
    return weights(H) @ pixels.astype(np.float32) @ weights(W).T


def normalisation_of(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that a model's folder asks for, from its ``preprocessor_config.json``; empty where it does not.

    Raises:
      DataError: there is no such file, or it asks for something else than scaling to [0, 1] and normalising.
    """
    path = Path(folder).expanduser() / "preprocessor_config.json"
    if not path.is_file():
        raise DataError(f"no {path}; give the mean and std of the pixels instead")
    config = read_json(path)
    factor = config.get("rescale_factor", 1 / 255)
    if not config.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise DataError(f"{path}: expected pixels scaled by 1/255, got rescale_factor={factor!r}")
    if not config.get("do_normalize", True):
        return (), ()
    mean, std = config.get("image_mean"), config.get("image_std")
    if not isinstance(mean, list) or not isinstance(std, list) or len(mean) != len(std):
        raise DataError(f"{path}: image_mean={mean!r} and image_std={std!r}, expected two lists of one length")
    return tuple(map(float, mean)), tuple(map(float, std))


# Many of them ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageExamples:
    """Pictures of one size with their classes.

    Attributes:
      images: [examples, C, H, W], uint8 or float32 in [0, 1].
      labels: int32 [examples].
      rows: index of the source row of each, [examples].
      names: of the classes.
      origins: place of each source row.
      mean, std, padding, flip: see `Recipe`.
      mixup: a of the mix-up of batches; 0: none.
      soft: whether batches have `others` and `share`, mixed or not: held-out ones are shaped as the training ones.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    names: tuple[str, ...]
    origins: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    padding: int = 0
    flip: bool = False
    mixup: float = 0.0
    soft: bool = False

    @classmethod
    def of(
        cls, images: np.ndarray, labels: Sequence[int] | np.ndarray, *, names: Sequence[str], recipe: Recipe,
        origins: Sequence[str] = (),
    ) -> ImageExamples:  # fmt: skip
        """Gathers pictures [n, C, H, W].

        Raises:
          ConfigError: mean and std do not fit the channels.
        """
        n, channels = images.shape[:2]
        if len(recipe.mean) != len(recipe.std) or len(recipe.mean) not in (0, 1, channels):
            raise ConfigError(f"mean={recipe.mean} and std={recipe.std} for pictures of {channels} channels")
        places = tuple(origins) or tuple(f"picture {i}" for i in range(n))
        own = (recipe.mean, recipe.std, recipe.padding, recipe.flip)
        return cls(images, np.asarray(labels, np.int32), np.arange(n), tuple(names), places, *own)

    @property
    def recipe(self) -> Recipe:
        """How they become model input."""
        return Recipe(self.mean, self.std, self.padding, self.flip)

    @property
    def problem(self) -> str:
        """As transformers' ``problem_type``."""
        return SINGLE

    @property
    def lengths(self) -> np.ndarray:
        """A row each, int64 [examples]."""
        return np.ones(len(self), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> ImageExamples:
        """The pictures at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices], rows=self.rows[indices])

    def origin(self, i: int) -> str:
        """Where the row of picture i stands."""
        return self.origins[int(self.rows[i])]

    def fingerprint(self) -> dict[str, Any]:
        """What says that these are the same pictures in the same order, treated in the same way."""
        recipe = [self.mean, self.std, self.padding, self.flip, *([self.mixup] if self.mixup else [])]
        return {**identity(self), "recipe": recipe}

    def build(
        self, rows: Sequence[Sequence[int]], length: int = 0, *, count: int | None = None,
        key: tuple[int, ...] | None = None,
    ) -> ImageBatch:  # fmt: skip
        """A batch with one picture per row; rows beyond `rows` are black with weight 0.

        Args:
          rows: index of each row's picture.
          length: no use here.
          count: B; by default one per entry.
          key: of this step or epoch, the run's seed included; decides augmentation and mix-up. None: neither.
        """
        n = len(rows) if count is None else count
        pixels = np.zeros((n, *self.images.shape[1:]), np.float32)
        labels, weights = np.zeros(n, np.int32), np.zeros(n, np.float32)
        for r, (i,) in enumerate(rows):
            one = unit(self.images[i])
            if key is not None:  # by the source row, so that a subset of the pictures is treated as the whole is
                one = augment(one, self.recipe, key=key, index=int(self.rows[i]))
            pixels[r], labels[r], weights[r] = normalise(one, self.recipe), self.labels[i], 1.0
        batch = ImageBatch(pixels, labels, weights)
        if key is not None and self.mixup:
            return mix(batch, self.mixup, real=len(rows), key=key)
        return batch.replace(others=labels, share=np.ones(n, np.float32)) if self.soft else batch  # pyright: ignore


# Rows of a data set ----------------------------------------------------------------------------------------------------


def type_images(rows: Sequence[Row], *, columns: Sequence[str] = (), bad: BadRows | None = None) -> TypedRows:
    """Checks that every row has an image (a `Picture`) and a label.

    Raises:
      DataError: no row is left.
    """
    bad, kept = bad or BadRows(), []
    for row in rename(rows, columns):
        if not isinstance(row.get("image"), Picture) or "label" not in row:
            hint = "".join(did_you_mean(c, row) for c in ("image", "label") if c not in row)
            bad.add(f"{row.origin}: expected a picture and a label.{hint} Columns: {', '.join(row)}")
        elif problem := _problem(row["image"].pixels, row["label"]):
            bad.add(f"{row.origin}: {problem}")
        else:
            kept.append(row)
    if not kept:
        raise DataError(f"no pictures are left of {len(rows)} rows: {bad.summary()}")
    return TypedRows(DatasetType("image", False), kept)


def _problem(pixels: np.ndarray, label: Any) -> str:
    """What is wrong with a picture or its label; empty if nothing."""
    if pixels.dtype != np.uint8 and not np.isfinite(pixels).all():
        return f"the picture {list(pixels.shape)} has pixels that are no finite numbers"
    if label is None or isinstance(label, list | dict) or (isinstance(label, str) and not label.strip()):
        return f"field 'label' expected a class, got {label!r}"
    if isinstance(label, float | np.floating) and not float(label).is_integer():
        return f"label {label!r} is no class: expected a whole number or a text"
    return ""


def encode_images(
    typed: TypedRows, tokenizer: Any, loader: Loader, *, bad: BadRows | None = None, read: int | None = None,
    like: ImageExamples | None = None, mixup: float = 0.0, **_: Any,
) -> Encoded:  # fmt: skip
    """Stacks the pictures and numbers the classes.

    Held-out pictures are those with `like`, the training pictures, whose classes and size they must have; they are never
    augmented or mixed.

    Raises:
      DataError: pictures of several sizes, a class that training does not have, or only one class.
    """
    bad, rows = bad or BadRows(), typed.rows
    names = like.names if like else class_names(r["label"] for r in rows)
    if len(names) < 2:
        raise DataError(
            f"every picture has the label {', '.join(names)}: there is nothing to tell apart ({len(rows):,} pictures, the "
            f"first is {rows[0].origin})"
        )
    shape = like.images.shape[1:] if like else rows[0]["image"].pixels.shape
    odd = next((r for r in rows if r["image"].pixels.shape != shape or class_of(r["label"]) not in names), None)
    if odd is not None:
        has = f"{list(odd['image'].pixels.shape)} of class {odd['label']!r}"
        raise DataError(f"{odd.origin}: a picture {has}; expected {list(shape)} of a class among {', '.join(names)}")
    images = np.stack([r["image"].pixels for r in rows])
    labels = [names.index(class_of(r["label"])) for r in rows]
    recipe, origins = rows[0]["image"].recipe, tuple(r.origin for r in rows)
    recipe = replace(recipe, padding=0, flip=False) if like else recipe
    made = ImageExamples.of(images, labels, names=names, recipe=recipe, origins=origins)
    made = replace(made, mixup=0.0 if like else mixup, soft=mixup > 0)
    warnings = (bad.summary(),) if bad.count else ()
    count = len(rows) + bad.count if read is None else read
    return Encoded(made, EncodeReport(read=count, skipped_bad=bad.count, examples=len(rows), warnings=warnings))


add_layout(ImageBatch, Layout("images", ImageExamples, type_images, encode_images, tokens=False))
