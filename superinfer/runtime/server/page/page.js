"use strict";

const $ = (id) => document.getElementById(id);
const headers = () => ($("key").value ? { authorization: `Bearer ${$("key").value}` } : {});

// Events of a fetched stream. EventSource cannot send an API key.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const line = held.slice(0, end).split("\n").find((l) => l.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// ------------------------------------------------------------------ what the engine does now

const LANE = 25, MAX_SHOWN = 64, HISTORY = 240;
const lanes = new Map();
const rates = [];
let before = null;

// Where a lane's pill lies: left edge and widest width, in percent, under the four heads.
const PLACES = { waiting: [0, 22], gpu: [23.5, 31], loading: [55.5, 20], cpu: [77, 23] };

function show(now) {
  if (now.error) return state(now.error, true);
  state("live", false);
  const at = performance.now();
  if (before && at > before.at) {
    const seconds = (at - before.at) / 1000;
    const rate = (name) => Math.max(0, now[name] - before[name]) / seconds;
    rates.push(rate("output_tokens"));
    if (rates.length > HISTORY) rates.shift();
    const last = rates.slice(-4);
    $("tokens").textContent = Math.round(last.reduce((a, b) => a + b, 0) / last.length).toLocaleString("en");
    $("rate-in").textContent = (rate("bytes_in") / 1e6).toFixed(1);
    $("rate-out").textContent = (rate("bytes_out") / 1e6).toFixed(1);
    chart();
  }
  before = { at, output_tokens: now.output_tokens, bytes_in: now.bytes_in, bytes_out: now.bytes_out };
  $("unfinished").textContent = now.unfinished;
  blocks("gpu", now.gpu_blocks);
  blocks("cpu", now.cpu_blocks);
  attainment(now.attainment);
  draw(now.sequences, now.unfinished);
}

function blocks(tier, pair) {
  const [used, total] = pair ?? [0, 0]; // null: there is no such tier
  $(`${tier}-blocks`).textContent = total ? `${Math.round((100 * used) / total)} %` : "–";
  $(`${tier}-bar`).style.width = total ? `${(100 * used) / total}%` : "0";
}

function attainment(classes) {
  const names = Object.keys(classes).sort();
  if (!names.length) return;
  const box = $("attainment");
  box.replaceChildren(...names.map((name) => {
    const { met, total } = classes[name], share = (100 * met) / total;
    const row = document.createElement("div");
    row.className = "class";
    const label = document.createElement("span"), bar = document.createElement("i"), fill = document.createElement("i");
    const number = document.createElement("span");
    label.textContent = name;
    bar.className = "bar";
    fill.style.width = `${share}%`;
    bar.append(fill);
    number.textContent = `${share.toFixed(1)} % of ${total}`;
    row.append(label, bar, number);
    return row;
  }));
}

function draw(sequences, unfinished) {
  const counts = { waiting: 0, gpu: 0, cpu: 0, loading: 0 };
  for (const s of sequences) counts[s.state] += 1;
  $("count-waiting").textContent = counts.waiting;
  $("count-gpu").textContent = counts.gpu + counts.loading;
  $("count-cpu").textContent = counts.cpu;
  const shown = sequences.slice(0, MAX_SHOWN), seen = new Set();
  shown.forEach((s, row) => {
    const id = `${s.request_id}.${s.index || 0}`;
    seen.add(id);
    if (!lanes.has(id)) lanes.set(id, lane());
    place(lanes.get(id), s, row);
  });
  for (const [id, l] of lanes) {
    if (seen.has(id)) continue;
    lanes.delete(id);
    l.lane.classList.add("gone");
    setTimeout(() => l.lane.remove(), 300);
  }
  $("lanes").style.height = `${shown.length * LANE}px`;
  $("idle").hidden = unfinished > 0;
  $("cut").textContent = unfinished > shown.length ? `${shown.length} of ${unfinished} shown` : "";
}

function lane() {
  const lane = document.createElement("div"), pill = document.createElement("div");
  const dot = document.createElement("b"), text = document.createElement("span"), bar = document.createElement("i");
  lane.className = "lane";
  pill.append(dot, text, bar);
  lane.append(pill);
  $("lanes").append(lane);
  return { lane, pill, dot, text, bar };
}

function place(l, s, row) {
  const [left, width] = PLACES[s.state];
  l.lane.style.transform = `translateY(${row * LANE}px)`;
  l.pill.className = `pill ${s.state}`;
  l.pill.style.left = `${left}%`;
  l.pill.style.width = `${width}%`;
  const slack = s.slack_s;
  const urgency = slack == null ? "free" : slack < 0 ? "late" : slack < 0.2 * (slack + s.age_s) ? "soon" : "ok";
  l.dot.className = `dot ${urgency}`;
  const due = slack == null ? "" : slack < 0 ? ` · ${(-slack).toFixed(1)} s late` : ` · ${slack.toFixed(1)} s left`;
  const name = s.program || s.slo_class || s.request_id.slice(0, 6);
  l.text.textContent = `${name} · ${s.prompt_tokens}+${s.output_tokens}${due}`;
  l.pill.title = `${l.text.textContent} · ${s.age_s.toFixed(1)} s old · ${s.state}`;
  l.bar.style.width = `${Math.min(100, 100 * (1 - Math.exp(-s.output_tokens / 256)))}%`;
}

