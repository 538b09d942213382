"""Two graphs with an index between them, run as if they were one.

The first is the model's, with the layers that the calibrator reads; the index looks their distances up; the second is
the calibrator's own, from logits and distances to the outputs. All in the thread that makes the run, so one answer is
of one revision, and what runs cost is learned with the search in it. The search releases the interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from calibrators import Calibrator
from calibrators.graph import FEATURES, LOGITS, PREFIX, stage
from service.inference.bindings import NOTHING
from service.inference.session import Device, Session

Arrays = Mapping[str, NDArray[Any]]


class IndexedSession(Session):
    """The session of a calibrator's own graph, which reads what the session of a model's graph and an index give.

    `model` has the logits and the layers among its outputs. Those that bear a name of the calibrator's give way.
    """

    def __init__(self, model: Session, calibrator: Calibrator, device: Device) -> None:
        super().__init__(stage(calibrator).to_bytes(), device)
        self._before, self._calibrator = model, calibrator
        self._signals = [spec.name for spec in model.outputs if spec.name in (LOGITS, FEATURES)]
        self._own = {spec.name for spec in self.outputs}
        by_name = {spec.name: spec for spec in (*model.outputs, *self.outputs)}
        self.inputs, self.outputs = model.inputs, list(by_name.values())

    def run_with(self, outputs: Sequence[str], feeds: Arrays, parameters: Arrays) -> list[NDArray[Any]]:
        own = [name for name in outputs if name in self._own]
        before = dict.fromkeys([*outputs, *(self._signals if own else ())])
        wanted = [name for name in before if name not in own]
        values = dict(zip(wanted, self._before.run_with(wanted, feeds, NOTHING), strict=True))
        if own:
            signals = {name.removeprefix(PREFIX): values[name] for name in self._signals}
            read = {"logits": signals["logits"], **self._calibrator.look_up(**signals)}
            values |= zip(own, super().run_with(own, read, parameters), strict=True)
        return [values[name] for name in outputs]

    def warm_up(self, outputs: Sequence[str], feeds: Arrays, parameters: Arrays = NOTHING) -> list[NDArray[Any]]:
        return self.run_with(outputs, feeds, parameters)
