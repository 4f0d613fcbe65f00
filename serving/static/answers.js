// Answers as they are asked for and read: what is sent of a conversation, and what comes back.

import { ask, stream } from "/static/api.js";
import { modelId } from "/static/models.js";
import { parameters } from "/static/sampling.js";

const ROOM = 0.7; // of the context may be what is sent, when the oldest messages are dropped

/** Read an answer; where the context is full and that is wished, forget the oldest messages. */
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

/** Forget the oldest messages until there is room for an answer; return whether there were any. */
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

/** Read an answer into its version; the figures are the server's where it tells them. */
async function read({ controller, version }, messages, onGrown) {
  const body = { model: modelId(), messages, stream_options: { include_usage: true }, ...parameters() };
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
  for await (const { choices, usage } of stream("/v1/chat/completions", body, controller.signal)) {
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

/** Return the messages of a request that end before the one at `end`, the system prompt first. */
export function toSend(conversation, end) {
  const said = conversation.messages.slice(conversation.from, end).map((message) =>
    message.role === "user"
      ? { role: "user", content: message.text }
      : { role: "assistant", content: message.versions[message.shown]?.text ?? "" },
  );
  const system = conversation.system.trim();
  const messages = said.filter((message) => message.content);
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** Ask how many tokens messages are: { count, max_model_len }. */
export const counted = (messages, signal) =>
  ask("/v1/tokenize", { model: modelId(), messages }, signal);
