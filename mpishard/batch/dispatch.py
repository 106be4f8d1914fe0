"""How requests come to replicas and answers to the disk, while the replicas compute.

Rank 0 has the files, and is the job's `Coordinator`: it hands out requests to the replicas that
ask, and writes down the answers that arrive. It looks after that once in each step of its own
replica, and all the time when that one has nothing to do. So that nobody waits for it, the first
rank of each replica, which speaks for it at its `ReplicaClient`, asks for more than can run at
once.

No collective spans replicas. Between the ranks of one, a small all_reduce a step says what has
come, which then is broadcast, and whether any of them is to stop.

up      ask (so many requests), answer, stop (a rank is told to), done (no more will follow)
down    requests, stop, end (all is done)

Messages and not a shared counter, because one-sided operations too wait, on most networks, until
their target enters MPI; and answers have to travel in any case.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mpishard.batch.answers import Output
from mpishard.batch.job import BatchJob
from mpishard.batch.requests import BatchRequest
from mpishard.batch.texts import AnswerTexts
from mpishard.communication.collectives import MAX, all_reduce, broadcast
from mpishard.communication.mailbox import Mailbox
from mpishard.communication.mesh import Mesh
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.sequence import Request, RequestOutput
from mpishard.errors import UserError
from mpishard.sequences.inputs import TokenInput
from mpishard.tokenizer import IncrementalDetokenizer, Tokenizer, finish_output

TO_COORDINATOR, TO_REPLICA = 1, 2  # tags of messages to the coordinator, and to a replica

POLL_SECONDS = 0.001  # seconds between two looks of one who has nothing to do

Encode = Callable[[BatchRequest], TokenInput]


@dataclass
class Progress:
    """How far a job is: answers of this run and of earlier ones, tokens of this run."""

    total: int
    before: int
    answered: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def done(self) -> int:
        """All answers that are on disk."""
        return self.before + self.answered


@dataclass
class Coordinator:
    """Rank 0's side: hands out the requests of `task`, whose tokens `encode` finds, to the
    replicas, whose first ranks are `leaders`, and writes down their answers, for which `texts` has
    the model's tokenizer. `report` is called after answers have been written."""

    task: BatchJob
    post: Mailbox
    leaders: list[int]
    encode: Encode
    report: Callable[[Progress], None]
    texts: AnswerTexts
    progress: Progress = field(init=False)
    stopped: bool = False
    _asked: Counter[int] = field(default_factory=Counter)
    _heard: set[int] = field(default_factory=set)
    _left: set[int] = field(default_factory=set)
    _out: dict[int, tuple[BatchRequest, TokenInput]] = field(default_factory=dict)
    _ended: bool = False

    def __post_init__(self) -> None:
        done = len(self.task.journal)
        self.progress = Progress(len(self.task), done)

    @property
    def at_work(self) -> bool:
        """Whether some replica is still at work."""
        return len(self._left) < len(self.leaders)

    def serve(self) -> bool:
        """Take in what has arrived, write it down and hand out what is asked for; whether there
        was anything."""
        made: list[tuple[int, bytes]] = []
        busy = False
        for source, message in self.post.poll(TO_COORDINATOR):
            busy = True
            self._take(source, json.loads(message), made)
        if len(self._heard) == len(self.leaders) and not self.stopped:
            self._hand_out(made)
        self._write(made)
        done = not self._out and self.task.left == 0
        if not self._ended and (done or not self.at_work):
            self._ended = True
            self._tell_all({"end": True})
        return busy

    def stop(self) -> None:
        """Have all replicas stop."""
        if not self.stopped and not self._ended:
            self.stopped = True
            self._tell_all({"stop": True})

    def _take(self, source: int, message: dict[str, Any], made: list[tuple[int, bytes]]) -> None:
        self._asked[source] += message.get("ask", 0)
        self._heard.add(source)
        if message.get("stop"):
            self.stop()
        if message.get("done"):
            self._left.add(source)
        if answer := message.get("answer"):
            line, tokens = self._out.pop(answer["place"])
            if answer["refused"]:
                where = f"{self.task.source} line {line.number}"
                self._refuse(answer["place"], line, f"{where}: {answer['refused']}", made)
                return
            outputs = answer["outputs"]
            prompt_tokens = len(tokens.prompt)
            self.progress.prompt_tokens += prompt_tokens
            self.progress.completion_tokens += sum(len(one["output_ids"]) for one in outputs)
            echoed = self.texts.of_prompt(line.prompt) if line.echo else ""
            said = line.answer(outputs, prompt_tokens, self.texts.of_token, echoed)
            made.append((answer["place"], said))

    def _refuse(
        self, place: int, line: BatchRequest, why: str, made: list[tuple[int, bytes]]
    ) -> None:
        self.progress.refused += 1
        made.append((place, line.error_response(why)))

    def _hand_out(self, made: list[tuple[int, bytes]]) -> None:
        """Give requests to those who ask, one by one in turn. One with several answers counts as
        many requests, which may be more than were asked for; then fewer are next time."""
        parcels: dict[int, list[dict[str, Any]]] = {}
        while asking := [leader for leader in self.leaders if self._asked[leader] > 0]:
            for leader in asking:
                request = self._next(made)
                if request is None:
                    self._asked.clear()
                    break
                self._asked[leader] -= request["params"]["n"]
                parcels.setdefault(leader, []).append(request)
        for leader, requests in parcels.items():
            self.post.send(json.dumps({"requests": requests}).encode(), leader, TO_REPLICA)

    def _next(self, made: list[tuple[int, bytes]]) -> dict[str, Any] | None:
        """The next request, in a form that travels. Lines that cannot be one are answered."""
        while found := self.task.next():
            place, line = found
            try:
                if line.error:
                    raise UserError(line.error)
                tokens = self.encode(line)
            except UserError as error:
                self._refuse(place, line, str(error), made)
                continue
            self._out[place] = line, tokens
            return {"place": place, **tokens._asdict(), "params": asdict(line.params)}
        return None

    def _write(self, made: list[tuple[int, bytes]]) -> None:
        if made:
            self.task.journal.append(made)
            self.progress.answered += len(made)
            self.report(self.progress)

    def _tell_all(self, message: dict[str, Any]) -> None:
        for leader in self.leaders:
            self.post.send(json.dumps(message).encode(), leader, TO_REPLICA)


