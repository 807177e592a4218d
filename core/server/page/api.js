// Requests to this server: the API key, errors, and streams of server-sent events.

const STORED = "interlace-key";

const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
const wrong = document.getElementById("key-wrong");

let asking = null; // one dialog, however many requests wait for it

export const storedKey = () => sessionStorage.getItem(STORED);

/** Ask for the key and keep it in this tab. `refused` is the key that was just tried, or null. */
function askForKey(refused) {
  if (storedKey() !== refused) return Promise.resolve(); // somebody has entered another one meanwhile
  asking ??= new Promise((resolve) => {
    wrong.hidden = refused === null;
    field.value = "";
    dialog.showModal();
    field.focus();
    dialog.addEventListener("close", () => {
      if (field.value) sessionStorage.setItem(STORED, field.value.trim());
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

/** `fetch` with the key; where the server wants one (401) it asks for it, again and again. Paths are relative. */
export async function request(path, options = {}) {
  for (;;) {
    const key = storedKey();
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    await askForKey(key);
    if (options.signal?.aborted) throw new DOMException("stopped", "AbortError");
  }
}

/** The text of an error answer: the message of an error object, or the status. */
export async function errorText(response) {
  try {
    const { error } = await response.json();
    if (error?.message) return error.message;
  } catch { /* not JSON */ }
  return `The server answered ${response.status} ${response.statusText}`.trim();
}

/** The `data` of each event of a stream, until `[DONE]`. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    pending += value;
    const blocks = pending.split(/\r?\n\r?\n/);
    pending = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data); // a block without data is a comment that keeps the connection alive
    }
  }
}
