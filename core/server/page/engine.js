// The engine, looked at about once a second while the page can be seen.

import { request } from "./api.js";
import { blockMap, sparkline } from "./charts.js";
import { setModel } from "./chat.js";

const $ = (id) => document.getElementById(id);
const STATUS = { ok: "healthy", degraded: "degraded", restarting: "restarting", dead: "down", lost: "no connection" };
const LABELS = {
  models: "model family", checkpoints: "checkpoint", schedulers: "scheduler", executors: "executor",
  attention: "attention", kernels: "kernels", logits_processors: "logits processors", orderings: "orderings", routers: "router",
};

let latest = null;

const whole = (number) => Math.round(number).toLocaleString("en-US").replaceAll(",", "\u202f");

function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function showNumber(id, number, unit) {
  const place = $(id);
  place.replaceChildren(number);
  if (unit) {
    const small = document.createElement("small");
    small.textContent = unit;
    place.append(small);
  }
}

function showSeconds(id, seconds) {
  if (seconds === null) showNumber(id, "–", "");
  else if (seconds < 1) showNumber(id, (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0), "ms");
  else showNumber(id, seconds.toFixed(seconds < 10 ? 2 : 1), "s");
}

function duration(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => seconds >= size);
  if (first < 0) return "0 s";
  const parts = [];
  let rest = Math.floor(seconds);
  for (const [unit, size] of units.slice(first, first + 2)) {
    parts.push(`${Math.floor(rest / size)} ${unit}`);
    rest %= size;
  }
  return parts.join(" ");
}

const lastKnown = (values) => values.findLast((value) => value !== null) ?? null;

function showHistory(history) {
  const recent = history.output.slice(-3);
  showNumber("rate", whole(recent.reduce((sum, value) => sum + value, 0) / recent.length), "");
  showSeconds("ttft", lastKnown(history.ttft));
  showSeconds("itl", lastKnown(history.itl));
  sparkline($("spark-rate"), history.output);
  sparkline($("spark-ttft"), history.ttft);
  sparkline($("spark-itl"), history.itl);
}

// A request is prefilled, then decoded: what it has of its output, or until there is any, of its prompt.
function progress(request, waits) {
  if (waits) {
    const why = request.blocked_on.length ? `for ${request.blocked_on.join(", ")}` : request.num_preemptions ? "preempted" : "";
    return { phase: "waiting", share: 0, text: `${["waiting", why].filter(Boolean).join(" ")} · ${request.age.toFixed(1)} s` };
  }
  if (!request.num_output_tokens) {
    const share = request.num_computed_tokens / request.num_prompt_tokens;
    return { phase: "prefill", share, text: `prompt ${whole(request.num_computed_tokens)} / ${whole(request.num_prompt_tokens)}` };
  }
  const share = request.num_output_tokens / request.max_tokens;
  return { phase: "decode", share, text: `${whole(request.num_output_tokens)} / ${whole(request.max_tokens)} tokens` };
}

function requestItem() {
  const item = document.createElement("li");
  for (const className of ["id", "what", "track"]) {
    item.append(Object.assign(document.createElement("span"), { className }));
  }
  item.lastChild.append(document.createElement("i"));
  return item;
}

function showRequests(engine) {
  const list = $("requests");
  const known = new Map([...list.children].map((item) => [item.dataset.id, item]));
  const wanted = [...engine.running.map((one) => [one, false]), ...engine.waiting.map((one) => [one, true])];
  const items = wanted.map(([one, waits]) => {
    const item = known.get(one.id) ?? requestItem();
    const { phase, share, text } = progress(one, waits);
    item.dataset.id = one.id;
    item.dataset.phase = phase;
    const [id, what, track] = item.children;
    id.textContent = one.id;
    what.textContent = engine.replicas.length ? `${text} · replica ${one.engine}` : text;
    track.firstChild.style.width = `${Math.min(100, share * 100).toFixed(1)}%`;
    return item;
  });
  list.replaceChildren(...items);
  $("idle").hidden = items.length > 0;
  setText("running", whole(engine.num_running));
  setText("waiting", whole(engine.num_waiting));
}

function showBlocks(engine) {
  const counts = [0, 0, 0, 0];
  for (const [state, length] of engine.blocks) counts[state] += length;
  for (const item of $("legend").children) {
    item.querySelector("b").textContent = whole(counts[item.dataset.state] * engine.blocks_stride);
  }
  const shown = blockMap($("blocks"), engine.blocks);
  const notes = [];
  if (shown * engine.blocks_stride < engine.num_blocks) {
    notes.push(`The first ${whole(shown * engine.blocks_stride)} of ${whole(engine.num_blocks)} blocks; all others are free.`);
  }
  if (engine.blocks_stride > 1) notes.push(`One of ${engine.blocks_stride} blocks is shown.`);
  setText("kv-note", notes.join(" "));
  setText("kv-share", `${(engine.kv_usage * 100).toFixed(1)} % in use`);
}

function facts(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

function replicaFacts({ replicas }) {
  const one = (replica) => (replica.works ? `${whole(replica.num_running)} running, ${whole(replica.num_waiting)} waiting` : "not running");
  return replicas.map((replica) => [`replica ${replica.engine}`, one(replica)]);
}

function showFacts(live) {
  const { engine } = live;
  facts($("plugins"), Object.entries(engine.plugins).map(([kind, names]) => [LABELS[kind] ?? kind, names.join(", ")]));
  const hits = engine.prefix_queries ? `${((100 * engine.prefix_hits) / engine.prefix_queries).toFixed(0)} % of ${whole(engine.prefix_queries)} tokens` : "–";
  facts($("facts"), [
    ["prefix cache hits", hits],
    ...replicaFacts(engine),
    ["block size", `${engine.block_size} tokens`],
    ["seats", whole(engine.max_num_seqs)],
    ["token budget of a step", whole(engine.max_num_batched_tokens)],
    ["longest request", `${whole(engine.max_model_len)} tokens`],
    ["steps", whole(engine.steps)],
    ["restarts", whole(live.restarts)],
    ["uptime", duration(live.uptime)],
    ["version", live.version],
  ]);
}

function showStatus(status, reason, uptime) {
  $("health").dataset.status = status;
  setText("health-text", [STATUS[status] ?? status, uptime && `up ${duration(uptime)}`].filter(Boolean).join(" · "));
  $("notice").hidden = !reason;
  setText("notice", reason ?? "");
}

function show(live) {
  latest = live;
  setModel(live.model);
  setText("model", live.model);
  document.title = `${live.model} · Interlace`;
  showStatus(live.status, live.reason, live.uptime);
  showHistory(live.history);
  if (!live.engine) return;
  showRequests(live.engine);
  showBlocks(live.engine);
  showFacts(live);
}

async function look() {
  let pause = 1000;
  try {
    const response = await request("live", { cache: "no-store" });
    if (!response.ok) throw new Error(String(response.status));
    const live = await response.json();
    pause = live.interval * 1000;
    show(live);
  } catch {
    showStatus("lost", "The server does not answer; trying again.", 0);
    pause = 3000;
  }
  return pause;
}

const visible = () => (document.hidden ? new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true })) : null);

export async function watchEngine() {
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (;;) {
    await visible();
    const pause = await look();
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

/** The canvas has no size while its side is hidden, and keeps the colours it was drawn with. */
export function redraw() {
  if (latest?.engine) showBlocks(latest.engine);
}
