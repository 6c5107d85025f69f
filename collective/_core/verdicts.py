"""What a member does about the verdicts of its epoch's agreement, which come to all members in one order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from collective import scopes
from collective._core.operations import BriefOperation, Disagreement
from collective.errors import GroupBroken
from collective.scopes import ROOT, Ending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._core.agreement import Briefs, Calls, Metas
    from collective._core.engine import Engine
    from collective._core.epoch import Epoch
    from collective._core.pipeline import Pending


class Verdicts:
    """The Onlooker of one epoch."""

    def __init__(self, engine: Engine, epoch: Epoch) -> None:
        self._engine = engine
        self._epoch = epoch

    def on_agreed(self, pending: Pending, metas: Metas, briefs: Briefs = None) -> None:
        """Issue what all members called, unless what they passed does not fit together."""
        epoch, operation = self._epoch, pending.operation
        pending.seq = operation.seq = epoch.agreed
        epoch.agreed += 1
        try:
            operation.agree(metas)
        except Disagreement as error:
            what = operation.describe()
            self._disagree(pending, [([rank], f"{what}: {said}") for rank, said in enumerate(error.said)])
            epoch.agreement.issued(pending)
        else:
            if briefs is not None and isinstance(operation, BriefOperation) and operation.is_settled_by(briefs):
                epoch.pipeline.settle(pending, partial(operation.settle, briefs))
            else:
                epoch.pipeline.add(pending)
        epoch.take_cut()

    def on_mismatch(self, pending: Pending | None, scope: bytes, calls: Calls) -> None:
        """Fail what this member called there; with the scope, or with the group."""
        if pending is not None:
            self._disagree(pending, calls)
            return
        place = self._epoch.agreed
        self._epoch.note_mismatch(scope, place, calls)
        if scope[:ROOT] == scopes.DEFAULT.root:
            self._break(place)
        else:
            self._end(scope[:ROOT], calls)

    def on_scope_ended(self, root: bytes, ending: Ending) -> None:
        """Fail what is not agreed there."""
        engine = self._engine
        ending = Ending(*ending)
        engine.ended.add(root, ending)
        waiting = [each for each in self._epoch.pending.values() if each.scope.root == root and not each.agreed]
        self.on_withdrawn(waiting, ending)
        self._epoch.mailbox.end_scope(root, ending)

    def on_withdrawn(self, withdrawn: Sequence[Pending], ending: Ending) -> None:
        """Fail what no other member knows of, and none will."""
        for pending in withdrawn:
            if self._epoch.pending.pop(pending.number, None) is not None:
                pending.fail(ending.error(self._engine.name, pending.scope, pending.work.description))

    def on_failure(self, pending: Pending, error: BaseException) -> None:
        """Break the group: no member can be told of this call."""
        if pending.number in self._epoch.pending:
            self._engine.faults.on_library_failed(self._epoch, pending, error)

    def _disagree(self, pending: Pending, calls: Calls) -> None:
        epoch, scope = self._epoch, pending.scope
        place = pending.seq if pending.agreed else epoch.agreed
        epoch.pending.pop(pending.number, None)
        epoch.mismatch(scope)  # it is told now
        pending.fail(scopes.mismatch(self._engine.name, scope, place, calls))
        if scope.ends:
            self._end(scope.root, calls)
        else:
            self._break(place)

    def _end(self, root: bytes, calls: Calls) -> None:
        cause = f"they called different things: {'; '.join(what for _, what in calls)}"
        self.on_scope_ended(root, Ending(calls[0][0][0], "its members", "", "", cause))

    def _break(self, place: int) -> None:
        name = self._engine.name
        self._epoch.cut(self._epoch.agreed, lambda: GroupBroken(name, f"its members disagreed at place {place}"))
