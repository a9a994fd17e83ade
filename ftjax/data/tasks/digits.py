"""Handwritten digits, 1,797 pictures of 8 x 8, which come with scikit-learn: images without a download.

data=Digits(size=32, channels=3, like="resnet20")        # enlarged, normalised as that model's folder says
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from ftjax.data.images import Picture, Recipe, normalisation_of, resize
from ftjax.data.rows import BadRows, Row, share_of
from ftjax.data.task import Prompt, Silent, Split
from ftjax.errors import DataError
from ftjax.registry import register
from ftjax.schema import Component

_BRIGHTEST = 16  # of scikit-learn's digits


@register("data")
class Digits(Silent, Component):
    """scikit-learn's digits, enlarged."""

    name: Literal["digits"] = "digits"
    size: int = Field(32, ge=8, description="Height and width, in pixels.")
    channels: int = Field(3, gt=0, description="Equal channels.")
    like: str = Field("", description="Model folder whose preprocessor_config.json gives mean and std.")
    mean: tuple[float, ...] = Field((), description="Subtracted from pixels in [0, 1], one number or one per channel.")
    std: tuple[float, ...] = Field((), description="Divided by, likewise.")
    padding: int = Field(0, ge=0, description="While training: border out of which the picture is cut at random.")
    flip: bool = Field(False, description="While training: mirror every second picture. Digits are not symmetric.")
    eval_share: float = Field(0.2, gt=0, lt=1, description="Pictures held out, by hash.")

    def examples(self, split: Split, *, bad: BadRows | None = None) -> list[Row]:
        """Rows ``{"image", "label"}`` of "train" or "eval".

        Raises:
          DataError: scikit-learn is not installed.
        """
        mean, std = normalisation_of(self.like) if self.like else (self.mean, self.std)
        recipe, (pixels, labels) = Recipe(mean, std, self.padding, self.flip), _digits()
        images = np.clip(resize(pixels / np.float32(_BRIGHTEST), self.size), 0, 1)[:, None]
        images = np.repeat(images, self.channels, axis=1)
        # By the raw pictures: what is held out at one size is held out at every size.
        held_out = [share_of(str(Picture(x))) < self.eval_share for x in pixels]
        return [
            Row({"image": Picture(image, recipe), "label": int(label)}, f"digits:{i}")
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
            if held_out[i] == (split == "eval")
        ]

    def prompts(self, n: int) -> list[Prompt]:
        """None: nothing is generated."""
        return []

    def fingerprint(self) -> dict[str, str]:
        """The hash of the raw pictures, and the normalisation."""
        pixels, labels = _digits()
        norm = normalisation_of(self.like) if self.like else (self.mean, self.std)
        return {"digits": str(Picture(pixels)), "labels": str(Picture(labels)), "normalisation": str(norm)}


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures [1797, 8, 8] of 0 to 16, float32, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data=digits comes with scikit-learn, which is not installed: pip install 'ftjax[eval]'"
        ) from None
    flat, digits = load_digits(return_X_y=True)
    return np.asarray(flat, np.float32).reshape(-1, 8, 8), np.asarray(digits, np.int64)
