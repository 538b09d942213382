"""Build hook: generates the Python messages from the .proto files, in a wheel and in an editable install alike.

Two forms, because of one clash. `calserve.v1` becomes ordinary modules (`calserve/v1/*_pb2.py`, with `.pyi` for mypy).
Package `inference` becomes a file of descriptors, `calserve/inference.binpb`: tritonclient registers the same message
names in the default descriptor pool of the process, so ours are loaded into a private one (`service/rpc/wire.py`).
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def generate(out: Path) -> None:
    """Write `calserve/v1/*_pb2.py[i]` and `calserve/inference.binpb` below `out`."""
    from grpc_tools import protoc  # only in the build environment

    include = [f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
    services = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "calserve").rglob("*.proto"))
    inference = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "inference").glob("*.proto"))
    (out / "calserve").mkdir(parents=True, exist_ok=True)
    runs = [
        [*include, f"--python_out={out}", f"--pyi_out={out}", *services],
        [*include, "--include_imports", f"--descriptor_set_out={out / 'calserve' / 'inference.binpb'}", *inference],
    ]
    for arguments in runs:
        if protoc.main(["protoc", *arguments]) != 0:
            sys.exit(f"protoc failed: {' '.join(arguments)}")


class ProtosHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        del version, build_data
        generate(ROOT)
