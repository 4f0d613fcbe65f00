// Requests for answers.

import { fetchJson, stream } from "./api.js";
import { modelId } from "./models.js";
import { parameters } from "./sampling.js";

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
  const body = { model: modelId(), messages, stream_options: { include_usage: true }, ...parameters() };
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
    if (choice?.delta.content) {
      first ??= performance.now();
      n++;
      version.text += choice.delta.content;
      facts();
      onGrown();
    }
    if (choice?.finish_reason) version.finish = choice.finish_reason;
    if (usage) facts(usage);
  }
}

/** Return the messages before `end` in the form of a request. */
export function toSend(conversation, end) {
  const turns = conversation.messages.slice(conversation.from, end).map((message) =>
    message.role === "user"
      ? { role: "user", content: message.text }
      : { role: "assistant", content: message.versions[message.shown]?.text ?? "" },
  );
  const system = conversation.system.trim();
  const messages = turns.filter((message) => message.content);
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** Count the tokens of messages: { count, max_model_len }. */
export const counted = (messages, signal) =>
  fetchJson("v1/tokenize", { model: modelId(), messages }, signal);