function chart() {
  const canvas = $("chart"), scale = window.devicePixelRatio || 1;
  const width = (canvas.width = canvas.clientWidth * scale), height = (canvas.height = canvas.clientHeight * scale);
  const draw = canvas.getContext("2d"), top = Math.max(10, ...rates);
  const style = getComputedStyle(document.documentElement);
  draw.beginPath();
  rates.forEach((rate, at) => draw.lineTo(width - (rates.length - 1 - at) * (width / HISTORY), height - 2 - (rate / top) * (height - 16 * scale)));
  draw.strokeStyle = style.getPropertyValue("--gpu");
  draw.lineWidth = 2 * scale;
  draw.stroke();
  draw.fillStyle = style.getPropertyValue("--quiet");
  draw.font = `${11 * scale}px system-ui`;
  draw.fillText(`max ${Math.round(top)} tokens/s, last minute`, 2, 11 * scale);
}

function state(text, bad) {
  $("link-state").textContent = text;
  $("link-state").classList.toggle("bad", bad);
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/v1/live", { headers: headers() });
      $("key-label").hidden = response.status !== 401 && !$("key").value;
      if (response.status === 401) state("an API key is needed", true);
      else if (!response.ok) state(`${response.status}`, true);
      else for await (const now of events(response)) show(now);
    } catch (error) {
      state("no connection", true);
    }
    before = null;
    await new Promise((done) => setTimeout(done, 1000));
  }
}

// ------------------------------------------------------------------ chat

let messages = [], running = null;

// A slider's position 0..100 as a value between low and high, each step the same ratio; at the right end: no promise.
const scales = { ttft: [50, 20000], tbt: [10, 1000], deadline: [500, 120000], max: [8, 4096] };
function value(name) {
  const [low, high] = scales[name], at = Number($(name).value);
  if (at === 100 && name !== "max") return null;
  return Number((low * (high / low) ** (at / 100)).toPrecision(2));
}
function seconds(ms) { return ms === null ? "any time" : ms < 1000 ? `${ms} ms` : `${ms / 1000} s`; }
function label(name) {
  $(`${name}-out`).textContent = name === "max" ? `${Math.round(value(name))} tokens` : seconds(value(name));
}
for (const name of Object.keys(scales)) {
  $(name).addEventListener("input", () => label(name));
  label(name);
}

function said(role, text) {
  const box = document.createElement("div");
  box.className = `said ${role}`;
  box.textContent = text;
  $("talk").append(box);
  $("talk").scrollTop = 1e9;
  return box;
}

function verdict(text, kind) {
  const line = document.createElement("p");
  line.className = `verdict ${kind}`;
  line.textContent = text;
  $("talk").append(line);
  $("talk").scrollTop = 1e9;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  said("user", text);
  const box = said("assistant", "");
  const thought = document.createElement("span"), answer = document.createElement("span");
  thought.className = "thought";
  box.append(thought, answer);
  const slo = {};
  for (const name of ["ttft", "tbt", "deadline"]) if (value(name) !== null) slo[`${name}_ms`] = value(name);
  const body = { model, messages, stream: true, max_completion_tokens: Math.round(value("max")) };
  if (Object.keys(slo).length) body.slo = slo;
  running = new AbortController();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal: running.signal, body: JSON.stringify(body),
      headers: { "content-type": "application/json", ...headers() },
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta ?? {};
      thought.textContent += delta.reasoning_content ?? "";
      answer.textContent += delta.content ?? "";
      $("talk").scrollTop = 1e9;
      if (chunk.slo) report(chunk.slo);
    }
  } catch (error) {
    verdict(error.name === "AbortError" ? "stopped" : error.message, error.name === "AbortError" ? "" : "missed");
  } finally {
    messages.push({ role: "assistant", content: answer.textContent });
    running = null;
  }
}

function report(slo) {
  const ms = (x) => (x === null ? "–" : `${x.toFixed(0)} ms`);
  const times = `first token ${ms(slo.ttft_ms)}, longest gap ${ms(slo.max_tbt_ms)}, all ${ms(slo.e2e_ms)}`;
  verdict(`${slo.met ? "promise kept" : `missed (${slo.why})`}: ${times}`, slo.met ? "met" : "missed");
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  busy(true);
  await ask(text);
  busy(false);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => { messages = []; $("talk").replaceChildren(); });

let model = "";
async function name() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.ok) $("model").textContent = model = (await response.json()).data[0].id;
}
$("key").addEventListener("change", name);
name();
watch();
