"""What a user sees on the node while something takes longer than a second, and after."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from server import PromptServer

EVENT = "hotpath.status"
# Statuses that a page can ask for again; the oldest are dropped.
_KEPT = 1000
_STATUSES: OrderedDict[tuple[str | None, str], dict[str, Any]] = OrderedDict()


def statuses(workflow: str | None) -> dict[str, dict[str, Any]]:
    """The last status of each node of a workflow and how many seconds ago it was told, by node id."""
    now = time.time()
    return {
        node: {**status, "age": now - status["time"]}
        for (of, node), status in list(_STATUSES.items())
        if of == workflow
    }


@dataclass(frozen=True)
class NodeText:
    """The status of one node of the canvas, for the browser that queued the prompt."""

    node_id: str | None

    def show(
        self, text: str, state: str = "done", reasons: Sequence[tuple[str, str]] = (), **facts: str | float
    ) -> None:
        """Tell the panel of the node.

        Args:
            text: one line that says it all.
            state: ``working``, ``compiling``, ``compiled``, ``recompiled``, ``eager``, ``skipped``, ``one_device``,
                ``stopped`` or ``done``.
            reasons: (what happened, the input that avoids it or nothing) in plain words.
            facts: numbers and names that js/texts.js has labels for; ``seconds`` in names are seconds.
        """
        server = getattr(PromptServer, "instance", None)
        if server is None or self.node_id is None:
            return
        workflow = _running_workflow(server)
        status = {
            "node": self.node_id,
            "workflow": workflow,
            "time": time.time(),
            "state": state,
            "text": text,
            "reasons": [{"reason": reason, "advice": advice} for reason, advice in reasons],
            "facts": facts,
        }
        key = (workflow, self.node_id)
        _STATUSES[key] = status
        _STATUSES.move_to_end(key)
        while len(_STATUSES) > _KEPT:
            _STATUSES.popitem(last=False)
        if server.client_id is not None:
            server.send_sync(EVENT, status, server.client_id)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Tell what ends the code within early, so that the node does not look as if it went on."""
        try:
            yield
        # The host's interrupt is no Exception.
        except BaseException as error:
            interrupted = isinstance(error, comfy.model_management.InterruptProcessingException)
            why = "interrupted" if interrupted else str(error) or type(error).__name__
            self.show(f"stopped: {why}", "stopped")
            raise


@dataclass(frozen=True)
class PartText(NodeText):
    """A part, ``name``, of what one node shows; ``parts`` are all of them. It is shown where it is new."""

    name: str
    parts: dict[str, str]
    text: NodeText
    _shown: list[str] = field(default_factory=list, init=False)

    def show(
        self, text: str, state: str = "done", reasons: Sequence[tuple[str, str]] = (), **facts: str | float
    ) -> None:
        if self._shown != [text]:
            self._shown[:] = [text]
            self.parts[self.name] = text
            self.text.show("; ".join(filter(None, self.parts.values())), state, reasons, **facts)

    def again(self) -> None:
        """Show what comes next whatever it is."""
        self._shown.clear()


def running_prompt() -> str | None:
    """Id of the prompt that runs; None without a server."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return None
    running, _ = server.prompt_queue.get_current_queue_volatile()
    return next((prompt_id for _, prompt_id, *_ in running), None)


def _running_workflow(server: PromptServer) -> str | None:
    """Id of the workflow whose prompt runs; None for a prompt that no canvas made."""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    for _number, _prompt_id, _prompt, extra_data, *_ in running:
        workflow = (extra_data.get("extra_pnginfo") or {}).get("workflow") or {}
        return workflow.get("id")
    return None


class StepClock:
    """How long the last step that is known to have ended took, without waiting for the device, and its kind."""

    def __init__(self) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event, Any] | None = None
        self._last: tuple[float, Any] | None = None

    def time(
        self,
        device: torch.device,
        step: Callable[[], Any],
        kind: Any = None,
        counts: Callable[[], bool] = lambda: True,
    ) -> Any:
        """Run ``step`` on ``device`` and return what it does. A step for which ``counts`` is false is not kept."""
        if device.type != "cuda":
            started = time.perf_counter()
            out = step()
            took = time.perf_counter() - started
            if counts():
                self._last = took, kind
            return out
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        out = step()
        end.record(stream)
        self.last()
        if counts():
            self._events = start, end, kind
        return out

    def last(self) -> tuple[float, Any] | None:
        """Seconds and kind of the last step; None before one has ended."""
        if self._events is not None and self._events[1].query():
            start, end, kind = self._events
            self._last = start.elapsed_time(end) / 1000, kind
            self._events = None
        return self._last
