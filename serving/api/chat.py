"""Chat completions: how a conversation is answered, and how that is written."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from serving.api.front_end import front_end
from serving.api.generation import Piece, Token
from serving.api.sampling import each, params_of, room_for
from serving.api.schemas import ChatRequest
from serving.api.stream import STREAMS, TEXT, Format, TextFrames, answer_head, frame

router = APIRouter()


@router.post("/chat/completions", responses=STREAMS)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    front = front_end(request)
    model = await front.language_model(request, body)
    ids = await model.encode_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        to_answer=True,
    )
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = room_for(ids, wanted, model, "messages")
    params = params_of(
        body,
        model,
        stop_ids=model.template.stop_ids(model.tokenizer),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    stops = [*body.stops, *model.template.stop_texts]
    choices = [
        front.choice(request, model, ids, p, stops, index=index)
        for index, p in enumerate(each(params, body, max_tokens))
    ]
    head = answer_head("chatcmpl", model)
    form = ChatFormat(
        head,
        len(choices),
        model.token_bytes,
        with_logprobs=body.logprobs is True,
        include_usage=body.include_usage,
    )
    return await front.answer(request, body, choices, form)


class ChatFormat(Format):
    """The objects of `/v1/chat/completions`."""

    def __init__(
        self, head: dict[str, Any], n: int, token_bytes: Sequence[bytes], **options: bool
    ) -> None:
        kinds = ("chat.completion", "chat.completion.chunk")
        super().__init__(head, n, token_bytes, kinds=kinds, **options)
        self._texts = [TextFrames(self._chunk(i, {"content": TEXT})) for i in range(n)]

    def opening(self) -> bytes:
        """Return a frame with the role for each answer."""
        role = {"role": "assistant", "content": None}
        return b"".join(frame(self._chunk(index, role)) for index in range(self._n))

    def frames(self, piece: Piece) -> bytes:
        """Return a frame with the text, and one with the reason why it ends."""
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        content = b""
        if piece.text and logprobs is None:
            content = self._texts[piece.index].render(piece.text)
        elif piece.text:
            content = frame(self._chunk(piece.index, {"content": piece.text}, logprobs))
        if piece.finish_reason is None and not (logprobs and not piece.text):
            return content
        rest = None if piece.text else logprobs  # tokens without text of their own
        return content + frame(self._chunk(piece.index, {}, rest, piece.finish_reason))

    def choice(self, answer: Piece) -> dict[str, Any]:
        """Return a whole answer."""
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens) if self._with_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**self._chunk_head, "choices": [choice]}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [
                    self._token(i, logprob) for i, logprob in zip(*token.top, strict=True)
                ],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._token_bytes[token_id]
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(raw)}
