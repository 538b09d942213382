"""The clients: the asynchronous one is the blocking one awaited, streams keep answers apart, retries only where safe."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest

from service import errors
from service.client import AsyncClient, Client, Prediction, Retries
from service.client.failures import in_band
from service.rpc.status import DETAILS_KEY, status_of
from service.rpc.wire import CALIBRATOR_SERVICE, INFERENCE_SERVICE, inference, method_path
from tests.service import models
from tests.service.conftest import RunningServer

X, LOGITS, LABELS = models.labelled_rows(1000, seed=1)
ROWS = {"logits": LOGITS, "labels": LABELS}


def run(scenario: Callable[[AsyncClient], Coroutine[Any, Any, Any]], address: str, **options: Any) -> Any:
    """What the scenario returns, given a client of its own."""

    async def whole() -> Any:
        async with AsyncClient(address, show_progress=False, **options) as client:
            return await scenario(client)

    return asyncio.run(whole())


def same(a: Prediction, b: Prediction) -> bool:
    """Equal to the last bits: rows may be computed in batches of another size."""
    return a.calibrator_revision == b.calibrator_revision and all(
        np.allclose(a.outputs[name], b.outputs[name], atol=1e-6) for name in a.outputs.keys() | b.outputs.keys()
    )


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    def public(kind: type) -> dict[str, list[tuple[str, Any, Any, Any]]]:
        methods = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
        return {
            name: [(p.name, p.kind, p.default, p.annotation) for p in inspect.signature(method).parameters.values()]
            for name, method in methods.items()
        }

    blocking, asynchronous = public(Client), public(AsyncClient)
    asynchronous.pop("stream")
    assert asynchronous == blocking
    for name in blocking:
        assert inspect.getdoc(getattr(Client, name)) == inspect.getdoc(getattr(AsyncClient, name))
        results = [inspect.signature(getattr(kind, name)).return_annotation for kind in (Client, AsyncClient)]
        assert results[0] == results[1].removeprefix("Async")  # Iterator, AsyncIterator


def test_a_calibrators_whole_life_is_the_same_through_both_clients(server: RunningServer, client: Client) -> None:
    async def life(other: AsyncClient) -> None:
        await other.wait_until_ready()
        revision = await other.fit("mlp", "temperature", **ROWS)
        assert (
            repr(revision) == repr(client.get("mlp", "temperature-1")) == repr(await other.get("mlp", "temperature-1"))
        )
        from_inputs = await other.fit("mlp", "temperature", inputs=X, labels=LABELS, sample_weight=np.ones(1000))
        assert await other.activate("mlp", revision.revision) == "none"
        assert await other.activate("mlp", from_inputs.revision) == "temperature-1"
        assert await other.rollback("mlp") == "temperature-1"
        assert repr(await other.list("mlp")) == repr(client.list("mlp"))
        assert repr(await other.models()) == repr(client.models())
        judged = await other.evaluate("mlp", **ROWS)
        assert repr(judged) == repr(client.evaluate("mlp", **ROWS))
        assert same(await other.predict("mlp", X[:9]), client.predict("mlp", X[:9]))
        named = await other.predict("mlp", {"x": X[:9]}, outputs=["probabilities"], calibrator="none")
        assert same(named, client.predict("mlp", {"x": X[:9]}, outputs=["probabilities"], calibrator="none"))
        assert list(named.outputs) == ["probabilities"]
        np.testing.assert_allclose(await other.logits("mlp", X[:150]), LOGITS[:150], atol=1e-4)
        fitted = await other.calibrator("mlp", "temperature-1")
        assert fitted.temperature_ == client.calibrator("mlp", "temperature-1").temperature_
        await other.delete("mlp", from_inputs.revision)
        assert [revision.revision for revision in client.list("mlp")] == ["temperature-1"]

    run(life, server.address)


def test_an_exported_model_is_whole(server: RunningServer, client: Client) -> None:
    async def export(other: AsyncClient) -> bytes:
        return await other.export("mlp")

    exported = run(export, server.address)
    assert exported == client.export("mlp")
    session = ort.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(["probabilities"], {"x": X[:9]})
    np.testing.assert_allclose(probabilities, client.predict("mlp", X[:9]).probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c: c.predict("nobody", {"x": X[:1]}), errors.NotFound, "'nobody'"),
        (lambda c: c.predict("mlp", X[:1, :2]), errors.InvalidRequest, "dimension 1 must be 6, got 2"),
        (lambda c: c.fit("mlp", "tarot", **ROWS), errors.InvalidRequest, "'tarot'"),
        (lambda c: c.fit("mlp", "temperature", labels=LABELS), errors.InvalidRequest, "either logits or inputs"),
        (lambda c: c.fit("mlp", "temperature", logits=LOGITS[:9], labels=LABELS[:9] * 0), errors.Refused, "classes"),
        (lambda c: c.rollback("mlp"), errors.Refused, "nothing to roll back"),
        (lambda c: c.export("mlp", "beta-9"), errors.NotFound, "beta-9"),
    ],
)
def test_a_refusal_is_of_the_class_and_reason_it_was_on_the_server(
    shared_server: RunningServer, call: Callable[[Any], Any], error: type[errors.CalserveError], text: str
) -> None:
    with pytest.raises(error, match=text) as awaited:
        run(call, shared_server.address)
    with Client(shared_server.address, show_progress=False) as client, pytest.raises(error, match=text) as blocking:
        call(client)
    assert awaited.value.detail_reason == blocking.value.detail_reason


def test_a_fit_refused_while_its_rows_are_still_being_sent_is_told_why(server: RunningServer) -> None:
    many = {"logits": np.tile(LOGITS, (200, 1)), "labels": np.tile(LABELS, 200)}
    with pytest.raises(errors.NotFound, match="'nobody'"):
        run(lambda client: client.fit("nobody", "temperature", **many), server.address)


@pytest.mark.parametrize("lost", [1, 4, 5])
def test_rows_are_sent_again_when_the_answer_to_them_was_lost(server: RunningServer, lost: int) -> None:
    """grpc.aio makes up a status when a message cannot be sent, whatever the server's says that is on its way."""
    made_up = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, (), (), "Internal error from Core")
    sent = []

    async def fit(client: AsyncClient) -> str:
        method = client._calibrators.FitCalibrator

        async def losing(chunks: Any) -> Any:
            sent.append(next(chunks))
            if len(sent) <= lost:
                raise made_up
            return await method(itertools.chain(sent[-1:], chunks))

        client._calibrators.FitCalibrator = losing
        return (await client.fit("mlp", "temperature", **ROWS)).revision

    if lost < 5:
        assert run(fit, server.address) == "temperature-1"
    else:
        with pytest.raises(errors.CalserveError, match="from Core"):
            run(fit, server.address)
    assert len(sent) == min(lost + 1, 5)


