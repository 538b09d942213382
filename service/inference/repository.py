"""The model repository: Triton's layout, read from disk.

<root>/<model>/<version>/model.onnx
<root>/<model>/config.pbtxt            optional: max_batch_size, inputs, outputs, version policy
<root>/<model>/calserve.toml           optional: where the logits and the features are, class names
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from calserve.open_inference import messages
from google.protobuf import text_format

from calibrators import inspect_model
from calibrators.graph import FURTHER_OUTPUTS
from calibrators.inspection import Inspection
from service.errors import CalserveError, InvalidRequest, NotFound, NotReady, Refused, Stale, shown
from service.inference.batcher import Limits
from service.inference.datatypes import NUMPY
from service.inference.input_signals import MOST_PROJECTIONS
from service.inference.model import ServedModel
from service.inference.session import Device, TensorSpec, at_most

log = logging.getLogger(__name__)

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,17}")
SIGNAL_KEYS = ("logits", "log_odds", "probabilities", "probability", "features")
TOML_KEYS = (*SIGNAL_KEYS, "labels", "journal")
JOURNAL_MODES = ("off", "async", "sync")
LOAD_SECONDS = 600.0
"""A model may loop for ever on the rows that are made up for its first runs; an engine for a GPU takes minutes."""
TOML_LISTS = ("layers",)
TOML_MONITOR = {"input_projections": MOST_PROJECTIONS}
"""Keys of the table [monitor]: whole numbers from 0 to these."""


@dataclass(frozen=True)
class ModelFolder:
    """What a model's folder says, before anything is loaded."""

    path: Path
    config: Any  # inference.ModelConfig
    signals: dict[str, Any]  # tensor names written in calserve.toml, lists of them under TOML_LISTS
    class_names: tuple[str, ...]
    journal: str = ""  # off, async or sync; empty: as the server is set
    input_projections: int = 0  # kept of each row's inputs, for monitors

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def read(cls, path: Path, config: Any = None) -> ModelFolder:
        """Refused, naming file and key, for files that cannot be understood. `config` stands in for config.pbtxt."""
        config = _checked(path, _read_config(path) if config is None else config)
        settings = _read_toml(path / "calserve.toml")
        labels = settings.pop("labels", None) or next(
            (o.label_filename for o in config.output if o.label_filename), None
        )
        journal, monitor = settings.pop("journal", ""), settings.pop("monitor", {})
        if journal and journal not in JOURNAL_MODES:
            words = ", ".join(JOURNAL_MODES)
            raise Refused(f"calserve.toml of model {path.name!r}: journal must be one of {words}; got {journal!r}")
        return cls(path, config, settings, _read_labels(path, labels), journal, monitor.get("input_projections", 0))

    def versions(self) -> list[str]:
        """The versions that the policy selects (default: the latest), ascending; Refused if there is none."""
        found = sorted(int(p.name) for p in self.path.iterdir() if p.is_dir() and VERSION.fullmatch(p.name))
        policy = self.config.version_policy
        match policy.WhichOneof("policy_choice"):
            case "all":
                chosen = found
            case "specific":
                chosen = [version for version in found if version in policy.specific.versions]
            case _:
                chosen = found[-(policy.latest.num_versions or 1) :]
        if not chosen:
            raise Refused(
                f"model {self.name!r} has no version folder that its policy selects (found {found or 'none'})"
            )
        return [str(version) for version in chosen]

    def read_model(self, version: str) -> tuple[onnx.ModelProto, str]:
        """The model and the sha256 of its file."""
        filename = self.config.default_model_filename or "model.onnx"
        path = self.path / version / filename
        if Path(filename).name != filename or not path.is_file():
            raise Refused(f"model {self.name!r} version {version} has no file {filename!r}")
        data = path.read_bytes()
        proto = onnx.ModelProto()
        try:
            proto.ParseFromString(data)
        except Exception as error:  # protobuf's DecodeError has no public home that is stable across releases
            raise Refused(f"{filename} of model {self.name!r} version {version} is not an ONNX file") from error
        if not proto.graph.output:
            raise Refused(
                f"{filename} of model {self.name!r} version {version} is not an ONNX model: it has no outputs"
            )
        return proto, hashlib.sha256(data).hexdigest()

    def inspect(self, proto: onnx.ModelProto) -> Inspection:
        """Where the signals are; ValueError with the reason if the model is no classifier."""
        return inspect_model(proto, **self.signals)


