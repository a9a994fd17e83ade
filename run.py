"""The command line: `python run.py --config configs/quickstart.py` trains; `python run.py --help` shows the rest."""

from __future__ import annotations

import sys

from ftjax.parallel import xla_flags
from ftjax.verbs import main

if __name__ == "__main__":
    xla_flags.restart_with_large_pages()
    sys.exit(main())
