"""A worker that reports some progress and then waits to be killed; its pid is in the job's folder."""

import json
import os
import signal
import sys
from pathlib import Path

(Path(sys.argv[1]) / "pid").write_text(str(os.getpid()))
print(json.dumps({"progress": 0.25, "stage": "stuck"}), flush=True)  # noqa: T201
signal.pause()