@dataclass
class Repository:
    """The loaded models, and why others are not.

    The map of models is replaced, never changed: who reads it, in whatever thread, sees all of a change or nothing.

    Attributes
    ----------
    at_start : names of the models to load at start; None: all
    failures : model name -> why its last load failed; what was loaded before goes on serving
    unloaded : names of models that were there and were asked to leave
    loaded : set once every model serves what was active before; until then `get` says NotReady
    generation : another number whenever other models are served
    """

    root: Path
    device: Device
    limits: Limits = field(default_factory=Limits)
    at_start: Collection[str] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    unloaded: set[str] = field(default_factory=set)
    loaded: bool = False
    generation: int = 0
    _models: Mapping[str, dict[str, ServedModel]] = field(default_factory=dict)

    def load_all(self) -> None:
        """Load and warm the models to start with; one that fails is logged and named in `failures`."""
        names = [path.name for path in folders(self.root)] if self.at_start is None else self.at_start
        for name in names:
            try:
                self.put(name, self.load(name))
            except CalserveError as error:
                self.fail(name, error.message)

    def load(self, name: str, config: Any = None) -> dict[str, ServedModel]:
        """Load and warm the versions of a model, beside what is served. `config` stands in for config.pbtxt.

        Raises
        ------
        NotFound, Refused, Stale
            no such model; one that cannot be served; its files changed meanwhile
        """
        path = self.folder(name)
        before = fingerprint(path)
        try:
            versions = self._load(ModelFolder.read(path, config))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise Refused(f"the files of model {shown(name)} cannot be read: {reason}") from error
        if fingerprint(path) != before:
            _close(versions)
            raise Stale(f"the files of model {shown(name)} changed while they were read; load it again")
        return versions

    def folder(self, name: str) -> Path:
        """The folder of a model; NotFound if there is none."""
        for path in folders(self.root):
            if path.name == name:
                return path
        raise NotFound(f"no model {shown(name)} in the repository")

    def put(self, name: str, versions: dict[str, ServedModel]) -> list[ServedModel]:
        """Serve these versions from now on; return those that did before."""
        before = list(self._models.get(name, {}).values())
        self._models = {**self._models, name: versions}
        self.failures.pop(name, None)
        self.unloaded -= {name}
        self.generation += 1
        return before

    def remove(self, name: str, *, keep_name: bool = False) -> list[ServedModel]:
        """Serve a model no more; return the versions that did. Its name is kept as that of an unloaded one, or not."""
        before = list(self._models.get(name, {}).values())
        self._models = {other: versions for other, versions in self._models.items() if other != name}
        self.failures.pop(name, None)
        self.unloaded = self.unloaded | {name} if keep_name else self.unloaded - {name}
        self.generation += 1
        return before

    def fail(self, name: str, reason: str) -> None:
        self.failures[name] = reason
        log.error("model %s cannot be loaded: %s", name, reason)

    def serves(self, name: str) -> bool:
        return name in self._models

    @property
    def ready(self) -> bool:
        """Whether everything that is to be served is."""
        return self.loaded and all(map(self.serves, self.failures))

    def names(self) -> list[str]:
        """All models of the repository that were ever to be served: those that are, failed ones, unloaded ones."""
        return sorted({*self._models, *self.failures, *self.unloaded})

    def models(self) -> Iterator[ServedModel]:
        """Every loaded version, by name and version."""
        models = self._models
        for name in sorted(models):
            yield from models[name].values()

    def versions(self, name: str) -> list[str]:
        return list(self._models.get(name, ()))

    def get(self, name: str, version: str = "") -> ServedModel:
        """The model's version, its newest if none is named.

        Raises
        ------
        NotFound, NotReady, InvalidRequest
            no such model or version; one that failed to load or was unloaded; a version that is not a positive number
        """
        if version and not VERSION.fullmatch(version):
            raise InvalidRequest(f"a model version is a positive number or empty, got {shown(version)}")
        if not self.loaded:
            raise NotReady("the server is loading its models")
        loaded = self._models.get(name)
        if loaded is None:
            raise self._not_served(name)
        if not version:
            return next(reversed(loaded.values()))
        if version not in loaded:
            raise NotFound(f"model {shown(name)} has no version {version}; it has: {', '.join(loaded)}")
        return loaded[version]

    def close(self) -> None:
        for model in self.models():
            model.close()

    def _not_served(self, name: str) -> CalserveError:
        if name in self.failures:
            return NotReady(f"model {shown(name)} is not served: {self.failures[name]}")
        if name in self.unloaded:
            return NotReady(f"model {shown(name)} is not served: it was unloaded")
        return NotFound(f"no model {shown(name)}; there are: {', '.join(sorted(self._models)) or 'none'}")

    def _load(self, folder: ModelFolder) -> dict[str, ServedModel]:
        loaded: dict[str, ServedModel] = {}
        try:
            for version in folder.versions():
                with at_most(LOAD_SECONDS, f"to load and to run version {version} of model {folder.name!r}"):
                    loaded[version] = self._load_version(folder, version)
        except BaseException:
            _close(loaded)
            raise
        return loaded

    def _load_version(self, folder: ModelFolder, version: str) -> ServedModel:
        proto, digest = folder.read_model(version)
        try:
            inspection = folder.inspect(proto)
            model = self._serve(folder, version, proto, digest, inspection)
            for signal, tensor, reason in (
                ("logits", inspection.logits.tensor, inspection.logits.reason),
                ("features", inspection.features, inspection.features_reason),
            ):
                log.info("model %s/%s: %s from %r: %s", folder.name, version, signal, tensor, reason)
        except ValueError as error:
            if folder.signals:
                raise Refused(f"calserve.toml of model {folder.name!r}: {error}") from error
            log.warning("model %s/%s is served without calibration: %s", folder.name, version, error)
            model = self._serve(folder, version, proto, digest, None)
        if folder.class_names and model.is_classifier and len(folder.class_names) != model.n_classes:
            raise Refused(
                f"model {folder.name!r} has {model.n_classes} classes, its labels file {len(folder.class_names)}"
            )
        _check_config(folder, model)
        try:
            model.warm_up(model.active)
            model.measure()
        except InvalidRequest as error:
            log.warning("model %s/%s cannot be warmed up with made-up inputs: %s", folder.name, version, error.message)
        return model

    def _serve(
        self, folder: ModelFolder, version: str, proto: onnx.ModelProto, digest: str, inspection: Inspection | None
    ) -> ServedModel:
        return ServedModel(
            folder.name,
            version,
            proto,
            digest,
            self.device,
            inspection,
            config=folder.config,
            class_names=folder.class_names,
            limits=self.limits,
            journal=folder.journal,
            input_projections=folder.input_projections,
        )


