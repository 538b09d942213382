"""A request that is recognised gets the answer that it would get if it were read in full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calserve.open_inference import messages
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import CalserveError
from service.inference.repository import Repository
from service.inference.session import Device
from service.rpc.health import Health
from service.rpc.infer_plan import MAX_TEMPLATES
from service.rpc.inference_service import Inference
from service.rpc.methods import Call, Direct
from service.rpc.shared_memory import Regions
from tests.service import models
from tests.service.conftest import ECHO_TYPES

ROW = np.arange(6, dtype="<f4")


class Both:
    """Two servicers on one repository: one that recognises requests, one that reads each in full."""

    def __init__(self, root: Path) -> None:
        self.repository = Repository(root, Device.choose("cpu", 1))
        self.repository.load_all()
        self.repository.loaded = True
        self.known, self.read = self._servicer(), self._servicer()
        self.read._templates.match = lambda _: None  # type: ignore[method-assign]
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self.repository.close()
        self._loop.close()

    def _servicer(self) -> Inference:
        return Inference(self.repository, None, Health(), Regions("", 0), 60)  # type: ignore[arg-type]

    def answers(self, data: bytes) -> tuple[messages.ModelInferResponse | str, messages.ModelInferResponse | str]:
        return self.answer(self.known, data), self.answer(self.read, data)

    def answer(self, servicer: Inference, data: bytes) -> messages.ModelInferResponse | str:
        """The response, or the error's class and text."""

        async def asked() -> bytes:
            return await Direct(servicer.model_infer_direct)(data, Call())

        try:
            reply = self._loop.run_until_complete(asked())
        except CalserveError as error:
            return f"{type(error).__name__}: {error.message}"
        return messages.ModelInferResponse.FromString(reply)


@pytest.fixture(scope="module")
def repository_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("templates") / "models"
    models.write(root, "mlp", models.classifier())
    for word in ("FP64", "BOOL", "BYTES"):
        models.write(root, f"echo_{word}", models.echo(ECHO_TYPES[word]))
    return root


@pytest.fixture
def both(repository_root: Path) -> Iterator[Both]:
    both = Both(repository_root)
    yield both
    both.close()


def request(request_id: str = "", rows: int = 1, **changes: object) -> messages.ModelInferRequest:
    values = np.tile(ROW, (rows, 1)) * float(changes.get("scale", 1))  # type: ignore[arg-type]
    made = messages.ModelInferRequest(model_name="mlp", model_version=str(changes.get("version", "")), id=request_id)
    made.inputs.add(name="x", datatype="FP32", shape=[rows, 6])
    made.raw_input_contents.append(values.astype("<f4").tobytes())
    for output in changes.get("outputs", ()):  # type: ignore[attr-defined]
        made.outputs.add(name=output)
    return made


def is_known(servicer: Inference, data: bytes) -> bool:
    return servicer._templates.match(data) is not None


@pytest.mark.parametrize("changes", [{}, {"version": "1"}, {"outputs": ["confidence"]}, {"rows": 3}], ids=str)
def test_the_same_request_with_another_id_and_other_values_is_recognised(
    both: Both, changes: dict[str, object]
) -> None:
    first = request("first", **changes).SerializeToString()  # type: ignore[arg-type]
    assert not is_known(both.known, first)
    both.answers(first)
    for request_id, scale in (("", 2), ("second", -1), ("x" * 100, 0.5)):
        again = request(request_id, scale=scale, **changes).SerializeToString()  # type: ignore[arg-type]
        assert is_known(both.known, again)
        known, read = both.answers(again)
        assert known == read
        assert isinstance(known, messages.ModelInferResponse)
        assert known.id == request_id


def test_what_differs_elsewhere_is_not_recognised(both: Both) -> None:
    both.answers(request("a").SerializeToString())
    other_parameter = request("a")
    other_parameter.parameters["calibrator"].string_param = "none"
    longer, twice = request("a", rows=2), request("a")
    twice.inputs.append(twice.inputs[0])
    for other in (other_parameter, longer, twice, request("a", outputs=["label"]), request("a", version="1")):
        assert not is_known(both.known, other.SerializeToString())


def test_an_id_that_is_not_text_is_refused_though_the_rest_is_known(both: Both) -> None:
    both.answers(request("ab").SerializeToString())
    data = request("ab").SerializeToString().replace(b"\x1a\x02ab", b"\x1a\x02\xff\xfe")
    known, read = both.answers(data)
    assert known == read == "InvalidRequest: the request's bytes are not a inference.ModelInferRequest"


def test_a_nan_is_found_in_a_request_that_was_recognised(both: Both) -> None:
    both.answers(request("a").SerializeToString())
    data = request("a", scale=float("nan")).SerializeToString()
    assert is_known(both.known, data)
    known, read = both.answers(data)
    assert known == read
    assert "holds nan at index [0, 0]" in str(known)


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES"])
def test_values_that_need_a_look_are_always_read(both: Both, datatype: str) -> None:
    made = messages.ModelInferRequest(model_name=f"echo_{datatype}")
    made.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    made.raw_input_contents.append(b"\0\1" if datatype == "BOOL" else b"\1\0\0\0a\1\0\0\0b")
    both.answers(made.SerializeToString())
    assert not is_known(both.known, made.SerializeToString())


def test_two_fields_of_one_name_are_read_in_full(both: Both) -> None:
    """Protobuf takes the last of two ids; bytes that hold two are never taken for a template."""
    data = b"\x0a\x03mlp" + b"\x1a\x01a" + b"\x1a\x01a" + request("").SerializeToString()[5:]
    assert not isinstance(both.answer(both.known, data), str)
    assert not is_known(both.known, data)


def test_another_model_of_the_name_is_read_again(both: Both, repository_root: Path) -> None:
    data = request("a").SerializeToString()
    both.answers(data)
    both.repository.put("mlp", both.repository.load("mlp"))
    known, read = both.answers(data)
    assert known == read
    both.repository.remove("mlp")
    known, read = both.answers(data)
    assert known == read
    assert isinstance(known, str)


def test_templates_are_bounded(both: Both) -> None:
    for rows in range(1, MAX_TEMPLATES + 20):
        both.answer(both.known, request("a", rows=rows).SerializeToString())
    assert sum(map(len, both.known._templates._kept.values())) <= MAX_TEMPLATES


def test_a_damaged_request_meets_the_same_fate_either_way(both: Both) -> None:
    good = request("abc", outputs=["probabilities"]).SerializeToString()
    both.answer(both.known, good)

    @given(st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=3))
    @settings(derandomize=True, max_examples=400, deadline=None)
    def same_fate(changes: list[tuple[int, int]]) -> None:
        damaged = bytearray(good)
        for position, byte in changes:
            damaged[position] = byte
        known, read = both.answers(bytes(damaged))
        assert known == read

    same_fate()


def test_a_request_that_fills_a_run_is_told_before_its_call_returns(both: Both) -> None:
    batcher = both.repository.get("mlp", "").batcher
    batcher.limits = replace(batcher.limits, rows=2, delay_us=60_000_000)
    told: list[bytes] = []

    async def ask_twice() -> None:
        def tell(answer: bytes, error: BaseException | None) -> None:
            assert error is None
            told.append(answer)

        first, second = (
            both.known.model_infer_direct(request(name).SerializeToString(), Call(), tell) for name in ("one", "two")
        )
        assert first is not None
        assert second is None

    asyncio.run(ask_twice())
    assert [messages.ModelInferResponse.FromString(answer).id for answer in told] == ["one", "two"]
