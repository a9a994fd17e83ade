"""Tasks of lm-evaluation-harness (Gao et al. 2024, doi:10.5281/zenodo.12608602) on a run's model, adapter unmerged.

    python run.py eval --run runs/quickstart evals=lm_eval tasks=arc_easy,hellaswag limit=100

needs the extra: ``pip install 'ftjax[eval]'``. Own tasks: yaml files in `include_path`. What is computed is in
`ftjax.evals.harness.model`.
"""

# The harness is an extra, which need not be there when types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import Field

from ftjax.errors import ConfigError, did_you_mean
from ftjax.evals.request import Measured, as_json
from ftjax.params import Store
from ftjax.registry import register
from ftjax.schema import Component

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "samples")


@register("eval")
class LmEval(Component):
    """lm-evaluation-harness."""

    name: Literal["lm_eval"] = "lm_eval"
    tasks: tuple[str, ...] = Field(min_length=1, description="Names of tasks or groups.")
    include_path: str = Field("", description="Folder with yaml files of further tasks.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples in front of each question; none: as the task says."
    )
    limit: int = Field(0, ge=0, description="Rows of each task; 0: all.")
    batch: int = Field(8, gt=0, description="Rows per call of the model.")
    apply_chat_template: bool = Field(False, description="Wrap each prompt in the chat template.")
    system_instruction: str = Field("", description="System prompt in front of it.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of sampled answers.")
    bootstrap: int = Field(1000, ge=0, description="Resamples for the standard errors that need them.")
    samples: bool = Field(False, description="Keep every request and answer in the file.")

    @property
    def label(self) -> str:
        """``lm_eval-`` and the tasks."""
        return re.sub(r"[^\w.+-]", "_", f"lm_eval-{'+'.join(self.tasks)}")[:100]

    def measure(self, model: Any, params: Store, tokenizer: Any, *, template: str) -> Measured:
        """Runs the tasks.

        Raises:
          ConfigError: the harness is not installed, or knows no such task.
        """
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
            from lm_eval.utils import make_table
        except ImportError as e:
            text = f"evals=lm_eval needs lm-evaluation-harness ({e}): pip install 'ftjax[eval]'"
            raise ConfigError(text) from None
        from ftjax.evals.harness.model import HarnessModel

        manager = TaskManager(include_path=self.include_path or None)
        known = manager.all_tasks
        missing = [f"{t}  unknown task.{did_you_mean(t, known)}" for t in self.tasks if not manager.match_tasks([t])]
        if missing:
            raise ConfigError(f"tasks of lm-evaluation-harness ({len(known):,} are known)", missing)
        lm = HarnessModel(model, params, tokenizer, batch=self.batch, template=template, seed=self.seed)
        simple_evaluate: Any = lm_eval.simple_evaluate
        found = simple_evaluate(
            model=lm, tasks=list(self.tasks), num_fewshot=self.num_fewshot, limit=self.limit or None,
            bootstrap_iters=self.bootstrap, log_samples=self.samples, task_manager=manager,
            apply_chat_template=self.apply_chat_template, system_instruction=self.system_instruction or None,
        )  # fmt: skip
        table = make_table(found) + (f"\n{make_table(found, 'groups')}" if found.get("groups") else "")
        record = {k: found[k] for k in KEPT if k in found}
        plain = json.loads(json.dumps(record, default=_plain))
        return Measured(table, {"request": as_json(self), "lm_eval": lm_eval.__version__, **plain})


def _plain(value: Any) -> Any:
    """Numbers of numpy as numbers, everything else as text."""
    return value.item() if hasattr(value, "item") else str(value)
