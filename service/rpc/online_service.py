"""calserve.v1.OnlineService: what was learned online, and what of it serves."""

from __future__ import annotations

from dataclasses import dataclass

from calserve.v1 import online_service_pb2 as pb

from service.learning.online import Online, OnlineState
from service.learning.progress import COUNTED
from service.rpc.methods import Call, Method, methods_of
from service.rpc.wire import ONLINE_SERVICE


@dataclass(frozen=True)
class OnlineService:
    """Servicer of calserve.v1.OnlineService."""

    online: Online

    def methods(self) -> list[Method]:
        return methods_of(ONLINE_SERVICE, self)

    async def get_online_state(self, request: pb.GetOnlineStateRequest, call: Call) -> pb.OnlineState:
        return _message(await self.online.state(request.model))

    async def roll_back_online_state(self, request: pb.RollBackOnlineStateRequest, call: Call) -> pb.OnlineState:
        return _message(await self.online.roll_back(request.model, request.online_state))

    async def suspend_learning(self, request: pb.SuspendLearningRequest, call: Call) -> pb.OnlineState:
        return _message(await self.online.suspend(request.model, suspended=True))

    async def resume_learning(self, request: pb.ResumeLearningRequest, call: Call) -> pb.OnlineState:
        return _message(await self.online.suspend(request.model, suspended=False, skip_waiting=request.skip_waiting))

    async def replay_learning(self, request: pb.ReplayLearningRequest, call: Call) -> pb.ReplayLearningResponse:
        steps, learned, equal, since = await self.online.replay(request.model)
        return pb.ReplayLearningResponse(step_count=steps, learned_count=learned, equal=equal, since=since)


def _message(state: OnlineState) -> pb.OnlineState:
    gain, (low, high) = state.gain, state.gain.interval()
    message = pb.OnlineState(
        model=state.model,
        revision=state.revision,
        serving=state.serving.number,
        newest=state.step,
        suspended=bool(state.serving.suspended),
        rows={name: state.counts[name] for name in COUNTED},
        published_count=state.counts["published"],
        refused_count=state.counts["refused"],
        refused=state.verdict.refused,
        newest_log_loss=state.verdict.new,
        best_log_loss=state.verdict.best_loss,
        start_log_loss=state.verdict.start,
        waiting_count=state.waiting,
        seconds=state.seconds,
        gain=gain.total / max(1, gain.n_labels),
        gain_low=low,
        gain_high=high,
    )
    for kept in state.kept:
        message.kept.add(online_state=kept.number, learned_count=kept.learned).time.FromMilliseconds(
            int(1000 * kept.time)
        )
    return message
