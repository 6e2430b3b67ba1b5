// The chat: promises set by sliders, the answer as it streams, when its tokens were due, and the engine's verdict.

import { failureOf, headers, sent } from "./http.js"
import { seconds } from "./lanes.js"

const SHOWN_TICKS = 400 // an answer's first tokens; the rest are not drawn
const KEPT_MESSAGES = 40

const OFF = null
const SLIDERS = {
  ttft: { steps: [OFF, 50, 100, 200, 300, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000], start: 1000 },
  tbt: { steps: [OFF, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000], start: 100 },
  deadline: { steps: [OFF, 500, 1000, 2000, 3000, 5000, 8000, 15000, 30000, 60000], start: 15000 },
}
const talk = document.getElementById("talk")
const prompt = document.getElementById("prompt")
const send = document.getElementById("send")
const messages = []
let model = ""
let running = null // the AbortController of the answer under way

export function setModel(name) {
  model = name
}

const said = (ms) => (ms === OFF ? "no promise" : ms < 1000 ? `${Math.round(ms)} ms` : `${+(ms / 1000).toFixed(2)} s`)

for (const [name, slider] of Object.entries(SLIDERS)) {
  const input = document.getElementById(name)
  const output = document.querySelector(`output[for="${name}"]`)
  const show = () => {
    output.textContent = said(slider.steps[input.value])
    input.setAttribute("aria-valuetext", output.textContent)
  }
  input.max = slider.steps.length - 1
  input.value = slider.steps.indexOf(slider.start)
  input.addEventListener("input", show)
  show()
}

function promised() {
  const slo = {}
  for (const [name, slider] of Object.entries(SLIDERS)) {
    const value = slider.steps[document.getElementById(name).value]
    if (value !== OFF) slo[`${name}_ms`] = value
  }
  return slo
}

document.getElementById("promise").addEventListener("submit", (event) => event.preventDefault())
document.getElementById("ask").addEventListener("submit", (event) => {
  event.preventDefault()
  if (running) running.abort()
  else if (prompt.value.trim()) ask(prompt.value.trim())
})
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault()
    if (!running) document.getElementById("ask").requestSubmit()
  }
})

async function ask(text) {
  prompt.value = ""
  element("p", "mine", text)
  messages.push({ role: "user", content: text })
  messages.splice(0, messages.length - KEPT_MESSAGES)
  const answer = answerElement()
  const slo = promised()
  running = new AbortController()
  send.textContent = "Stop"
  const began = performance.now()
  const arrived = []
  let content = ""
  let report = null
  try {
    const body = { model, messages, stream: true }
    if (Object.keys(slo).length) body.slo = slo
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    })
    if (!response.ok) throw new Error(await failureOf(response))
    for await (const { event, data } of sent(response)) {
      if (event === "error") throw new Error(JSON.parse(data).error.message)
      if (data === "[DONE]") break
      const chunk = JSON.parse(data)
      if (chunk.slo) report = chunk.slo
      const piece = chunk.choices[0]?.delta?.content
      if (!piece) continue
      arrived.push(performance.now() - began)
      content += piece
      answer.text.textContent = content
      drawTicks(answer.ticks, arrived, slo)
      talk.scrollTop = talk.scrollHeight
    }
    showVerdict(answer.verdict, report)
  } catch (error) {
    const stopped = error.name === "AbortError"
    answer.verdict.className = `verdict ${stopped ? "" : "failed"}`
    answer.verdict.textContent = stopped ? "Stopped." : String(error.message)
  } finally {
    if (content) messages.push({ role: "assistant", content })
    else messages.pop() // a question without an answer is not part of what follows
    running = null
    send.textContent = "Send"
    talk.scrollTop = talk.scrollHeight
  }
}

function element(tag, name, text) {
  const made = talk.appendChild(document.createElement(tag))
  made.className = name
  if (text) made.textContent = text
  talk.scrollTop = talk.scrollHeight
  while (talk.childElementCount > 2 * KEPT_MESSAGES) talk.firstElementChild.remove()
  return made
}

function answerElement() {
  const theirs = element("div", "theirs")
  const text = theirs.appendChild(document.createElement("p"))
  const ticks = theirs.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"))
  ticks.setAttribute("class", "ticks")
  ticks.setAttribute("viewBox", "0 0 1000 22")
  ticks.setAttribute("preserveAspectRatio", "none")
  ticks.setAttribute("role", "img")
  for (const name of ["due", "on-time", "too-late"]) {
    ticks.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path")).setAttribute("class", name)
  }
  const verdict = theirs.appendChild(document.createElement("div"))
  verdict.className = "verdict"
  talk.scrollTop = talk.scrollHeight
  return { text, ticks, verdict }
}

// When piece k was due, in milliseconds after it was asked for; the same rule as the engine's (SLO in superinfer).
function dueOf(k, slo, arrived) {
  let due = Infinity
  const start = slo.ttft_ms ?? arrived[0]
  if (slo.tbt_ms !== undefined) due = start + k * slo.tbt_ms
  else if (slo.ttft_ms !== undefined && k === 0) due = slo.ttft_ms
  return Math.min(due, slo.deadline_ms ?? Infinity)
}

// Upper half: when pieces were due. Lower half: when they came, as this browser saw it.
function drawTicks(svg, arrived, slo) {
  const shown = arrived.slice(0, SHOWN_TICKS)
  const dues = shown.map((_, k) => dueOf(k, slo, arrived))
  const end = 1.02 * Math.max(...shown, ...dues.filter(Number.isFinite))
  const lines = { due: "", "on-time": "", "too-late": "" }
  let late = 0
  shown.forEach((at, k) => {
    if (Number.isFinite(dues[k])) lines.due += `M${((1000 * dues[k]) / end).toFixed(1)} 0V9`
    lines[at <= dues[k] ? "on-time" : "too-late"] += `M${((1000 * at) / end).toFixed(1)} 12V22`
    late += at > dues[k]
  })
  for (const [name, path] of Object.entries(lines)) svg.querySelector(`.${name}`).setAttribute("d", path)
  const text = `${shown.length} pieces over ${seconds(end / 1020)}, ${late} of them after they were due`
  svg.setAttribute("aria-label", text)
}

function showVerdict(verdict, report) {
  if (report === null || report.met === null) {
    verdict.textContent = "Nothing was promised."
    return
  }
  verdict.className = `verdict ${report.met ? "met" : "missed"}`
  verdict.append(Object.assign(document.createElement("b"), { textContent: report.met ? "Kept" : "Missed" }))
  const parts = [
    report.ttft_ms === null ? "" : `first token ${said(report.ttft_ms)}`,
    `longest gap ${said(report.max_tbt_ms)}`,
    `${said(report.e2e_ms)} in all`,
    report.why ? `most of it: ${report.why}` : "",
    report.truncated ? "cut at the deadline" : "",
  ]
  verdict.append(" · " + parts.filter(Boolean).join(" · "))
}
