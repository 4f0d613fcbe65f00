"""The route of chat completions, and their JSON."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from serving.api.call import Call
from serving.api.generation import Prompt, Token
from serving.api.sampling import params_of, room_for
from serving.api.schemas import ChatRequest
from serving.api.stream import STREAMS, Format

router = APIRouter()


@router.post("/chat/completions", responses=STREAMS)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Reply to a conversation."""
    call = Call(request)
    model = await call.language_model(body)
    ids = await model.encode_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        to_answer=True,
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = Prompt(ids, room_for(ids, limit, model, "messages"))
    params = params_of(
        body,
        model,
        stop_ids=model.template.stop_ids(model.tokenizer),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    stops = [*body.stops, *model.template.stop_texts]
    return await call.answer(body, model, [prompt], params, stops, ChatFormat)


class ChatFormat(Format):
    """The objects of `/v1/chat/completions`."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def opening(self) -> bytes:
        role = {"delta": {"role": "assistant", "content": None}}
        return b"".join(self._frame(index, role) for index in range(self._n))

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*top) for top in zip(*token.top, strict=True)],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._token_bytes[token_id]
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(raw)}
