// Requests for answers.

import { fetchJson, stream } from "./api.js";
import { modelId } from "./models.js";
import { parameters, tools } from "./sampling.js";

const ROOM = 0.7; // share of the context that is filled after the oldest messages are dropped

/** Read an answer; drop the oldest messages when the context is full and `forgets` is set. */
export async function readAnswer(running, onGrown, onForgotten) {
  const { conversation, controller } = running;
  const end = conversation.messages.length - 1;
  try {
    await read(running, toSend(conversation, end), onGrown);
  } catch (error) {
    if (error.kind !== "context" || !conversation.forgets) throw error;
    if (!(await forgetOldest(conversation, end, controller.signal))) throw error;
    onForgotten();
    await read(running, toSend(conversation, end), onGrown);
  }
}

/** Drop the oldest messages until an answer fits; return whether any were dropped. */
async function forgetOldest(conversation, end, signal) {
  const { messages, from } = conversation;
  for (let start = from + 1; start < end; start++) {
    if (messages[start].role !== "user") continue;
    conversation.from = start;
    const { count, max_model_len: most } = await counted(toSend(conversation, end), signal);
    if (count <= ROOM * most) break;
  }
  return conversation.from > from;
}

/** Stream an answer into its version. */
async function read({ controller, version }, messages, onGrown) {
  const body = { model: modelId(), messages, ...tools(messages), ...parameters() };
  version.isJson = "guided_json" in body;
  const began = performance.now();
  let first = null;
  let n = 0;
  const facts = (usage) => {
    const now = performance.now();
    const seconds = (now - (first ?? now)) / 1000;
    version.facts = {
      tokens: usage?.completion_tokens ?? n,
      perSecond: usage?.tokens_per_second ?? (n > 1 && seconds ? (n - 1) / seconds : 0),
      first: ((first ?? now) - began) / 1000,
    };
  };
  for await (const { choices, usage } of stream("v1/chat/completions", body, controller.signal)) {
    const [choice] = choices;
    const [call] = choice?.delta.tool_calls ?? [];
    if (choice?.delta.content || call) {
      first ??= performance.now();
      n++;
      version.text += choice.delta.content ?? "";
      if (call?.id) version.call = call;
      else if (call) version.call.function.arguments += call.function.arguments;
      facts();
      onGrown();
    }
    if (choice?.finish_reason) version.finish = choice.finish_reason;
    if (usage) facts(usage);
  }
}

/** Return the messages before `end`, and a draft, in the form of a request. */
export function toSend(conversation, end, ...draft) {
  const turns = [...conversation.messages.slice(conversation.from, end), ...draft].map(toMessage);
  const system = conversation.system.trim();
  const messages = turns.filter((message) => message.content || message.tool_calls);
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function toMessage({ role, text, call, versions, shown }) {
  if (call) return { role, tool_call_id: call.id, name: call.function.name, content: text };
  if (role === "user") return { role, content: text };
  const version = versions[shown];
  return version?.call
    ? { role, content: null, tool_calls: [version.call] }
    : { role, content: version?.text };
}

/** Count the tokens of messages: { count, max_model_len }. */
export const counted = (messages, signal) =>
  fetchJson("v1/tokenize", { model: modelId(), messages, ...tools(messages) }, signal);