def test_each_of_many_requests_in_flight_on_a_stream_gets_its_own_answer(shared_server: RunningServer) -> None:
    async def predict_all(client: AsyncClient) -> list[Prediction]:
        async with client.stream("mlp") as stream:
            return await asyncio.gather(*(stream.predict(X[i : i + 1 + i % 5]) for i in range(300)))

    predictions = run(predict_all, shared_server.address)
    with Client(shared_server.address) as client:
        for i in range(0, 300, 7):
            assert same(predictions[i], client.predict("mlp", X[i : i + 1 + i % 5])), i


def test_answers_of_a_stream_come_in_the_order_of_the_requests(shared_server: RunningServer) -> None:
    async def settled(client: AsyncClient) -> list[int]:
        order: list[int] = []
        async with client.stream("mlp") as stream:

            async def one(i: int) -> None:
                await stream.predict(X[:200] if i % 2 else X[:1])
                order.append(i)

            await asyncio.gather(*map(one, range(100)))
        return order

    assert run(settled, shared_server.address) == list(range(100))


def test_an_error_on_a_stream_belongs_to_its_request_and_the_stream_goes_on(shared_server: RunningServer) -> None:
    async def mixed(client: AsyncClient) -> list[Any]:
        async with client.stream("mlp") as stream:
            wrong = stream.predict({"x": X[:3, :2]})
            unknown = stream.predict(X[:3], calibrator="beta-9")
            answers = await asyncio.gather(
                stream.predict(X[:3]), wrong, unknown, stream.predict(X[3:6]), return_exceptions=True
            )
            return [*answers, await stream.predict(X[:3])]

    first, wrong, unknown, second, after = run(mixed, shared_server.address)
    assert isinstance(wrong, errors.CalserveError)
    assert "dimension 1 must be 6, got 2" in wrong.message
    assert isinstance(unknown, errors.CalserveError)
    assert "beta-9" in unknown.message
    assert same(first, after)
    with Client(shared_server.address) as client:
        assert same(second, client.predict("mlp", X[3:6]))


