// localStorage: choices, and a key for each conversation so that tabs do not overwrite each other's.
// If it is full or disabled, values are lost with the page.

const CONVERSATION = "nanogpt.chat.";

let onFull = () => {};
const unsaved = new Map(); // values that could not be stored

export function whenFull(action) {
  onFull = action;
}

export function load(name, missing) {
  if (unsaved.has(name)) return unsaved.get(name);
  try {
    return JSON.parse(localStorage.getItem(name)) ?? missing;
  } catch {
    return missing;
  }
}

export function save(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    unsaved.delete(name);
  } catch {
    unsaved.set(name, value);
    onFull();
  }
}

/** Return the conversations, the newest first. */
export function conversations() {
  const names = new Set(unsaved.keys());
  try {
    for (let i = 0; i < localStorage.length; i++) names.add(localStorage.key(i));
  } catch {
    // only what is unsaved
  }
  return [...names]
    .filter((name) => name.startsWith(CONVERSATION))
    .map((name) => load(name, null))
    .filter((found) => found?.id && Array.isArray(found.messages))
    .sort((one, other) => other.updated - one.updated);
}

export const conversation = (id) => load(CONVERSATION + id, null);

/** Return an empty conversation, which is not stored yet. */
export function newConversation() {
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", updated: Date.now(), system: "", from: 0, messages: [] };
}

export function keepConversation(found) {
  save(CONVERSATION + found.id, found);
}

export function removeConversation(id) {
  unsaved.delete(CONVERSATION + id);
  try {
    localStorage.removeItem(CONVERSATION + id);
  } catch {
    // there was none
  }
}

/** Call `action(id)` when another tab changed a conversation. */
export function onConversationChanged(action) {
  addEventListener("storage", (event) => {
    if (event.key === null) action(null);
    else if (event.key.startsWith(CONVERSATION)) action(event.key.slice(CONVERSATION.length));
  });
}
