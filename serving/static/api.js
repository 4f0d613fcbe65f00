// The server, as the page asks it: the OpenAI API, its errors as kinds, its streams as events.

const KEY = "nanogpt.key"; // of this tab's session only
const BY_CODE = {
  context_length_exceeded: "context",
  model_not_found: "model",
  overloaded: "busy",
  rate_limit_exceeded: "busy",
  unavailable: "starting",
};
const BY_STATUS = { 401: "key", 403: "forbidden", 413: "context", 429: "busy", 503: "busy" };

/** What went wrong; `kind` is one of the words above, `invalid`, `failed`, `offline` or `cut`. */
export class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

let askForKey = () => Promise.reject(new Failure("key", "No API key."));
let asking = null;

/** Let `ask(wasWrong)` resolve to a key, or to null where there is none to be had. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => read() !== null;

export function forgetKey() {
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    given = null;
  }
}

let given = null; // where the session cannot keep it

function read() {
  try {
    return sessionStorage.getItem(KEY) ?? given;
  } catch {
    return given;
  }
}

function keep(key) {
  given = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it is kept until the page is left
  }
}

/** GET, or POST where there is a body; return what the server answers. */
export async function ask(path, body, signal) {
  const response = await request(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    throw broken(error);
  }
}

/** Yield the objects of a stream until it is complete; throws a Failure where it is not. */
export async function* stream(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read().catch((error) => {
      throw broken(error);
    });
    if (done) throw new Failure("cut", "The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw failureOf(event.error, 500);
      yield event;
    }
  }
}

async function request(path, body, signal) {
  while (true) {
    const key = read();
    const response = await send(path, body, signal, key);
    if (response.ok) return response;
    const failure = await toFailure(response);
    if (failure.kind !== "key") throw failure;
    if (key !== read()) continue; // another request was told a new one meanwhile
    asking ??= askForKey(key !== null).finally(() => (asking = null));
    const entered = await asking;
    if (entered === null) throw failure;
    keep(entered);
  }
}

async function send(path, body, signal, key) {
  const headers = {};
  // Headers are bytes: a key beyond ASCII goes as its UTF-8.
  if (key !== null) headers.Authorization = `Bearer ${bytes(key)}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const shared = { method, headers, signal, credentials: "omit", cache: "no-store" };
  try {
    return await fetch(path, { ...shared, body: body && JSON.stringify(body) });
  } catch (error) {
    throw broken(error, "offline");
  }
}

const bytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

/** Return the failure that an exception of the network is; what was stopped stays what it is. */
function broken(error, kind = "cut") {
  return error.name === "AbortError" ? error : new Failure(kind, error.message);
}

async function toFailure(response) {
  try {
    return failureOf((await response.json()).error, response.status);
  } catch {
    return new Failure(response.status >= 500 ? "failed" : "invalid", response.statusText);
  }
}

function failureOf(error, status) {
  const other = status >= 500 ? "failed" : "invalid";
  return new Failure(BY_CODE[error.code] ?? BY_STATUS[status] ?? other, error.message);
}
