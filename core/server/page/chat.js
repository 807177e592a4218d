// The conversation: what was said, the parameters, and one answer that streams.

import { errorText, events, request } from "./api.js";
import { render } from "./text.js";

const $ = (id) => document.getElementById(id);
const log = $("log"), welcome = $("welcome"), prompt = $("prompt"), send = $("send"), stop = $("stop");

let messages = []; // {role, content}
let answer = null; // AbortController of the answer under way
let model = "";

export function setModel(name) {
  model = name;
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
const toEnd = () => { log.scrollTop = log.scrollHeight; };

function addMessage(role) {
  welcome.hidden = true;
  const message = element("article", `message ${role}`);
  const text = message.appendChild(element("div", "text"));
  log.append(message);
  toEnd();
  return { message, text };
}

function body() {
  const system = $("system").value.trim();
  const said = system ? [{ role: "system", content: system }, ...messages] : [...messages];
  return {
    model,
    messages: said,
    stream: true,
    stream_options: { include_usage: true },
    temperature: $("temperature").valueAsNumber,
    top_p: $("top-p").valueAsNumber,
    max_completion_tokens: $("max-tokens").valueAsNumber || 512,
  };
}

const ENDINGS = { length: "cut off at max tokens", abort: "aborted", error: "failed" };

function summary(began, first, usage, finish) {
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (first !== null) {
    parts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
    const seconds = (performance.now() - first) / 1000;
    if (usage?.completion_tokens > 1 && seconds > 0) {
      parts.push(`then ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
  }
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens cached`);
  if (ENDINGS[finish]) parts.push(ENDINGS[finish]);
  return parts.join(" · ");
}

async function say(content) {
  messages.push({ role: "user", content });
  addMessage("user").text.textContent = content;
  const { message, text } = addMessage("assistant");
  message.classList.add("busy");
  answer = new AbortController();
  const mine = answer;
  stop.hidden = false;
  send.hidden = true;
  const began = performance.now();
  let said = "", first = null, usage = null, finish = null, failure = null, due = false;
  const show = () => {
    due = false;
    const follow = atEnd();
    render(text, said);
    if (follow) toEnd();
  };
  try {
    const response = await request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body()),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error(await errorText(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      finish = choice?.finish_reason ?? finish;
      if (!choice?.delta?.content) continue;
      first ??= performance.now();
      said += choice.delta.content;
      if (!due) { // at most once a frame
        due = true;
        requestAnimationFrame(show);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") finish = "stopped";
    else failure = error.message || "The connection was lost";
  }
  show();
  message.classList.remove("busy");
  if (said) messages.push({ role: "assistant", content: said });
  if (failure !== null) {
    message.append(element("p", "meta failed", failure));
    if (!said) messages.pop(); // the question has no answer: it can be asked again
  } else {
    const meta = summary(began, first, usage, finish);
    message.append(element("p", "meta", finish === "stopped" ? ["stopped", meta].filter(Boolean).join(" · ") : meta));
  }
  if (answer === mine) finished();
  if (atEnd()) toEnd();
}

function finished() {
  answer = null;
  stop.hidden = true;
  send.hidden = false;
  prompt.focus({ preventScroll: true });
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 200)}px`;
}

function submit() {
  const content = prompt.value.trim();
  if (!content || answer) return;
  prompt.value = "";
  fit();
  say(content);
}

function newChat() {
  answer?.abort();
  finished();
  messages = [];
  for (const message of log.querySelectorAll(".message")) message.remove();
  welcome.hidden = false;
}

export function startChat() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
  });
  prompt.addEventListener("input", fit);
  stop.addEventListener("click", () => answer?.abort());
  $("new-chat").addEventListener("click", newChat);
  $("ideas").addEventListener("click", (event) => {
    if (event.target.tagName === "BUTTON" && !answer) say(event.target.textContent);
  });
  for (const name of ["temperature", "top-p"]) {
    const show = () => { $(`${name}-value`).textContent = String($(name).valueAsNumber); };
    $(name).addEventListener("input", show);
    show();
  }
  $("parameters").open = false;
}
