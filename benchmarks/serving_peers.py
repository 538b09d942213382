"""The servers that are compared: how each is started on a model, and what it costs while it runs.

Each is started here, on free ports of 127.0.0.1 and on the cores it is given, each with one thread to a run. Peers run
in the Python that has them installed (`--peers mlserver=/path/to/python`); none is a dependency.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import grpc

from benchmarks.load import INFER
from benchmarks.serving_models import BenchmarkModel, request_bytes
from service.rpc.wire import INFERENCE_SERVICE, Stub, inference

HERE = Path(__file__).parent
READY_SECONDS = 90.0
STOP_SECONDS = 20.0
TICKS = os.sysconf("SC_CLK_TCK")
TRITON_CONFIG = """backend: "python"
max_batch_size: 64
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
output [ {{ name: "scores" data_type: TYPE_FP32 dims: [ {n_classes} ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
{batching}
"""


class Absent(Exception):
    """A server cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Start:
    """A command that starts a server, and what it needs in its environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Tls(NamedTuple):
    """The files of a server's key and of its certificate, which is its own authority."""

    key: Path
    certificate: Path


def made_tls(folder: Path) -> Tls:
    made = Tls(folder / "tls.key", folder / "tls.crt")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", "/CN=benchmark", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", made.key, "-out", made.certificate], capture_output=True, check=True)
    except FileNotFoundError as error:
        raise Absent("openssl, which makes the certificate, is not installed") from error
    return made


@dataclass(frozen=True)
class Place:
    """What a server is started with."""

    model: BenchmarkModel
    folder: Path
    python: str
    port: int
    extra: Sequence[str] = ()
    tls: Tls | None = None


def calserve(place: Place) -> Start:
    place.model.write(place.folder / "models")
    settings = {
        "model-repository": place.folder / "models",
        "data-dir": place.folder / "store",
        "port": place.port,
        "metrics-port": free_port(),
        "device": "cpu",
        "threads": 1,
    }
    if place.tls:
        settings |= {"tls-key": place.tls.key, "tls-cert": place.tls.certificate}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return Start([place.python, "-m", "service", "serve", *flags, *place.extra])


def calserve_grpc(place: Place) -> Start:
    """calserve with its other front."""
    start = calserve(place)
    return replace(start, arguments=[*start.arguments, "--front", "grpc"])


def reference(place: Place) -> Start:
    path = place.model.write(place.folder)
    words = [str(path), place.model.name, str(place.port), *map(str, place.tls or ())]
    return Start([place.python, "-m", "benchmarks.serving_reference", *words])


def floor(place: Place) -> Start:
    path = place.model.write(place.folder)
    return Start([place.python, "-m", "benchmarks.serving_floor", str(path), place.model.name, str(place.port)])


def mlserver(place: Place) -> Start:
    check_import(place.python, "mlserver")
    path = place.model.write(place.folder)
    implementation = {"name": place.model.name, "implementation": "serving_mlserver.OnnxModel"}
    settings = {
        "parallel_workers": 0,
        "host": "127.0.0.1",
        "grpc_port": place.port,
        "http_port": free_port(),
        "metrics_port": free_port(),
        "metrics_dir": str(place.folder),
        "debug": False,
    }
    (place.folder / "settings.json").write_text(json.dumps(settings))
    described = {**implementation, "parameters": {"uri": str(path)}}
    (place.folder / "model-settings.json").write_text(json.dumps(described))
    command = str(Path(place.python).parent / "mlserver")
    return Start([command, "start", str(place.folder)], {"PYTHONPATH": str(HERE)})


def kserve(place: Place) -> Start:
    check_import(place.python, "kserve")
    path = place.model.write(place.folder)
    ports = [str(place.port), str(free_port())]
    return Start([place.python, str(HERE / "serving_kserve.py"), str(path), place.model.name, *ports])


def triton_batching(place: Place) -> Start:
    return triton(place, "dynamic_batching { max_queue_delay_microseconds: 500 }")


def triton(place: Place, batching: str = "") -> Start:
    """Triton from the package nvidia-pytriton, which has the python backend alone."""
    packages = Path(check_import(place.python, "pytriton")).parent.parent
    home = packages / "pytriton" / "tritonserver"
    path = place.model.write(place.folder / "models")
    dims, classes = ", ".join(map(str, place.model.row_shape)), place.model.n_classes
    config = TRITON_CONFIG.format(dims=dims, n_classes=classes, batching=batching)
    (path.parent.parent / "config.pbtxt").write_text(config)
    shutil.copy(HERE / "serving_triton.py", path.parent / "model.py")
    version = run(place.python, "import sys; print('%d.%d' % sys.version_info[:2])")
    backend = place.folder / "backends" / "python"  # it looks for its stub nowhere else
    backend.mkdir(parents=True)
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in (stub, *(home / "backends" / "python").iterdir()):
        (backend / file.name).symlink_to(file)
    flags = {
        "model-repository": place.folder / "models",
        "backend-directory": backend.parent,
        "grpc-port": place.port,
        "grpc-address": "127.0.0.1",
        "allow-http": "false",
        "allow-metrics": "false",
    }
    libraries = [str(packages / "nvidia_pytriton.libs"), run(place.python, LIBRARY_FOLDER)]
    environment = {"LD_LIBRARY_PATH": ":".join(libraries), "PYTHONPATH": str(packages)}
    words = [f"--{name}={value}" for name, value in flags.items()]
    return Start([str(home / "bin" / "tritonserver"), *words], environment)


LIBRARY_FOLDER = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"


@dataclass(frozen=True)
class Server:
    """One way to serve a model. `streams`: it answers on a bidirectional stream as the protocol says. `tls`: it can be
    started with TLS here.
    """

    name: str
    start: Callable[[Place], Start]
    streams: bool = True
    tls: bool = False


SERVERS = {
    server.name: server
    for server in (
        Server("reference", reference, tls=True),
        Server("floor", floor, streams=False),
        Server("calserve", calserve, tls=True),
        Server("calserve-grpc", calserve_grpc, tls=True),
        Server("triton", triton),
        Server("triton-batching", triton_batching),
        Server("mlserver", mlserver, streams=False),
        Server("kserve", kserve, streams=False),
    )
}


class Running:
    """A server on a model, from its first answer until `stop`."""

    def __init__(
        self,
        server: Server,
        model: BenchmarkModel,
        *,
        cores: set[int],
        python: str = sys.executable,
        extra: Sequence[str] = (),
        tls: bool = False,
    ) -> None:
        if tls and not server.tls:
            raise Absent(f"{server.name} is not started with TLS here")
        self.server, self.model = server, model
        self._exits = ExitStack()
        folder = Path(self._exits.enter_context(tempfile.TemporaryDirectory(prefix=f"{server.name}-")))
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._log = (folder / "log").open("w+b")
        self._exits.callback(self._log.close)
        try:
            self.tls = made_tls(folder) if tls else None
            self._process = self._launch(server.start(Place(model, folder, python, port, extra, self.tls)), cores)
            self._exits.callback(self._end)
            self.start_seconds = self._wait()
        except BaseException:
            self._exits.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._exits.close()

    def cpu_seconds(self) -> float:
        """User and system time of the process and of its children so far."""
        return sum(_cpu_ticks(pid) for pid in self.processes()) / TICKS

    def resident_bytes(self) -> int:
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.processes())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def batches(self) -> tuple[int, int]:
        """Rows answered and runs made so far, by the server's own statistics; zeros where it has none."""
        with self.channel() as channel:
            request = inference.ModelStatisticsRequest(name=self.model.name)
            try:
                (found,) = Stub(channel, INFERENCE_SERVICE).ModelStatistics(request, timeout=10).model_stats
            except grpc.RpcError:
                return 0, 0
        return found.inference_count, found.execution_count

    def maps(self, library: str) -> bool:
        """Whether a file of that name is mapped into one of its processes."""
        return any(library in Path(f"/proc/{pid}/maps").read_text() for pid in self.processes())

    def channel(self) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if self.tls:
            credentials = grpc.ssl_channel_credentials(self.tls.certificate.read_bytes())
            return grpc.secure_channel(self.address, credentials, options)
        return grpc.insecure_channel(self.address, options)

    def processes(self) -> list[int]:
        return list(_tree(self._process.pid))

    def _launch(self, start: Start, cores: set[int]) -> subprocess.Popen[bytes]:
        self._begun = time.perf_counter()
        return subprocess.Popen(
            start.arguments,
            env={**os.environ, "OMP_NUM_THREADS": "1", **start.environment},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def _wait(self) -> float:
        """Seconds from the start of the process to its first answer."""
        request = request_bytes(self.model.name, self.model.rows(1))
        host, port = self.address.split(":")
        while True:
            if self._process.poll() is not None or time.perf_counter() - self._begun > READY_SECONDS:
                raise Absent(f"{self.server.name} did not start: {self._last_line()}")
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                with self.channel() as channel:
                    channel.unary_unary(INFER)(request, timeout=30)
                return time.perf_counter() - self._begun
            except (OSError, grpc.RpcError):
                time.sleep(0.01)

    def wait_for_workers(self, count: int) -> None:
        """Until so many processes listen: what connects before goes to those that do, and stays there."""
        port = f"{int(self.address.rpartition(':')[2]):04X}"
        while _listeners(port) < count:
            if time.perf_counter() - self._begun > READY_SECONDS:
                raise Absent(f"{self.server.name} did not start {count} workers: {self._last_line()}")
            time.sleep(0.01)

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it wrote nothing"

    def _end(self) -> None:
        children = self.processes()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in children[1:]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


def _listeners(port: str) -> int:
    """Sockets that listen on that port, given in hexadecimal."""
    lines = (line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines())
    return sum(fields[3] == "0A" and fields[1].endswith(f":{port}") for fields in lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_import(python: str, module: str) -> str:
    """Where the module lies; Absent if that Python has none."""
    code = f"import importlib.util as u; print(u.find_spec({module!r}).origin)"
    return run(python, code, f"the Python given has no {module}")


def run(python: str, code: str, problem: str = "") -> str:
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Absent(f"{python} cannot be started") from error
    if done.returncode:
        raise Absent(problem or done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def _tree(pid: int) -> Iterator[int]:
    """The process and its descendants that are alive."""
    try:
        children = [c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:
        return
    yield pid
    for child in children:
        yield from _tree(int(child))


def _cpu_ticks(pid: int) -> int:
    """utime, stime and those of children that have ended; see proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15]))
