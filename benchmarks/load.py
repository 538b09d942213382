"""The load generator: keeps calls in flight, sees the status of each, and compares each answer with the right one.

One process, commanded by lines of JSON on standard input, one line of JSON back for each (`Load` drives it):

    unary   `concurrency` calls in flight on each of `channels` connections, for `seconds`
    stream  the same number of requests in flight on one bidirectional stream
    open    calls begun at `rate` a second, answered or not: what overload is
    poisson the same at random times, by a client that costs less (`benchmarks.arrivals`)

`h2load` does the first of these with nghttp2's generator, which costs a tenth and keeps a fast server busy, but counts
every gRPC error as a success: what came back must therefore be as long as the answers that `Load` found right.

An answer is right if it holds `scores` (or calibrated `probabilities`) of the rows that were sent, and no answer counts
that is not. Bytes that were found right once are compared as bytes, so that the client stays cheap.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np

from benchmarks.arrivals import poisson
from service.rpc.wire import inference

INFER, STREAM = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"
TOLERANCE = 2e-5
KNOWN_ANSWERS = 512
DRAIN_SECONDS = 60.0
FRAME_BYTES = 5
PREDICTION_ID = re.compile(rb"prediction_id.{28}", re.DOTALL)
"""Which no two answers share: a key of 13 bytes, the tags and lengths of its value, 24 characters."""
H2LOAD = shutil.which("h2load")


@dataclass(frozen=True)
class Command:
    """One measurement. `revision` is what the answers must say computed them; empty: a server that says nothing.
    `authority`: the file of the certificate that the server shows; empty: no TLS.
    """

    address: str
    payloads: str
    mode: str = "unary"
    concurrency: int = 1
    seconds: float = 1.0
    channels: int = 1
    rate: float = 0.0
    deadline_seconds: float = 30.0
    revision: str = ""
    authority: str = ""


@dataclass
class Result:
    """What the client saw. Latencies in milliseconds, of the answers that were right and of those refused, and how
    late the client was with half of its calls where their time was given.
    """

    right: int = 0
    wrong: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    p50: float = float("nan")
    p99: float = float("nan")
    refused_p99: float = float("nan")
    late: float = float("nan")
    answer_bytes: int = 0
    problem: str = ""

    @property
    def clean(self) -> bool:
        return self.right > 0 and not self.wrong and not self.statuses


class Load:
    """The generator in a process of its own, on the cores it is given."""

    def __init__(self, cores: set[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.communicate()

    def run(self, command: Command) -> Result:
        print(json.dumps(asdict(command)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline() if self._process.stdout else ""
        return Result(**json.loads(answer))


class Answers:
    """Judges answers and keeps the count."""

    def __init__(self, command: Command) -> None:
        with np.load(Path(command.payloads)) as file:
            self.requests = [row.tobytes() for row in file["requests"]]
            self._scores = file["scores"]
        self._revision = command.revision
        self._known: list[set[bytes]] = [set() for _ in self.requests]
        self._streamed = command.mode == "stream"
        self._statuses: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._refused: list[float] = []
        self.result = Result()

    def answered(self, index: int, data: bytes, begun: float) -> None:
        self._latencies.append(time.perf_counter() - begun)
        known = self._known[index]
        seen = PREDICTION_ID.sub(b"", data)
        if seen not in known:
            if problem := self._problem(index, data):
                self.result.wrong += 1
                self.result.problem = problem
                return
            if len(known) < KNOWN_ANSWERS:
                known.add(seen)
        self.result.right += 1
        self.result.answer_bytes = len(data)

    def failed(self, error: grpc.RpcError, begun: float) -> None:
        self.refused(error.code().name, error.details() or "", begun)

    def refused(self, status: str, text: str, begun: float) -> None:
        self._refused.append(time.perf_counter() - begun)
        self._statuses[status] += 1
        self.result.problem = text

    def summary(self, seconds: float) -> Result:
        result = self.result
        result.seconds, result.statuses = seconds, dict(self._statuses)
        if self._latencies:
            result.p50, result.p99 = (1000 * float(np.percentile(self._latencies, q)) for q in (50, 99))
        if self._refused:
            result.refused_p99 = 1000 * float(np.percentile(self._refused, 99))
        return result

    def _problem(self, index: int, data: bytes) -> str:
        """What is wrong with an answer; empty if nothing is."""
        if self._streamed:
            answer = inference.ModelStreamInferResponse.FromString(data)
            if answer.error_message:
                return str(answer.error_message)
            response = answer.infer_response
        else:
            response = inference.ModelInferResponse.FromString(data)
        if self._revision and response.parameters["calibrator_revision"].string_param != self._revision:
            return f"computed by revision {response.parameters['calibrator_revision'].string_param!r}"
        outputs = {tensor.name: values(tensor, i, response) for i, tensor in enumerate(response.outputs)}
        return self._difference(index, outputs)

    def _difference(self, index: int, outputs: dict[str, Any]) -> str:
        """Scores must be those of these rows; probabilities alone must at least rank the classes as the scores do."""
        wanted = self._scores[index]
        if "scores" in outputs:
            close = outputs["scores"].shape == wanted.shape and np.allclose(outputs["scores"], wanted, atol=TOLERANCE)
            return "" if close else "the scores are not those of the rows that were sent"
        got = outputs.get("probabilities", np.empty(0))
        ranked = got.shape == wanted.shape and (got.argmax(axis=1) == wanted.argmax(axis=1)).all()
        return "" if ranked else "the probabilities are not those of the rows that were sent"


def values(tensor: Any, index: int, response: Any) -> Any:
    raw = response.raw_output_contents
    if tensor.datatype != "FP32":
        return None
    flat = np.frombuffer(raw[index], np.float32) if raw else np.array(tensor.contents.fp32_contents, np.float32)
    return flat.reshape(tensor.shape)


def channel_to(address: str, authority: str = "") -> grpc.aio.Channel:
    options = [
        ("grpc.use_local_subchannel_pool", 1),  # channels of one process would share one connection
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
    if authority:
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(Path(authority).read_bytes()), options)
    return grpc.aio.insecure_channel(address, options=options)


def h2load(command: Command, checked: Result, requests: int, cores: set[int]) -> Result:
    """`requests` unary calls by h2load, after `checked` was seen on the same server."""
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        with np.load(Path(command.payloads)) as file:
            message = file["requests"][0].tobytes()
        body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        calls = ["-n", str(requests), "-c", str(command.channels), "-m", str(command.concurrency)]
        calls += ["-d", str(body), f"--log-file={log}"]
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        scheme = "https" if command.authority else "http"
        done = subprocess.run(
            [H2LOAD or "h2load", *calls, *headers, f"{scheme}://{command.address}{INFER}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=command.seconds + DRAIN_SECONDS,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        milliseconds = np.loadtxt(log, usecols=2) / 1000
    right = round(int(_found(r"\((\d+)\) data", done.stdout)) / (checked.answer_bytes + FRAME_BYTES))
    seconds = requests / float(_found(r"finished in .*, ([\d.]+) req/s", done.stdout))
    p50, p99 = (float(np.percentile(milliseconds, q)) for q in (50, 99))
    return Result(right, requests - right, {}, seconds, p50, p99, problem="answers of another length")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"h2load said something else: {text[:200]}")
    return match[1]


async def measure(command: Command) -> Result:
    answers = Answers(command)
    channels = [channel_to(command.address, command.authority) for _ in range(command.channels)]
    begun = time.perf_counter()
    try:
        for channel in channels:
            await channel.unary_unary(INFER)(answers.requests[0], timeout=command.deadline_seconds)
        begun = time.perf_counter()
        await asyncio.wait_for(MODES[command.mode](command, channels, answers), command.seconds + DRAIN_SECONDS)
    except grpc.RpcError as error:
        answers.failed(error, begun)
    except TimeoutError:
        answers.result.wrong += 1
        answers.result.problem = f"not every call had ended {DRAIN_SECONDS:g} s later"
    seconds = time.perf_counter() - begun
    for channel in channels:
        await channel.close()
    return answers.summary(seconds)


async def unary(command: Command, channels: list[grpc.aio.Channel], answers: Answers) -> None:
    end = time.perf_counter() + command.seconds

    async def caller(channel: grpc.aio.Channel, index: int) -> None:
        infer = channel.unary_unary(INFER)
        while time.perf_counter() < end:
            await call(infer, answers, index % len(answers.requests), command.deadline_seconds)
            index += 1

    await asyncio.gather(*(caller(channel, i) for channel in channels for i in range(command.concurrency)))


async def call(infer: Any, answers: Answers, index: int, deadline_seconds: float) -> None:
    begun = time.perf_counter()
    try:
        answers.answered(index, await infer(answers.requests[index], timeout=deadline_seconds), begun)
    except grpc.RpcError as error:
        answers.failed(error, begun)


async def stream(command: Command, channels: list[grpc.aio.Channel], answers: Answers) -> None:
    end = time.perf_counter() + command.seconds
    opened = channels[0].stream_stream(STREAM)()
    waiting: deque[tuple[int, float]] = deque()
    sent = 0

    async def send() -> None:
        nonlocal sent
        index = sent % len(answers.requests)
        sent += 1
        waiting.append((index, time.perf_counter()))
        await opened.write(answers.requests[index])

    begun = time.perf_counter()
    try:
        for _ in range(command.concurrency):
            await send()
        while waiting:
            data = await opened.read()
            if data is grpc.aio.EOF:
                answers.result.wrong += len(waiting)
                break
            index, begun = waiting.popleft()
            answers.answered(index, data, begun)
            if time.perf_counter() < end:
                await send()
        await opened.done_writing()
    except grpc.RpcError as error:
        answers.failed(error, begun)


async def open_loop(command: Command, channels: list[grpc.aio.Channel], answers: Answers) -> None:
    """Calls begin when their time has come, however many are waiting."""
    infer = channels[0].unary_unary(INFER)
    begun = time.perf_counter()
    calls: set[asyncio.Task[None]] = set()
    for number in range(int(command.rate * command.seconds)):
        if (ahead := begun + number / command.rate - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        task = asyncio.create_task(call(infer, answers, number % len(answers.requests), command.deadline_seconds))
        calls.add(task)
        task.add_done_callback(calls.discard)
    await asyncio.gather(*calls)


async def at_random(command: Command, _: list[grpc.aio.Channel], answers: Answers) -> None:
    poisson(command, INFER, answers)  # which has the event loop for itself


MODES = {"unary": unary, "stream": stream, "open": open_loop, "poisson": at_random}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asdict(asyncio.run(measure(Command(**json.loads(line)))))), flush=True)


if __name__ == "__main__":
    main()