def folders(root: Path) -> list[Path]:
    """The model folders below `root`, sorted by name; Refused if there is no such directory."""
    if not root.is_dir():
        raise Refused(f"the model repository {shown(str(root))} is not a directory")
    return sorted(path for path in root.iterdir() if path.is_dir() and MODEL_NAME.fullmatch(path.name))


Fingerprint = frozenset[tuple[str, int, int, int, int]]


def fingerprint(folder: Path) -> Fingerprint:
    """What tells one state of a model's files from another: their names, inodes, sizes and times of change."""
    found = set()
    for path in (*folder.glob("*"), *(file for version in folder.glob("[1-9]*") for file in version.glob("*"))):
        with contextlib.suppress(OSError):  # gone since it was listed, or not to be read at all
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                times = status.st_mtime_ns, status.st_ctime_ns
                found.add((str(path.relative_to(folder)), status.st_ino, status.st_size, *times))
    return frozenset(found)


def _close(versions: Mapping[str, ServedModel]) -> None:
    for model in versions.values():
        model.close()


def _read_config(path: Path) -> Any:
    config = messages.ModelConfig()
    file = path / "config.pbtxt"
    if file.is_file():
        try:
            text_format.Parse(file.read_text(), config, allow_unknown_field=True)
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise Refused(f"config.pbtxt of model {path.name!r}: {error}") from error
    return config


