"""The process that writes trackio's record of a run: python -m bertpipe.train.trackio_process PROJECT NAME.

Reads JSON, a line each: the settings, then [step, {name: figure}] as they come, and null at the end. Started by
boards.Trackio, with the environment that keeps trackio local. Exit code 1 when anything could not be written, the
reason last on standard error.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def write(project: str, name: str, lines: TextIO) -> list[str]:
    """Write the run anew, in place of one of that name; returns what trackio complained of."""
    complaints: list[str] = []
    settings = json.loads(lines.readline())
    import trackio

    def complain(message: Warning | str, *_: object, **__: object) -> None:
        complaints.append(str(message))

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", "trackio|.*Trackio", UserWarning)  # what it could not do, it only warns of
    warnings.showwarning = complain
    with suppress(ValueError):  # a project that isn't there yet
        for old in trackio.Api().runs(project):
            if old.name == name:
                old.delete()
    run = trackio.init(project, name=name, config=settings, embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for line in lines:
        if (record := json.loads(line)) is None:
            break
        run.log(record[1], step=record[0])
        if complaints:
            break
    run.finish()
    return complaints


if __name__ == "__main__":
    _, project, name = sys.argv
    with (Path(os.environ["TRACKIO_DIR"]) / f"{name}.lock").open("w") as held:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)  # until the process of a run that was just killed has written its last
        found = write(project, name, sys.stdin)
    print("\n".join(found), file=sys.stderr)
    sys.exit(1 if found else 0)
