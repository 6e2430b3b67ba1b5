// The feed: reads /v1/live, shows its figures, hands requests to the lanes, and tries again when the engine is away.

import { KEY, failureOf, headers, sent } from "./http.js"
import { colourOf, showLanes } from "./lanes.js"
import { setModel } from "./chat.js"

const RETRY_MS = 2000
const HISTORY_S = 60
const RATE_OVER_S = 1 // a figure is the mean of the last second, or it could not be read

const by = (id) => document.getElementById(id)

// ---------------------------------------------------------------- status and key

function say(state, text) {
  by("status").dataset.state = state
  by("status").textContent = text
}

function openKey(open) {
  by("key-form").hidden = !open
  by("key-toggle").setAttribute("aria-expanded", String(open))
  if (open) by("key").focus()
}

by("key-toggle").addEventListener("click", () => openKey(by("key-form").hidden))
by("key-form").addEventListener("keydown", (event) => event.key === "Escape" && openKey(false))
by("key-form").addEventListener("submit", (event) => {
  event.preventDefault()
  sessionStorage.setItem(KEY, by("key").value)
  openKey(false)
  again()
})

// ---------------------------------------------------------------- figures

let history = [] // {at, output, prefill, in, out}: counters, oldest first

function remember(snapshot) {
  const { stats, at_s: at } = snapshot
  const tiers = stats.tiers || {}
  const now = {
    at,
    output: stats.output_tokens,
    prefill: stats.prefill_tokens || 0,
    in: tiers.bytes_in || 0,
    out: tiers.bytes_out || 0,
  }
  const before = history.at(-1)
  if (before && (now.output < before.output || now.at < before.at)) history = [] // another engine, or server
  history.push(now)
  while (history[0].at < at - HISTORY_S - RATE_OVER_S) history.shift()
}

// Mean rate of a counter over the second that ends at each point of the history; null before there is one.
function rates(name) {
  const found = []
  let from = 0
  history.forEach((point, at) => {
    while (from < at && point.at - history[from + 1].at >= RATE_OVER_S) from++
    const over = point.at - history[from].at
    found.push(over > 0 ? Math.max(0, point[name] - history[from][name]) / over : null)
  })
  return found
}

// Paths of a sparkline: `points` are rates, `zero` and `top` the y of nothing and of `most`.
function drawLine(svg, suffix, points, most, zero, top) {
  const end = history.at(-1).at
  const y = (rate) => zero + ((top - zero) * rate) / (most || 1)
  let line = ""
  let first = null
  points.forEach((rate, at) => {
    if (rate === null) return
    const x = 120 - ((end - history[at].at) / HISTORY_S) * 120
    if (x < -1) return
    if (first === null) first = x
    line += `${line ? "L" : "M"}${x.toFixed(2)} ${y(rate).toFixed(2)}`
  })
  svg.querySelector(`.line${suffix}`).setAttribute("d", line)
  svg.querySelector(`.area${suffix}`).setAttribute("d", line ? `${line}L120 ${zero}L${first.toFixed(2)} ${zero}Z` : "")
}

const whole = (rate) => (rate === null ? "–" : Math.round(rate).toLocaleString("en"))
const UNITS = [["GB/s", 1e9], ["MB/s", 1e6]] // the largest in which the link's figures have two digits
const digits = (rate) => (rate === null ? "–" : rate < 9.95 ? rate.toFixed(1) : whole(rate))

function showRates(hasLink) {
  for (const name of ["output", "prefill"]) {
    const points = rates(name)
    by(`${name}-rate`).textContent = whole(points.at(-1))
    drawLine(by(`${name}-line`), "", points, Math.max(...points), 39, 3)
  }
  const into = rates("in")
  const out = rates("out")
  const most = Math.max(...into, ...out)
  const [unit, bytes] = UNITS.find((one) => most >= one[1]) || UNITS[most > 0 ? 1 : 0]
  by("link-unit").textContent = unit
  by("link-in").textContent = hasLink && into.at(-1) !== null ? digits(into.at(-1) / bytes) : "–"
  by("link-out").textContent = hasLink && out.at(-1) !== null ? digits(out.at(-1) / bytes) : "–"
  drawLine(by("link-line"), ".in", into, most, 20, 2)
  drawLine(by("link-line"), ".out", out, most, 20, 38)
}

const percent = (share) => `${share === 1 ? 100 : Math.min(99.9, 100 * share).toFixed(share < 0.9 ? 0 : 1)} %`

