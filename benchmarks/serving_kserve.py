"""Runs with KServe's SDK: an onnxruntime model behind its gRPC server.

python serving_kserve.py MODEL.onnx NAME GRPC_PORT HTTP_PORT
"""

from __future__ import annotations

import sys
from typing import Any

import onnxruntime as ort
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # type: ignore[import-not-found]


class OnnxModel(Model):  # type: ignore[misc]
    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        self._path = path
        self.load()

    def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        self.ready = True
        return True

    def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        (scores,) = self._session.run(["scores"], {"x": payload.inputs[0].as_numpy()})
        output = InferOutput("scores", list(scores.shape), "FP32")
        output.set_data_from_numpy(scores, binary_data=True)
        return InferResponse(payload.id, self.name, [output])


if __name__ == "__main__":
    model_path, model_name, grpc_port, http_port = sys.argv[1:]
    sys.argv[1:] = []
    server = ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1)
    server.start([OnnxModel(model_name, model_path)])
