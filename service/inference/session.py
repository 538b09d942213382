"""One onnxruntime session. The only file that imports onnxruntime.

Sessions are made from bytes that were read and hashed before, so a model cannot pull in other files (external data by
path is refused by the runtime when it is given bytes).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlinePassed, InvalidRequest, Overloaded, Refused
from service.inference import datatypes
from service.inference.bindings import BFLOAT16, NOTHING, Arrays, Bindings, Graphs, array_of
from service.inference.device_loss import DeviceLoss, DeviceLost, Failure, failure_of

# Read once, on import: else the runtime sends names and hashes of models to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

log = logging.getLogger(__name__)

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

_WARNINGS = 2  # the runtime's default
_QUIET = 3  # warnings are about the graph, errors come as exceptions
_SILENT = 4  # of the probe, whose failure is an answer
_STOPPED = "terminate flag"
_OPERATOR = re.compile(r"while running (\w+) node")
_WANTED = re.compile(r"(auto|cpu)|(cuda|tensorrt)(?::(\d+))?")


@dataclass(frozen=True)
class TensorSpec:
    """Name, datatype (the protocol's word; of sequences and maps the runtime's) and shape (-1: any size)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """Where sessions run, decided once at start.

    Attributes
    ----------
    provider, options : the runtime's name for it, and what it is told
    threads : of one run, for what the CPU computes
    bound : runs go through I/O binding. On the CPU a plain run is as fast and may be made by several threads at once
    pinned : batches pass through page-locked memory
    graphs : batches of the shapes that were warmed up are replayed as CUDA graphs
    loss : whether it is lost, and what follows; shared by all sessions
    """

    provider: str
    options: Mapping[str, str]
    threads: int
    bound: bool = False
    pinned: bool = False
    graphs: bool = False
    loss: DeviceLoss = field(default_factory=DeviceLoss, compare=False, repr=False)

    @classmethod
    def choose(
        cls,
        wanted: str,
        threads: int,
        *,
        memory_limit_bytes: int = 0,
        cuda_graphs: bool = False,
        fp16: bool = False,
        loss: DeviceLoss | None = None,
    ) -> Device:
        """`auto`, `cpu`, `cuda[:index]` or `tensorrt[:index]`; auto is CUDA where it works, else the CPU.

        Raises
        ------
        Refused
            if what is asked for, a device or a way to use it, is not there
        """
        match = _WANTED.fullmatch(wanted)
        if not match:
            raise Refused(f"device must be auto, cpu, cuda, tensorrt, cuda:<index> or tensorrt:<index>, got {wanted!r}")
        kind, index = match[1] or match[2], int(match[3] or 0)
        device = cls(CPU, {}, threads, loss=loss or DeviceLoss())
        if kind != "cpu" and _works(TENSORRT if kind == "tensorrt" else CUDA, index, quietly=kind == "auto"):
            device = device._on_gpu(kind == "tensorrt", index, memory_limit_bytes)
        elif kind in {"cuda", "tensorrt"}:
            name = "CUDA" if kind == "cuda" else "TensorRT"
            raise Refused(f"device {wanted!r} was asked for, but onnxruntime finds no usable {name} device here")
        return device._with_extras(cuda_graphs=cuda_graphs, fp16=fp16)

    @property
    def on_cpu(self) -> bool:
        return self.provider == CPU

    @property
    def index(self) -> int:
        return int(self.options.get("device_id", 0))

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """What the runtime may use, in order: what one provider cannot compute goes to the next."""
        first = [(self.provider, dict(self.options))]
        cuda = [(CUDA, {"device_id": str(self.index)})] if self.provider == TENSORRT else []
        return first + cuda + ([] if self.on_cpu else [(CPU, {})])

    @property
    def usable(self) -> bool:
        """Whether sessions can run: on it, or on the CPU in its place."""
        return not self.loss.lost or self.loss.policy == "cpu"

    def current(self) -> Device:
        """Itself; once it is lost the CPU, or NotReady, as its policy says."""
        if self.on_cpu or not self.loss.lost:
            return self
        self.loss.check_fallback()
        return Device(CPU, {}, self.threads, loss=self.loss)

    def without_graphs(self) -> Device:
        options = {key: value for key, value in self.options.items() if key != "enable_cuda_graph"}
        return replace(self, options=options, graphs=False)

    def _on_gpu(self, tensorrt: bool, index: int, memory_limit_bytes: int) -> Device:
        limit = str(memory_limit_bytes) if memory_limit_bytes else ""
        options = {"device_id": str(index)}
        if tensorrt:
            options |= {"trt_max_workspace_size": limit} if limit else {}
        else:
            # TF32 keeps 10 bits of a float32's 23. The exhaustive search for a convolution's algorithm, the runtime's
            # default, runs again for every new batch size.
            options |= {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
            options |= {"gpu_mem_limit": limit, "arena_extend_strategy": "kSameAsRequested"} if limit else {}
        return replace(self, provider=TENSORRT if tensorrt else CUDA, options=options, bound=True, pinned=True)

    def _with_extras(self, *, cuda_graphs: bool, fp16: bool) -> Device:
        options = dict(self.options)
        for asked, name, provider, option in (
            (cuda_graphs, "cuda_graphs", CUDA, "enable_cuda_graph"),
            (fp16, "fp16", TENSORRT, "trt_fp16_enable"),
        ):
            if asked and self.provider != provider:
                raise Refused(f"{name} was asked for, which {provider} alone has; the device is {self.provider}")
            options |= {option: "1"} if asked else {}
        return replace(self, options=options, graphs=cuda_graphs)


class _Thread(threading.local):
    options: Any = None  # of the runs that this thread makes


_thread = _Thread()


class Stop:
    """Inside `with stop:` the runs of this thread end with DeadlinePassed once another thread calls `now`: at the next
    operator or turn of a loop."""

    def __init__(self) -> None:
        self.asked = False
        self._options: Any = None

    def now(self) -> None:
        self.asked = True
        if self._options is not None:
            self._options.terminate = True

    def __enter__(self) -> Self:
        _thread.options = self._options = _graph_options(-1)
        self._options.log_severity_level = _SILENT  # the runtime takes it for an error
        if self.asked:
            self._options.terminate = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        _thread.options = None


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Refused if the runs made inside take longer."""
    stop = Stop()
    timer = threading.Timer(seconds, stop.now)
    timer.daemon = True
    timer.start()
    try:
        with stop:
            yield
    except DeadlinePassed:
        raise Refused(f"{what} takes more than {seconds:g} seconds") from None
    finally:
        timer.cancel()


class Session:
    """A loaded graph: feeds in, arrays out. A run may be made from any thread; it releases the GIL."""

    def __init__(self, model: bytes, device: Device) -> None:
        self._device = device
        self._loaded = _load(model, device)
        self._model = model if device.loss.policy == "cpu" and not self._loaded.device.on_cpu else b""
        self._moving = threading.Lock()  # runs that failed together must not rebuild it twice
        self.inputs, self.outputs = self._loaded.inputs, self._loaded.outputs

    @property
    def provider(self) -> str:
        """The runtime's name for what computes a run now."""
        return self._loaded.device.provider

    def run(self, outputs: Sequence[str], feeds: Arrays) -> list[NDArray[Any]]:
        """Values of the named outputs; see `run_with`."""
        return self.run_with(outputs, feeds, NOTHING)

    def run_with(self, outputs: Sequence[str], feeds: Arrays, parameters: Arrays) -> list[NDArray[Any]]:
        """Values of the named outputs. `parameters` are inputs too, which stay on the device for as long as the same
        mapping is passed; nobody may change it after the first run.

        Raises
        ------
        InvalidRequest
            if the graph cannot compute these values (an index out of range, dimensions that do not agree)
        Overloaded
            if memory is short
        NotReady
            if the device is lost and its policy is not to fall back
        """
        try:
            return self._serving().run(outputs, feeds, parameters)
        except DeviceLost:
            return self._serving().run(outputs, feeds, parameters)

    def warm_up(self, outputs: Sequence[str], feeds: Arrays, parameters: Arrays = NOTHING) -> list[NDArray[Any]]:
        """`run_with`, and on a device with CUDA graphs batches of these shapes are replayed from now on."""
        self._serving().capture(outputs, feeds, parameters)
        return self.run_with(outputs, feeds, parameters)

    def _serving(self) -> _Loaded:
        """The loaded graph; once the device is lost, the one on the CPU, built by the first run that asks."""
        if self._device.loss.lost and not self._loaded.device.on_cpu:
            with self._moving:
                if not self._loaded.device.on_cpu:
                    replacement = _load(self._model, self._device)
                    self._device.loss.wrecks.append(self._loaded)
                    self._loaded, self._model = replacement, b""
        return self._loaded


class _Loaded:
    """A graph on one device, and the ways to run it."""

    def __init__(self, model: bytes, device: Device) -> None:
        self._session, self.device = _open(model, device)
        # The inner call. What is around it checks for another provider's buffers and for the fallback switched off
        # here, which takes a tenth of a small model's run.
        self._run = self._session._sess.run
        self.inputs = [_spec(node) for node in self._session.get_inputs()]
        self.outputs = [_spec(node) for node in self._session.get_outputs()]
        self._strings = {spec.name for spec in [*self.inputs, *self.outputs] if spec.datatype == "BYTES"}
        self._bfloat16 = {spec.name for spec in [*self.inputs, *self.outputs] if spec.datatype == "BF16"}
        graphs = Graphs(self._allocate, _graph_options) if self.device.graphs else None
        self._options = graphs.options(-1) if graphs else None
        pinned_for = self.device.index if self.device.pinned else None
        self._bindings = Bindings(self._session, pinned_for, graphs) if self.device.bound else None

    def run(self, outputs: Sequence[str], feeds: Arrays, parameters: Arrays) -> list[NDArray[Any]]:
        try:
            if self._bindings is None or not self._binds(outputs, feeds):
                return self._run_plainly(outputs, feeds, parameters)
            return self._run_bound(self._bindings, outputs, feeds, parameters)
        except InvalidRequest:
            raise
        except Exception as error:  # the runtime raises a dozen unrelated classes
            raise self._explained(str(error)) from error

    def capture(self, outputs: Sequence[str], feeds: Arrays, parameters: Arrays) -> None:
        if self._bindings is None or not self._binds(outputs, feeds):
            return
        try:
            self._bindings.capture(tuple(outputs), feeds, parameters)
        except RuntimeError as error:  # no room on the device; if it is lost, the run that follows says so
            log.warning("a batch of this shape gets no CUDA graph: %s", _first_line(error))

    def _allocate(self, shape: tuple[int, ...], element: Any) -> Any:
        kind = "cpu" if self.device.on_cpu else "cuda"
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, element, kind, self.device.index)

    def _binds(self, outputs: Sequence[str], feeds: Arrays) -> bool:
        """Strings have no fixed size, and of no rows some operators give other shapes than they declare."""
        return self._strings.isdisjoint((*outputs, *feeds)) and all(array.size for array in feeds.values())

    def _run_bound(
        self, bindings: Bindings, outputs: Sequence[str], feeds: Arrays, parameters: Arrays
    ) -> list[NDArray[Any]]:
        try:
            return bindings.run(tuple(outputs), feeds, parameters, _thread.options)
        except RuntimeError as error:  # of the runtime's classes the one that bound runs raise
            if failure_of(str(error), on_cpu=self.device.on_cpu) is not Failure.INPUT:
                raise
            # A plain run decides whose fault it is. If it succeeds, the graph gives other shapes than it declares.
            values = self._run_plainly(outputs, feeds, parameters)
            log.warning("a bound run failed where a plain one succeeds: %s", _first_line(error))
            bindings.distrust_declared_shapes()
            return values

    def _run_plainly(self, outputs: Sequence[str], feeds: Arrays, parameters: Arrays) -> list[NDArray[Any]]:
        given: dict[str, Any] = {**feeds, **parameters}
        options = _thread.options or self._options
        if self._strings or self._bfloat16:
            return self._run_converted(outputs, given, options)
        return list(self._run(outputs, given, options))

    def _run_converted(self, outputs: Sequence[str], given: dict[str, Any], options: Any) -> list[NDArray[Any]]:
        for name in self._strings & given.keys():
            given[name] = _text(name, given[name])
        for name in self._bfloat16 & given.keys():
            words = np.ascontiguousarray(given[name])
            given[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(words, BFLOAT16)
        if self._bfloat16.isdisjoint(outputs):
            return list(self._session.run(list(outputs), given, options))
        values = {name: _ort_value(value) for name, value in given.items()}
        return [array_of(value) for value in self._session.run_with_ort_values(list(outputs), values, options)]

    def _explained(self, text: str) -> Exception:
        if _STOPPED in text:
            return DeadlinePassed("the deadline passed while the model ran")
        failure = failure_of(text, on_cpu=self.device.on_cpu)
        if failure is Failure.DEVICE:
            self.device.loss.report(self.device.provider, _first_line(text))
            return DeviceLost()
        if failure is Failure.MEMORY:
            return Overloaded("there is not enough memory left for this run; ask again later, or for fewer rows")
        operator = _OPERATOR.search(text)
        where = f" (operator {operator[1]})" if operator else ""
        return InvalidRequest(f"the model cannot compute these inputs{where}: a value or a shape is out of its range")


def _load(model: bytes, device: Device) -> _Loaded:
    """On the device, or on what its policy puts in its place when it turns out to be lost."""
    try:
        return _Loaded(model, device.current())
    except DeviceLost:
        return _Loaded(model, device.current())


def _open(model: bytes, device: Device) -> tuple[Any, Device]:
    """The runtime's session, and the device as it is used: without CUDA graphs if the model cannot be captured."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    try:
        session = ort.InferenceSession(model, options, providers=device.providers(), enable_fallback=False)
    except Exception as error:  # the runtime raises a dozen unrelated classes
        if failure_of(str(error), on_cpu=device.on_cpu) is Failure.DEVICE:
            device.loss.report(device.provider, _first_line(error))
            raise DeviceLost from error
        if device.graphs and "graph capture" in str(error):
            log.warning("CUDA graphs are off for a model that cannot be captured: %s", _first_line(error))
            return _open(model, device.without_graphs())
        raise Refused(f"onnxruntime cannot load the model: {_first_line(error)}") from error
    if session.get_providers()[0] != device.provider:  # the runtime logs that and goes on without
        raise Refused(f"onnxruntime cannot load the model on {device.provider}, only on {session.get_providers()[0]}")
    return session, device


def _graph_options(number: int) -> Any:
    """Run as CUDA graph `number`; -1: neither capture nor replay."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _works(provider: str, index: int, *, quietly: bool) -> bool:
    """Whether the provider runs a graph here: the package lists providers that this machine lacks. What is missing is
    in the runtime's log alone, so it is let out where somebody asked for this provider."""
    if provider not in ort.get_available_providers():
        return False
    if importlib.util.find_spec("nvidia"):  # CUDA as wheels, outside the loader's path
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    ort.set_default_logger_severity(_SILENT if quietly else _WARNINGS)
    try:
        device = (provider, {"device_id": str(index)})
        session = ort.InferenceSession(_PROBE, options, providers=[device], enable_fallback=False)
        session.run(None, {"x": np.zeros(1, np.float32)})
    except Exception:  # no driver, no library, no such device: each has its own class
        return False
    finally:
        ort.set_default_logger_severity(_WARNINGS)
    return bool(session.get_providers()[0] == provider)


def _spec(node: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    return TensorSpec(node.name, datatypes.OF_RUNTIME.get(node.type, node.type), shape)


def _text(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """BYTES as the runtime's strings, which are UTF-8."""
    decoded = np.empty(array.size, dtype=object)
    for index, item in enumerate(array.ravel()):
        try:
            decoded[index] = item.decode() if isinstance(item, bytes) else str(item)
        except UnicodeDecodeError:
            raise InvalidRequest(f"input {name!r}: element {index} is not UTF-8, which ONNX strings are") from None
    return decoded.reshape(array.shape)


def _ort_value(value: Any) -> Any:
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value)


def _first_line(error: object) -> str:
    """The runtime's reason without the paths it likes to add."""
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"\S*/\S*", "...", text)[:300]


def _probe() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())


_PROBE = _probe()
