// The client of the API: errors as kinds, streams as events.

const KEY = "nanogpt.key"; // of this tab's session only
const BY_CODE = {
  context_length_exceeded: "context",
  model_not_found: "model",
  overloaded: "busy",
  rate_limit_exceeded: "busy",
  unavailable: "starting",
};
const BY_STATUS = { 401: "key", 403: "forbidden", 413: "context", 429: "busy", 503: "busy" };
// of a proxy, whose errors are not the API's; 0 is a redirect to a sign-in page
const BY_PROXY = { 0: "proxy", 401: "proxy", 403: "proxy", 502: "offline", 503: "offline", 504: "offline" };

/** `kind` is one of the above, `invalid`, `failed`, `offline` or `cut`. */
export class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

let promptForKey = () => Promise.reject(new Failure("key", "No API key."));
let prompting = null;

/** `prompt(wasWrong)` resolves to a key or null. */
export function onKeyNeeded(prompt) {
  promptForKey = prompt;
}

export const hasKey = () => read() !== null;

export function forgetKey() {
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    given = null;
  }
}

let given = null; // where sessionStorage is not available

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
    // stays in `given` until the page is closed
  }
}

/** GET, or POST with a body; return the JSON. */
export async function fetchJson(path, body, signal) {
  const response = await request(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    throw broken(error);
  }
}

/** Yield the objects of a stream, the usage in the last; throws a Failure unless it is complete. */
export async function* stream(path, body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request(path, { ...body, ...options }, signal);
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
    if (key !== read()) continue; // another request has got a new key meanwhile
    prompting ??= promptForKey(key !== null).finally(() => (prompting = null));
    const entered = await prompting;
    if (entered === null) throw failure;
    keep(entered);
  }
}

async function send(path, body, signal, key) {
  const headers = {};
  // Authorization may be a proxy's. Headers are bytes: keys are sent in UTF-8.
  if (key !== null) headers["X-API-Key"] = bytes(key);
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const shared = { method, headers, signal, redirect: "manual", cache: "no-store" };
  try {
    return await fetch(path, { ...shared, body: body && JSON.stringify(body) });
  } catch (error) {
    throw broken(error, "offline");
  }
}

const bytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));

/** Return a network exception as a Failure, an abort unchanged. */
function broken(error, kind = "cut") {
  return error.name === "AbortError" ? error : new Failure(kind, error.message);
}

async function toFailure(response) {
  try {
    return failureOf((await response.json()).error, response.status);
  } catch {
    const { status, statusText } = response;
    return new Failure(BY_PROXY[status] ?? (status >= 500 ? "failed" : "invalid"), statusText);
  }
}

function failureOf(error, status) {
  const other = status >= 500 ? "failed" : "invalid";
  return new Failure(BY_CODE[error.code] ?? BY_STATUS[status] ?? other, error.message);
}
