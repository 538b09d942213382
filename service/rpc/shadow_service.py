"""calserve.v1.ShadowService: challengers in shadow, and their promotion."""

from __future__ import annotations

from dataclasses import dataclass

from calserve.v1 import shadow_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from service.learning.shadow import BETTER, COUNTED, UNDECIDED, WORSE
from service.learning.shadows import AUTOMATIC, LEAST_LABELS, LEVEL, MANUAL, Shadows, ShadowState
from service.rpc.methods import Call, Method, methods_of
from service.rpc.wire import SHADOW_SERVICE
from service.store.shadows import PROMOTED, RUNNING, STOPPED

_POLICIES = {
    pb.PROMOTION_POLICY_UNSPECIFIED: MANUAL,
    pb.PROMOTION_POLICY_MANUAL: MANUAL,
    pb.PROMOTION_POLICY_AUTOMATIC: AUTOMATIC,
}
_POLICY_NUMBERS = {MANUAL: pb.PROMOTION_POLICY_MANUAL, AUTOMATIC: pb.PROMOTION_POLICY_AUTOMATIC}
_VERDICTS = {
    UNDECIDED: pb.SHADOW_VERDICT_UNDECIDED,
    BETTER: pb.SHADOW_VERDICT_BETTER,
    WORSE: pb.SHADOW_VERDICT_WORSE,
}
_OUTCOMES = {
    RUNNING: pb.SHADOW_OUTCOME_RUNNING,
    PROMOTED: pb.SHADOW_OUTCOME_PROMOTED,
    STOPPED: pb.SHADOW_OUTCOME_STOPPED,
}


@dataclass(frozen=True)
class ShadowService:
    """Servicer of calserve.v1.ShadowService."""

    shadows: Shadows

    def methods(self) -> list[Method]:
        return methods_of(SHADOW_SERVICE, self)

    async def start_shadow(self, request: pb.StartShadowRequest, call: Call) -> pb.Shadow:
        state = await self.shadows.start(
            request.model,
            request.revision,
            policy=_POLICIES.get(request.policy, str(request.policy)),
            level=request.level or LEVEL,
            least_labels=request.least_label_count or LEAST_LABELS,
            share=request.share,
            by=call.owner,
        )
        return _message(state)

    async def get_shadow(self, request: pb.GetShadowRequest, call: Call) -> pb.Shadow:
        return _message(await self.shadows.get(request.model, request.revision))

    async def list_shadows(self, request: pb.ListShadowsRequest, call: Call) -> pb.ListShadowsResponse:
        return pb.ListShadowsResponse(shadows=map(_message, await self.shadows.of_model(request.model)))

    async def stop_shadow(self, request: pb.StopShadowRequest, call: Call) -> pb.Shadow:
        return _message(await self.shadows.stop(request.model, request.revision, call.owner))

    async def promote_shadow(self, request: pb.PromoteShadowRequest, call: Call) -> pb.Shadow:
        return _message(await self.shadows.promote(request.model, request.revision, call.owner))


def _message(state: ShadowState) -> pb.Shadow:
    row, found = state.row, state.comparison
    low, high = found.gain.interval(row.level)
    return pb.Shadow(
        model=row.model,
        revision=row.revision,
        champion=row.champion,
        policy=_POLICY_NUMBERS[row.policy],
        level=row.level,
        least_label_count=row.least_labels,
        share=row.share,
        outcome=_OUTCOMES[row.outcome],
        verdict=_VERDICTS[found.verdict],
        verdict_time=_time(found.verdict_ms),
        label_count=found.gain.n_labels,
        gain=found.gain.mean,
        gain_low=low,
        gain_high=high,
        log_loss_gain=found.log_loss_gain / max(1, found.gain.n_labels),
        contesting_count=found.contesting(row.level),
        rows={name: found.counts[name] for name in COUNTED},
        start_time=_time(row.start_ms),
        compared_since=_time(row.since_ms),
        end_time=_time(row.end_ms),
        started_by=row.started_by,
        ended_by=row.ended_by,
        note=row.note,
    )


def _time(milliseconds: int) -> Timestamp | None:
    """None of what has not come."""
    if not milliseconds:
        return None
    time = Timestamp()
    time.FromMilliseconds(milliseconds)
    return time