def test_an_error_in_a_stream_whose_code_is_told_is_of_its_class() -> None:
    answer = inference.ModelStreamInferResponse(error_message="no such model")
    assert type(in_band(answer)) is errors.CalserveError
    answer.infer_response.parameters["error_code"].string_param = "NOT_FOUND"
    assert type(in_band(answer)) is errors.NotFound


def test_a_caller_who_leaves_a_stream_takes_no_answer_of_another(shared_server: RunningServer) -> None:
    async def some_leave(client: AsyncClient) -> list[Any]:
        async with client.stream("mlp") as stream:
            calls = [asyncio.create_task(stream.predict(X[i : i + 1])) for i in range(60)]
            await asyncio.wait(calls[:1])
            for call in calls[1::3]:
                call.cancel()
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = run(some_leave, shared_server.address)
    assert any(isinstance(answer, asyncio.CancelledError) for answer in answers)
    with Client(shared_server.address) as client:
        for i, answer in enumerate(answers):
            assert isinstance(answer, asyncio.CancelledError) or same(answer, client.predict("mlp", X[i : i + 1]))


def test_a_stream_to_a_model_that_is_not_there_is_refused_when_it_is_opened(shared_server: RunningServer) -> None:
    async def open_stream(client: AsyncClient) -> None:
        async with client.stream("nobody"):
            raise AssertionError("it opened")

    with pytest.raises(errors.NotFound, match="'nobody'"):
        run(open_stream, shared_server.address)