function showKept(stats) {
  const classes = Object.entries(stats.classes || {}).map(([name, { requests = 0, met = 0, missed = 0 }]) => {
    return { name, met, finished: requests, promised: met + missed }
  })
  const promised = classes.reduce((sum, one) => sum + (one.promised || 0), 0)
  const met = classes.reduce((sum, one) => sum + (one.met || 0), 0)
  by("kept-share").textContent = promised ? percent(met / promised) : "–"
  by("kept-count").textContent = promised
    ? `${met.toLocaleString("en")} of ${promised.toLocaleString("en")}`
    : `${(stats.finished || 0).toLocaleString("en")} finished`
  const list = by("classes")
  const shown = classes.slice(0, 4)
  while (list.childElementCount < shown.length) list.appendChild(classRow())
  while (list.childElementCount > shown.length) list.lastChild.remove()
  shown.forEach((one, at) => {
    const [swatch, name, figure, bar] = list.children[at].children
    const share = one.promised ? (one.met || 0) / one.promised : null
    list.children[at].className = colourOf(one.name)
    swatch.className = "swatch"
    name.textContent = one.name
    figure.textContent = share === null ? `${one.finished} finished` : `${percent(share)} of ${one.promised}`
    bar.firstChild.style.transform = `scaleX(${share === null ? 0 : share})`
  })
}

function classRow() {
  const row = document.createElement("li")
  for (const name of ["swatch", "name", "share", "bar"]) row.appendChild(document.createElement("span")).className = name
  row.lastChild.appendChild(document.createElement("i"))
  return row
}

function showMeter(lane, used, cached, total, unit) {
  const meter = document.querySelector(`.lane[data-lane="${lane}"] .meter`)
  const note = document.querySelector(`.lane[data-lane="${lane}"] .note`)
  meter.hidden = !total
  if (!total) return
  const share = Math.round((100 * used) / total)
  meter.querySelector(".used").style.width = `${(100 * used) / total}%`
  meter.querySelector(".cached").style.width = `${(100 * cached) / total}%`
  meter.setAttribute("aria-valuenow", share)
  note.textContent = `${share} % of ${unit} in use, ${Math.round((100 * cached) / total)} % cached`
}

const thousands = (tokens) => (tokens < 10000 ? tokens.toLocaleString("en") : `${Math.round(tokens / 1000).toLocaleString("en")} k`)

function showMemory({ stats, page_size: page }) {
  const used = stats.blocks_total - stats.blocks_free - stats.blocks_cached
  showMeter("computing", used, stats.blocks_cached, stats.blocks_total, `${thousands(stats.blocks_total * page)} tokens`)
  const tiers = stats.tiers
  if (tiers) {
    const cached = tiers.dram_blocks - tiers.dram_free - tiers.dram_pinned
    showMeter("memory", tiers.dram_pinned, cached, tiers.dram_blocks, `${thousands(tiers.dram_blocks * page)} tokens`)
  } else {
    showMeter("memory", 0, 0, 0, "")
    document.querySelector('.lane[data-lane="memory"] .note').textContent = "no second tier: see --dram-tokens"
  }
}

function show(snapshot) {
  for (const name of ["model", "policy", "device"]) if (by(name).textContent !== snapshot[name]) by(name).textContent = snapshot[name]
  by("model").title = snapshot.model
  document.querySelector('.lane[data-lane="computing"] h2').textContent =
    snapshot.device === "cpu" ? "Computing" : "On the GPU"
  document.querySelector('.lane[data-lane="memory"] h2').textContent =
    snapshot.device === "cpu" ? "In the second tier" : "In CPU memory"
  setModel(snapshot.model)
  remember(snapshot)
  showRates(Boolean(snapshot.stats.tiers))
  showKept(snapshot.stats)
  showMemory(snapshot)
  showLanes(snapshot.live)
}

// ---------------------------------------------------------------- the feed

let look = new AbortController() // the AbortController of the look under way
let wake = () => {} // ends the pause before the next one
let pause = RETRY_MS

function again() {
  pause = 0
  look.abort()
  wake()
}

async function watch() {
  const response = await fetch("v1/live", { headers: headers(), signal: look.signal })
  if (response.status === 401 || response.status === 403) {
    say("key", "this server asks for an API key")
    if (by("key-form").hidden) openKey(true)
    return
  }
  if (!response.ok) throw new Error(await failureOf(response))
  for await (const { event, data } of sent(response)) {
    if (event !== "message") {
      say("dead", event === "dead" ? "the engine is dead; trying again" : "the engine does not answer; trying again")
      by("status").title = JSON.parse(data).error.message
      return
    }
    show(JSON.parse(data))
    say("live", "live")
    by("status").title = ""
  }
  say("dead", "the server ended the line; trying again")
}

// A tab that nobody sees costs the engine nothing.
document.addEventListener("visibilitychange", again)

while (true) {
  while (document.hidden) await new Promise((resolve) => (wake = resolve))
  look = new AbortController()
  try {
    await watch()
  } catch (error) {
    if (error.name !== "AbortError") say("dead", "the server cannot be reached; trying again")
  }
  await new Promise((resolve) => {
    wake = resolve
    setTimeout(resolve, pause)
  })
  pause = RETRY_MS
}
