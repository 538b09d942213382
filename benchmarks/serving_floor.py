"""What nothing on ngh2 and uvloop goes below: answers known by their requests, and no limits, checks or counts.

    python -m benchmarks.serving_floor MODEL.onnx NAME PORT

A request that comes for the first time is answered as `serving_reference` does; from then on its bytes are looked up.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import ngh2
import uvloop

from benchmarks.load import INFER
from benchmarks.serving_reference import Reference
from service.rpc.h2_framing import OK_TRAILERS, PREFIX, RESPONSE
from service.rpc.wire import inference

UNIMPLEMENTED = [*RESPONSE, (b"grpc-status", b"12")]
WINDOW = 32 << 20


class Floor(asyncio.Protocol):
    """One connection: what one read brought is answered with one write."""

    def __init__(self, reference: Reference, known: dict[bytes, bytes]) -> None:
        self._reference, self._known = reference, known
        self._bodies: dict[int, bytes] = {}
        self._learning: set[asyncio.Task[None]] = set()
        self._h2 = ngh2.Connection(ngh2.Role.SERVER)
        self._h2.initiate_connection({ngh2.Setting.INITIAL_WINDOW_SIZE: WINDOW})
        self._h2.set_local_window_size(WINDOW)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        h2 = self._h2
        h2.receive_data(data)
        for event in cast(list[Any], h2.events()):
            if type(event) is ngh2.RequestReceived:
                if (b":path", INFER.encode()) in event.headers:
                    self._bodies[event.stream_id] = b""
                else:
                    h2.send_response(event.stream_id, UNIMPLEMENTED, end_stream=True)
            elif type(event) is ngh2.DataReceived and event.stream_id in self._bodies:
                body = self._bodies.pop(event.stream_id) + event.data
                if not event.end_stream:
                    self._bodies[event.stream_id] = body
                elif body in self._known:
                    self._answer(event.stream_id, self._known[body])
                else:
                    task = asyncio.ensure_future(self._learn(event.stream_id, body))
                    self._learning.add(task)
                    task.add_done_callback(self._learning.discard)
        self._flush()

    def _answer(self, number: int, framed: bytes) -> None:
        self._h2.send_response(number, RESPONSE)
        self._h2.send_data(number, framed)
        self._h2.send_trailers(number, OK_TRAILERS)

    def _flush(self) -> None:
        if answers := self._h2.data_to_send():
            self._transport.write(answers)

    async def _learn(self, number: int, body: bytes) -> None:
        request = inference.ModelInferRequest.FromString(body[PREFIX.size :])
        answer = (await self._reference.infer(request, cast(Any, None))).SerializeToString()
        self._known[body] = PREFIX.pack(0, len(answer)) + answer
        self._answer(number, self._known[body])
        self._flush()


async def main(path: str, name: str, port: str) -> None:
    reference, known = Reference(path, name), dict[bytes, bytes]()
    server = await asyncio.get_running_loop().create_server(lambda: Floor(reference, known), "127.0.0.1", int(port))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:4]))