def _checked(path: Path, config: Any) -> Any:
    if config.name not in {"", path.name}:
        raise Refused(f"config.pbtxt of model {path.name!r} names another model, {shown(config.name)}")
    if config.max_batch_size < 0:
        raise Refused(f"config.pbtxt of model {path.name!r}: max_batch_size must be 0 or more")
    return config


def _read_toml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"calserve.toml of model {file.parent.name!r}: {error}") from error
    _check_monitor(file, settings.get("monitor", {}))
    for key, value in settings.items():
        if key == "monitor":
            continue
        listed = key in TOML_LISTS and isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not listed and (key not in TOML_KEYS or not isinstance(value, str)):
            raise Refused(
                f"calserve.toml of model {file.parent.name!r}: {shown(key)} = {shown(value)}; "
                f"known keys, each a string: {', '.join(TOML_KEYS)}; each a list of strings: {', '.join(TOML_LISTS)}"
            )
    return settings


def _check_monitor(file: Path, table: Any) -> None:
    for key, value in table.items() if isinstance(table, dict) else [("monitor", table)]:
        most = TOML_MONITOR.get(key, -1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            known = ", ".join(f"{name}, a whole number from 0 to {most}" for name, most in TOML_MONITOR.items())
            raise Refused(
                f"calserve.toml of model {file.parent.name!r}, table [monitor]: {shown(key)} = {shown(value)}; "
                f"known keys: {known}"
            )


def _read_labels(path: Path, filename: str | None) -> tuple[str, ...]:
    if filename is None:
        return ()
    file = path / filename
    if Path(filename).name != filename or not file.is_file():
        raise Refused(f"model {path.name!r} has no labels file {shown(filename)} in its folder")
    try:
        return tuple(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    except UnicodeDecodeError:
        raise Refused(f"the labels file {filename!r} of model {path.name!r} is not UTF-8 text") from None


def _check_config(folder: ModelFolder, model: ServedModel) -> None:
    """What config.pbtxt declares must be what the model has."""
    batched = folder.config.max_batch_size > 0
    own = dict(model.active.own_outputs.items())
    by_name = {spec.name: spec for spec in model.outputs}
    # What ModelConfig answered may come back: it declares calserve's outputs too.
    outputs = by_name | {name: by_name[served] for name, served in own.items()}
    inputs = {spec.name: spec for spec in model.inputs}
    for what, declared, actual in (("input", folder.config.input, inputs), ("output", folder.config.output, outputs)):
        for tensor in declared:
            if what == "output" and tensor.name in FURTHER_OUTPUTS and tensor.name not in actual:
                continue  # a revision computes it, which is not active yet
            if tensor.name not in actual:
                raise Refused(
                    f"config.pbtxt of model {folder.name!r}: the model has no {what} {shown(tensor.name)}; "
                    f"it has: {', '.join(actual)}"
                )
            _check_declared(folder.name, what, tensor, actual[tensor.name], batched=batched)


def _check_declared(model: str, what: str, declared: Any, actual: TensorSpec, *, batched: bool) -> None:
    datatype = messages.pool.FindEnumTypeByName("inference.DataType").values_by_number[declared.data_type].name[5:]
    datatype = "BYTES" if datatype == "STRING" else datatype
    if datatype in NUMPY and datatype != actual.datatype:
        raise Refused(f"config.pbtxt of model {model!r}: {what} {actual.name!r} is {actual.datatype}, not {datatype}")
    dims = ([-1] if batched else []) + list(declared.reshape.shape or declared.dims)
    agree = len(dims) == len(actual.shape) and all(
        a == b or -1 in (a, b) for a, b in zip(dims, actual.shape, strict=True)
    )
    if declared.dims and not agree:
        raise Refused(
            f"config.pbtxt of model {model!r}: {what} {actual.name!r} has shape {list(actual.shape)}, "
            f"the declared dims{' with the batch in front' if batched else ''} are {dims}"
        )
    if batched and actual.shape[:1] != (-1,):
        raise Refused(
            f"config.pbtxt of model {model!r}: max_batch_size > 0, but {what} {actual.name!r} has no batch dimension"
        )
