"""Runs inside Triton's python backend, as model.py: one onnxruntime run for all the requests that Triton hands over."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = os.environ["PYTHONPATH"].split(":")  # the backend's interpreter does not read it

import numpy as np  # noqa: E402
import onnxruntime as ort  # noqa: E402
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # noqa: E402


class TritonPythonModel:
    def initialize(self, arguments: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = Path(arguments["model_repository"]) / arguments["model_version"] / "model.onnx"
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        parts = [triton.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        (scores,) = self._session.run(["scores"], {"x": rows})
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [triton.InferenceResponse([triton.Tensor("scores", part)]) for part in np.split(scores, ends)]