class Scripted:
    """A gRPC server that raises the given errors, one a call, and answers once they are used up.

    `calls` counts by method name; on `ModelStreamInfer` it hears everything and says nothing until `end` is set.
    """

    def __init__(self, *raised: Exception) -> None:
        self.calls: dict[str, int] = {}
        self.end = threading.Event()
        self._raised = list(raised)
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self._handlers(),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self.end.set()
        self._server.stop(None).wait()

    def _handlers(self) -> grpc.GenericRpcHandler:
        handlers = {}
        for service in (CALIBRATOR_SERVICE, INFERENCE_SERVICE):
            for method in service.methods:
                answer = self._answerer(method.name)
                make = (
                    grpc.stream_unary_rpc_method_handler
                    if method.client_streaming
                    else grpc.unary_unary_rpc_method_handler
                )
                handlers[method_path(method)] = make(answer)
        handlers[method_path(INFERENCE_SERVICE.methods_by_name["ModelStreamInfer"])] = (
            grpc.stream_stream_rpc_method_handler(self._say_nothing)
        )

        class Table(grpc.GenericRpcHandler):
            def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
                return handlers[details.method]

        return Table()

    def _answerer(self, name: str) -> Callable[[Any, grpc.ServicerContext], bytes]:
        def answer(request: Any, context: grpc.ServicerContext) -> bytes:
            self.calls[name] = self.calls.get(name, 0) + 1
            if not self._raised:
                return b""
            error = self._raised.pop(0)
            if not isinstance(error, errors.CalserveError):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max")
            status = status_of(error, "")
            context.set_trailing_metadata(((DETAILS_KEY, status.details),))
            context.abort(status.code, status.message)
            raise AssertionError("abort raises")

        return answer

    def _say_nothing(self, *_: object) -> Iterator[bytes]:
        self.calls["ModelStreamInfer"] = 0
        while not self.end.wait(0.01):
            pass
        yield from ()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def make(*raised: Exception) -> Scripted:
        servers.append(Scripted(*raised))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(params=["blocking", "asynchronous"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Make one call with either client: `call(address, lambda client: client.list("m"), **options)`."""

    def blocking(address: str, what: Callable[[Any], Any], **options: Any) -> Any:
        with Client(address, show_progress=False, **options) as client:
            return what(client)

    def awaited(address: str, what: Callable[[Any], Any], **options: Any) -> Any:
        return run(what, address, **options)

    return blocking if request.param == "blocking" else awaited


READS = {
    "ListRevisions": lambda client: client.list("m"),
    "ModelInfer": lambda client: client.predict("m", {"x": X[:1]}),
}
QUICK = Retries(first_seconds=0.001)


@pytest.mark.parametrize("method", READS)
def test_a_call_that_changes_nothing_is_made_again_when_the_server_is_not_ready(
    scripted: Callable[..., Scripted], call: Callable[..., Any], method: str
) -> None:
    server = scripted(errors.NotReady("loading"), errors.NotReady("loading"))
    call(server.address, READS[method], retries=QUICK)
    assert server.calls == {method: 3}


def test_a_call_is_made_again_after_the_time_that_an_overloaded_server_asks_for(
    scripted: Callable[..., Scripted], call: Callable[..., Any]
) -> None:
    server = scripted(errors.Overloaded("full", retry_after_seconds=0.25))
    begun = time.monotonic()
    call(server.address, READS["ModelInfer"], retries=QUICK)
    assert server.calls == {"ModelInfer": 2}
    assert time.monotonic() - begun >= 0.25


def test_tries_end_and_the_last_error_is_raised(scripted: Callable[..., Scripted], call: Callable[..., Any]) -> None:
    server = scripted(*(errors.NotReady(f"try {i}") for i in range(1, 9)))
    with pytest.raises(errors.NotReady, match="try 3"):
        call(server.address, READS["ModelInfer"], retries=Retries(most=2, first_seconds=0.001))
    assert server.calls == {"ModelInfer": 3}


def test_nobody_waits_longer_than_the_deadline(scripted: Callable[..., Scripted], call: Callable[..., Any]) -> None:
    server = scripted(errors.Overloaded("full", retry_after_seconds=30.0))
    begun = time.monotonic()
    with pytest.raises(errors.Overloaded, match="full") as caught:
        call(server.address, READS["ModelInfer"], timeout_seconds=5.0)
    assert time.monotonic() - begun < 5.0
    assert caught.value.retry_after_seconds == 30.0
    assert server.calls == {"ModelInfer": 1}


@pytest.mark.parametrize(
    "error",
    [ValueError("too large: RESOURCE_EXHAUSTED without a time to wait"), errors.InvalidRequest("x"), errors.Refused("x"), errors.Stale("x")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_call_that_another_try_would_not_help_is_made_once(
    scripted: Callable[..., Scripted], call: Callable[..., Any], error: Exception
) -> None:
    server = scripted(error)
    with pytest.raises(errors.CalserveError):
        call(server.address, READS["ListRevisions"], retries=QUICK)
    assert server.calls == {"ListRevisions": 1}


CHANGES = {
    "FitCalibrator": lambda client: client.fit("m", "temperature", **ROWS),
    "EvaluateRevision": lambda client: client.evaluate("m", "temperature-1", **ROWS),
    "ActivateRevision": lambda client: client.activate("m", "temperature-1"),
    "RollBack": lambda client: client.rollback("m"),
    "DeleteRevision": lambda client: client.delete("m", "temperature-1"),
}


@pytest.mark.parametrize("method", CHANGES)
def test_a_call_that_changes_something_is_never_made_twice(
    scripted: Callable[..., Scripted], call: Callable[..., Any], method: str
) -> None:
    server = scripted(errors.NotReady("loading"), errors.NotReady("loading"))
    with pytest.raises(errors.NotReady, match="loading"):
        call(server.address, CHANGES[method], retries=QUICK)
    assert server.calls == {method: 1}


def test_a_stream_that_the_server_ends_fails_what_waits_and_what_comes_later(
    scripted: Callable[..., Scripted],
) -> None:
    server = scripted()

    async def lose_the_server(client: AsyncClient) -> list[Any]:
        async with client.stream("m") as stream:
            calls = [asyncio.create_task(stream.predict({"x": X[:1]})) for _ in range(3)]
            await asyncio.wait(calls, timeout=0.05)
            server.end.set()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            with pytest.raises(errors.NotReady, match="ended the stream"):
                await stream.predict({"x": X[:1]})
            return answers

    assert [type(answer) for answer in run(lose_the_server, server.address)] == [errors.NotReady] * 3


def test_closing_a_stream_fails_what_waits_and_returns_at_once(scripted: Callable[..., Scripted]) -> None:
    server = scripted()

    async def leave(client: AsyncClient) -> Any:
        async with client.stream("m") as stream:
            waiting = asyncio.create_task(stream.predict({"x": X[:1]}))
            await asyncio.wait([waiting], timeout=0.05)
        return await asyncio.gather(waiting, return_exceptions=True)

    (answer,) = run(leave, server.address)
    assert type(answer) is errors.Cancelled


def test_a_request_on_a_silent_stream_ends_with_the_clients_time_out(scripted: Callable[..., Scripted]) -> None:
    server = scripted()

    async def wait(client: AsyncClient) -> None:
        async with client.stream("m") as stream:
            await stream.predict({"x": X[:1]})

    with pytest.raises(errors.DeadlinePassed, match="1 seconds"):
        run(wait, server.address, timeout_seconds=1.0)
    assert "ModelStreamInfer" in server.calls
