"""torchrun that ends with one line instead of a trace when a process fails: that process has said why.

    python -m itemizedclip.runtime.torchrun --standalone --nproc_per_node 2 -- script.py …

The options are torchrun's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Run to the end; the exit status of the process that failed first, 128 + n for one that signal n ended."""
    try:
        torchrun(None if argv is None else list(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"exit status {code}" if code >= 0 else f"signal {-code}"
        print(f"the process of rank {rank} ended with {how}; its message stands above", file=sys.stderr)
        return code if code >= 0 else 128 - code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
