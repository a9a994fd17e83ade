"""Answers that are a number, as GSM8K gives them: ``... so it is 6 * 7 = 42.\\n#### 42``.

    gsm8k_exact("6 * 7 = 42\\n#### 42", "... #### 42")         # 1.0
    gsm8k_flexible("That makes $42.", "... #### 42")           # 1.0, from the last number anywhere

Cobbe et al. 2021, arXiv:2110.14168; both as lm-evaluation-harness' task gsm8k defines them ("strict-match" and
"flexible-extract"): numbers are compared as texts without commas, dollar signs and a period at their end.
"""

from __future__ import annotations

import re

_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_ANYWHERE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def gsm8k_exact(prediction: str, reference: str) -> float:
    """1 when the first number behind ``####`` is the reference's."""
    found = _MARKED.findall(prediction)
    return float(bool(found) and _plain(found[0]) == _plain(reference))


def gsm8k_flexible(prediction: str, reference: str) -> float:
    """1 when the last number of the text is the reference's."""
    found = _ANYWHERE.findall(prediction)
    return float(bool(found) and _plain(found[-1]) == _plain(reference))


def _plain(text: str) -> str:
    """What stands behind the last ``####``, bare."""
    bare = text.replace(",", "").replace("$", "").rpartition("#### ")[2].lower()
    end = bare.removesuffix("\n")  # a line break at the very end does not hide the period
    return end.removesuffix(".") + bare[len(end) :]
