"""KServe's own client, which drags in too much to be a dependency: `PYTHON kserve_client.py ADDRESS` prints what it saw.

Where PYTHON has the package kserve: see the option --kserve of the tests.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest  # type: ignore[import-not-found]

CALLS = 20


async def main(address: str) -> dict[str, Any]:
    def request(model: str) -> Any:
        rows = InferInput("x", [1, 6], "FP32")
        rows.set_data_from_numpy(np.arange(6, dtype=np.float32)[None], binary_data=True)
        return InferRequest(model, [rows])

    async with InferenceGRPCClient(address, channel_args=[("grpc.keepalive_time_ms", 11_000)]) as client:
        answer = await client.infer(request("mlp"))
        saw = {
            "ready": await client.is_server_ready() and await client.is_model_ready("mlp"),
            "outputs": [output.name for output in answer.outputs],
            "probabilities": answer.get_output_by_name("probabilities").as_numpy().ravel().tolist(),
            "answered": len(await asyncio.gather(*(client.infer(request("mlp")) for _ in range(CALLS)))),
        }
        try:
            await client.infer(request("nobody"))
        except Exception as error:
            saw["refused"] = str(error)
    return saw


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))  # noqa: T201
