"""The bodies of requests. Unknown fields are ignored, and null is the same as absent.

The OpenAI API's fields and ranges, and those of other servers for what it lacks: `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids`, `ignore_eos`.
"""

import json
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_METADATA = 16  # keys, as in the OpenAI API
MAX_IDS = 2**18
MAX_ITEMS = 2048  # of other lists; the server's settings may allow fewer
# Fields of other servers that would change the answer, by the values that do not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("best_of", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("min_tokens", "mirostat", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("use_beam_search", "echo"), (False,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("auto", "none")),
    "modalities": ([], ["text"]),
    **dict.fromkeys(
        (
            *("bad_words", "allowed_token_ids", "truncate_prompt_tokens", "prompt_logprobs"),
            *("suffix", "audio", "grammar", "json_schema", "regex", "ebnf"),
            *("guided_grammar", "guided_decoding"),
        ),
        ("", [], {}),
    ),
}
T = TypeVar("T")
# The length is checked before the elements, and the first invalid element ends the validation: a
# body has room for hundreds of thousands of them, each an error of its own.
Items = Annotated[list[T], Field(max_length=MAX_ITEMS, fail_fast=True)]


def _whole(value: Any) -> Any:
    """Return 5 for 5.0, which JSON does not distinguish."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)  # after the limits, or the OpenAPI document lacks these
Seed = Annotated[StrictInt, Field(ge=-(2**63), lt=2**64), Whole]
Count = Annotated[StrictInt, Field(ge=1), Whole]
MaxTokens = Annotated[StrictInt, Field(ge=-1), Whole]  # -1: as many as fit
Logprobs = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS), Whole]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
BiasedId = Annotated[int, Field(ge=0)]  # a key of JSON, and so text
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Short = Annotated[StrictStr, Field(max_length=256)]
Ids = Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]
Content = StrictStr | dict[str, JsonValue] | list[JsonValue]
Mode = Literal["auto", "none", "required"]  # of tool_choice
BY_TYPE = Field(discriminator="type")

Prompt = Annotated[
    StrictStr | Items[StrictStr] | Ids | Items[Ids], Field(union_mode="left_to_right")
]


def _at_most(limit: int, what: str) -> BeforeValidator:
    """Return a check of the number of an object's keys, before each value is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticCustomError("too_long", f"More than {limit} {what} are too many")
        return value

    return BeforeValidator(check)


class ErrorObject(BaseModel):
    """An error; clients show `message` and act on `code`."""

    message: StrictStr
    type: StrictStr
    param: StrictStr | None
    code: StrictStr | None


