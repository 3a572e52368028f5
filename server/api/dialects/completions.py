"""POST /completions: continues plain text, or scores it (`echo` with `logprobs`)."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from server.api.access.conversations import pieces_of_text
from server.api.access.receipts import Caller, Receipt, holder_of
from server.api.answer import shapes
from server.api.answer.answer import Answer
from server.api.answer.json_answer import respond_whole, while_connected
from server.api.answer.shapes import Envelope, TextOffsets
from server.api.answer.sse import stream
from server.api.request.body import body_of
from server.api.request.completion_schema import CompletionRequest
from server.api.request.turns import Presence
from server.api.request.workload import Allowance, lease_of
from server.api.service import Service
from server.glm.answer_parser import AnswerParser
from server.link.messages import TokenScore

KIND = "text_completion"
# An answer that is to come, and an id of a text as Python has it, in a list and a tuple.
ANSWER_BYTES, TOKEN_BYTES = 2200, 48


def completion_router(service: Service, always_sends_usage: bool) -> APIRouter:
    """The route; usage in streams as for chat."""
    router = APIRouter()
    Body = Annotated[CompletionRequest, Depends(body_of(CompletionRequest))]

    @router.post("/completions")
    async def create_completion(request: Request, body: Body) -> Response:
        caller = Caller.of(request, body.session_id, body.user)
        service.parameters.note(request, body, caller, body.requires_parameters)
        lease = lease_of(request)
        work = lease.run(
            holder_of(request),
            lambda wanted: _Completion(service, body, caller, wanted, lease),
            body.num_answers,
        )
        completion = await while_connected(request, work)
        if body.stream:
            chunks = completion.chunks(always_sends_usage or body.wants_usage_in_stream)
            return stream(chunks, completion.envelope, KIND, service.keepalive_s, completion.progress)
        return await respond_whole(request, completion.result(), completion.envelope.id, service.patience_s)

    return router


class _Completion:
    """The completions of all prompts of one body, one after the other, `n` for each prompt."""

    def __init__(
        self, service: Service, body: CompletionRequest, caller: Caller, wanted: Presence, lease: Allowance
    ) -> None:
        service.model_info()
        lease.hold(lease.num_bytes + ANSWER_BYTES * body.num_answers)
        self._check = service.check_length(wanted, body.max_tokens)
        self._lease = lease
        self._service = service
        self._body = body
        self._num_each = body.n or 1
        self._tokenizer = service.dialect.tokenizer
        self._caller = service.recognised(caller, pieces_of_text(body.prompts[0]))
        self._current = 0  # whose turn it is
        self._answers = [answer for prompt in body.prompts for answer in self._make_answers(service, prompt)]
        self.envelope = Envelope(self._answers[0].request.request_id, service.model_id)
        self._receipt = Receipt(
            self.envelope.id, service.model_id, self._caller, bool(body.stream), self._num_each
        )
        service.ledger.open(self._receipt, self._answers, body.max_tokens)
        service.engine.reserve()

    def _make_answers(self, service: Service, prompt: str | list[int]) -> list[Answer]:
        body = self._body
        token_ids = self._tokenizer.encode(prompt, self._check) if isinstance(prompt, str) else prompt
        self._check(len(token_ids))
        self._lease.hold(self._lease.num_bytes + TOKEN_BYTES * len(token_ids))
        commands = service.commands(
            body,
            token_ids,
            body.max_tokens,
            count=self._num_each,
            caller=self._caller,
            num_top_logprobs=body.logprobs or 0,
            score_prompt=bool(body.echo) and body.logprobs is not None,
        )
        return [
            Answer(
                service.engine,
                AnswerParser(self._tokenizer, token_ids, is_active=False),
                one,
                body.stops,
                line=service.line,
            )
            for one in commands
        ]

    def progress(self) -> str:
        """How far the prompt whose turn it is has been read, for those who wait."""
        return self._answers[self._current].progress

    async def result(self) -> dict[str, Any]:
        """All choices."""
        self._service.ledger.start(self._receipt)
        try:
            choices = [await self._choice(index) for index in range(len(self._answers))]
        finally:
            self._service.ledger.close(self._receipt, self._answers)
        return self.envelope.wrap(KIND, choices=choices, usage=self._usage())

    def _usage(self) -> dict[str, Any]:
        return shapes.usage(self._answers, self._receipt.usage(self._answers))

    async def _choice(self, index: int) -> dict[str, Any]:
        answer = self._answers[index]
        deltas = [delta async for delta in answer.deltas()]
        text = self._echoed(index) + "".join(delta.content for delta in deltas)
        scores = answer.prompt_scores + [score for delta in deltas for score in delta.scores]
        return shapes.completion_choice(
            index, text, self._logprobs(scores, self._offsets(index)), answer.reason
        )

    async def chunks(self, sends_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The choices in chunks, usage last."""
        self._service.ledger.start(self._receipt)
        try:
            for index in range(len(self._answers)):
                async with aclosing(self._choice_chunks(index)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            self._service.ledger.close(self._receipt, self._answers)
        if sends_usage:
            yield self.envelope.wrap(KIND, choices=[], usage=self._usage())

    async def _choice_chunks(self, index: int) -> AsyncGenerator[dict[str, Any], None]:
        self._current, answer = index, self._answers[index]
        waiting = self._echoed(index)
        offsets = self._offsets(index)
        num_prompt_scores = 0
        async with aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                scores = [*answer.prompt_scores[num_prompt_scores:], *delta.scores]
                num_prompt_scores = len(answer.prompt_scores)
                if waiting or delta.content or scores:
                    yield self._chunk(index, waiting + delta.content, self._logprobs(scores, offsets))
                waiting = ""
        yield self._chunk(index, "", None, answer.reason)

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return self.envelope.wrap(KIND, choices=[shapes.completion_choice(index, text, logprobs, reason)])

    def _offsets(self, index: int) -> TextOffsets:
        return TextOffsets(self._tokenizer, 0 if self._body.echo else len(self._prompt_text(index)))

    def _logprobs(self, scores: list[TokenScore], offsets: TextOffsets) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        return shapes.completion_logprobs(self._tokenizer, scores, offsets)

    def _echoed(self, index: int) -> str:
        return self._prompt_text(index) if self._body.echo else ""

    def _prompt_text(self, index: int) -> str:
        prompt = self._body.prompts[index // self._num_each]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