class ReplicaClient:
    """A replica's side: the engine's `Work`, on each of its ranks.

    `text` is the model's tokenizer, if there is one; `should_stop` whether this rank has been told
    to stop; `coordinator` is rank 0's.
    """

    def __init__(
        self,
        mesh: Mesh,
        post: Mailbox,
        text: Tokenizer | None,
        eos_ids: frozenset[int],
        should_stop: Callable[[], bool],
        coordinator: Coordinator | None,
    ) -> None:
        self.has_more, self.should_stop = True, False
        self._replica, self._post, self._coordinator = mesh.replica, post, coordinator
        self._text, self._eos_ids, self._told_to_stop = text, eos_ids, should_stop
        self._leads = mesh.replica.rank == 0
        self._texts: dict[tuple[int, int], IncrementalDetokenizer] = {}
        self._outputs: dict[int, dict[int, Output]] = {}  # of requests with more answers to come
        self._asked = 0  # requests asked for that have not come
        self._stops = self._ends = False  # what the leader has heard

    def take(self, wanted: int, busy: bool) -> list[Request]:
        """The requests that have come meanwhile; of those still `wanted` the others are asked
        for."""
        come: list[dict[str, Any]] = []
        if self._leads:
            if wanted > self._asked and not self._ends:
                self._say({"ask": wanted - self._asked})
                self._asked = wanted
            come = self._listen()
            if not come and not busy:
                time.sleep(POLL_SECONDS)
                come = self._listen()
        return [request for fields in self._agree(come) for request in self._requests(fields)]

    def answer(self, request: Request, answer: RequestOutput) -> None:
        """Send the answers of a request off, once all are there. Called on all ranks of the
        replica, which have the same."""
        growing = self._texts.pop((request.index, request.choice), None)
        if not self._leads:
            return
        if growing is None and self._text:
            growing = IncrementalDetokenizer(self._text, request.ids, request.params)
        output = finish_output(answer.ids, answer.finish_reason, growing)
        outputs = self._outputs.setdefault(request.index, {})
        outputs[request.choice] = {
            **output, "logprobs": answer.logprobs, "refused": answer.error
        }  # fmt: skip
        if len(outputs) == request.params.n:
            del self._outputs[request.index]
            in_order = [outputs[choice] for choice in range(request.params.n)]
            refused = next((one["refused"] for one in in_order if one["refused"]), "")
            message = {"place": request.index, "refused": refused, "outputs": in_order}
            self._say({"answer": message})

    def close(self) -> None:
        """Say that this replica is done, and wait for the end; rank 0 waits for all others."""
        if not self._leads:
            return
        if self.should_stop:
            self._say({"stop": True})
        self._say({"done": True})
        while not self._ends or (self._coordinator and self._coordinator.at_work):
            self._listen()
            time.sleep(POLL_SECONDS)

    def _say(self, message: dict[str, Any]) -> None:
        self._post.send(json.dumps(message).encode(), 0, TO_COORDINATOR)

    def _listen(self) -> list[dict[str, Any]]:
        """The requests that have arrived; rank 0 serves the others first."""
        if self._coordinator:
            self._coordinator.serve()
        requests: list[dict[str, Any]] = []
        for _, content in self._post.poll(TO_REPLICA):
            message = json.loads(content)
            requests += message.get("requests", [])
            self._stops |= message.get("stop", False)
            self._ends |= message.get("end", False)
        self._asked -= sum(fields["params"]["n"] for fields in requests)
        return requests

    def _agree(self, come: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the leader has heard, on all ranks of the replica."""
        replica = self._replica
        content = json.dumps(come).encode() if come else b""
        stops = self._stops or self._told_to_stop()
        news = np.array([stops, self._ends, len(content)], np.int64)
        stops, ends, length = all_reduce(news, replica, MAX).tolist()
        self.should_stop, self.has_more = bool(stops), not ends
        if not length:
            return []
        own = np.frombuffer(content, np.uint8) if self._leads else np.empty(length, np.uint8)
        return json.loads(broadcast(own, replica).tobytes())

    def _requests(self, fields: dict[str, Any]) -> list[Request]:
        """A request for each answer that a line asks for."""
        params = SamplingParams(**fields["params"])
        return [self._request(fields, params, choice) for choice in range(params.n)]

    def _request(self, fields: dict[str, Any], params: SamplingParams, choice: int) -> Request:
        place, ids = fields["place"], fields["ids"]
        stopped = None
        if params.stop and self._text:
            growing = IncrementalDetokenizer(self._text, ids, params)
            self._texts[place, choice] = growing
            stopped = growing.update
        return Request(
            index=place,
            ids=ids,
            params=params,
            eos_ids=params.end_ids(self._eos_ids),
            stop_fn=stopped,
            choice=choice,
            encoder_ids=fields["encoder_ids"],
        )