class ErrorAnswer(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorObject


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: StrictBool | None = None


class JsonSchema(BaseModel):
    """A JSON schema with a name."""

    name: Short | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None  # always so


class ResponseFormat(BaseModel):
    """What an answer is: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(TypedDict, total=False):
    """vLLM's name for what an answer is."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    json: StrictStr | dict[str, Any] | None
    regex: StrictStr | None
    choice: Items[StrictStr] | None


class SamplingRequest(BaseModel):
    """The fields that chat and completions share."""

    model_config = ConfigDict(extra="allow")  # for UNSUPPORTED

    model: Short | None = None
    max_tokens: MaxTokens | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None  # 0: the likeliest token
    top_k: MaxTokens | None = None  # 0 and -1: off
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[BiasedId, Bias], _at_most(MAX_BIASES, "tokens")] | None = None
    seed: Seed | None = None
    n: Count | None = None
    stop: Short | Items[Short] | None = None
    stop_token_ids: Items[TokenId] | None = None
    ignore_eos: StrictBool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: StrictStr | dict[str, Any] | None = None
    guided_regex: StrictStr | None = None
    guided_choice: Items[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Prompt | None = None
    echo: StrictBool | None = None
    add_special_tokens: StrictBool | None = None  # false: the text alone, which may not be empty
    logprobs: Logprobs | None = None


class ContentPart(BaseModel):
    """A piece of a message."""

    type: StrictStr
    text: StrictStr | None = None


class Function(BaseModel):
    """A function, with the schema of its arguments, or a call of it with the arguments' JSON."""

    name: Annotated[Short, Field(min_length=1)]
    description: StrictStr | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: StrictBool | None = None  # always so
    arguments: StrictStr | None = None

    @property
    def text(self) -> str:
        """The call as a model writes it, but for the last brace."""
        return f'{{"name": {json.dumps(self.name)}, "arguments": {self.arguments or ""}'


class Tool(BaseModel):
    """A function as a tool, as the choice of one, or as a call."""

    id: Short | None = None
    type: Literal["function"]
    function: Function


class Allowed(BaseModel, Generic[T]):
    """Some of the tools, of which an answer calls one where the mode is "required"."""

    mode: Literal["auto", "required"]
    tools: Annotated[Items[T], Field(min_length=1)]


class AllowedTools(BaseModel):
    """Some of the tools as a choice."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed[Tool]


class ChatMessage(BaseModel):
    """A turn of a conversation; null is no text, as in a message of tool calls."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | Items[ContentPart] | None = None
    name: Short | None = None
    tool_calls: Items[Tool] | None = None
    tool_call_id: Short | None = None


class Conversation(BaseModel):
    """The tools of a conversation, and how it ends."""

    tools: Items[Tool] | None = None
    tool_choice: Mode | Annotated[Tool | AllowedTools, BY_TYPE] | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None  # of the assistant


class ChatRequest(SamplingRequest, Conversation):
    """POST /v1/chat/completions."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Logprobs | None = None


class InputItem(BaseModel):
    """An item of a response's input: a message, whose parts are text, a call or its output."""

    type: StrictStr | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: StrictStr | Items[ContentPart] | None = None
    call_id: Short | None = None
    name: Short | None = None
    arguments: StrictStr | None = None
    output: StrictStr | Items[ContentPart] | None = None


class FunctionTool(Function):
    """A function as a tool of a response, or as the choice of one."""

    type: Literal["function"]


class AllowedFunctions(Allowed[FunctionTool]):
    """Some of the tools as the choice of a response."""

    type: Literal["allowed_tools"]


class TextFormat(BaseModel):
    """What the text of a response is; a schema has a name."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Short | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class TextOptions(BaseModel):
    """The options of a response's text."""

    format: TextFormat | None = None


class ResponsesRequest(SamplingRequest):
    """POST /v1/responses: a text or a conversation."""

    input: StrictStr | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: StrictStr | None = None
    max_output_tokens: MaxTokens | None = None
    text: TextOptions | None = None
    tools: Items[FunctionTool] | None = None
    tool_choice: Mode | Annotated[FunctionTool | AllowedFunctions, BY_TYPE] | None = None
    include: Items[Short] | None = None  # of these, the log-probabilities
    top_logprobs: Logprobs | None = None
    metadata: Annotated[dict[StrictStr, StrictStr], _at_most(MAX_METADATA, "keys")] | None = None

    @property
    def text_format(self) -> TextFormat:
        """The format of the text."""
        return (self.text and self.text.format) or TextFormat()


class TokenizeRequest(Conversation):
    """POST /tokenize: a text (`prompt`, or `content` as llama.cpp has it), or a conversation."""

    model: Short | None = None
    prompt: StrictStr | None = None
    content: StrictStr | None = None
    add_special_tokens: StrictBool | None = None  # of a text; false: the text alone
    messages: Items[ChatMessage] | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model: Short | None = None
    tokens: Ids


class ClassifyRequest(BaseModel):
    """POST /classify: one text or several."""

    model: Short | None = None
    input: StrictStr | Items[StrictStr]


class ChoiceQuestion(BaseModel):
    """A question whose answer is one of the keys of `criteria`, each with a description or null."""

    type: Literal["choice"]
    instructions: Content | None = None
    criteria: Annotated[
        dict[StrictStr, Content | None], Field(min_length=2), _at_most(255, "options")
    ]


class SystemOneRequest(BaseModel):
    """POST /v1/systemone: questions by name, about a text or anything else that JSON can spell."""

    model: Short | None = None
    state: Content
    questions: Annotated[
        dict[StrictStr, ChoiceQuestion], Field(min_length=1), _at_most(64, "questions")
    ]
    assets: Annotated[dict[str, JsonValue], Field(max_length=0)] | None = None  # images


class EmbeddingsRequest(BaseModel):
    """POST /v1/embeddings: a text or token ids, or a list of either."""

    model: Short | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None


class PredictRequest(BaseModel):
    """POST /predict: a text to label, or to answer."""

    model: Short | None = None
    input_data: StrictStr
    max_tokens: MaxTokens | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    seed: Seed | None = None
