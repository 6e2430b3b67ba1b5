// The three lanes. A card is one request; it keeps its element while it moves, so that the eye can follow it.

const GAP = 6
// Largest first. Each lane takes the largest at which all its cards fit.
const SIZES = [
  { name: "large", width: 132, height: 30, stretch: true },
  { name: "small", width: 58, height: 26, stretch: true },
  { name: "dot", width: 14, height: 14, gap: 3, stretch: false },
]
const LANE_OF = { waiting: "waiting", computing: "computing", loading: "memory", rotated: "memory" }

const stage = document.getElementById("stage")
const layer = document.getElementById("cards")
const lanes = {}
for (const element of stage.querySelectorAll(".lane")) {
  lanes[element.dataset.lane] = { element, room: element.querySelector(".room"), size: 0, slots: [], held: new Map() }
}
const cards = new Map() // by the engine's id of the sequence
let last = null

export const seconds = (s) => (Math.abs(s) < 9.95 ? s.toFixed(1) : Math.round(s).toLocaleString("en")) + " s"
const signed = (s) => (s <= -0.05 ? "−" : s >= 0.05 ? "+" : "") + seconds(Math.abs(s))

// Colours go to classes in the order in which they are first seen, and stay.
const classes = new Map()
export function colourOf(name) {
  const known = name || "default"
  if (!classes.has(known)) classes.set(known, "k" + Math.min(classes.size, 5))
  return classes.get(known)
}

export function showLanes(live) {
  last = live
  const counts = {
    waiting: live.waiting || 0,
    computing: live.computing || 0,
    memory: (live.rotated || 0) + (live.loading || 0),
  }
  const byLane = { waiting: [], computing: [], memory: [] }
  for (const request of live.requests) byLane[LANE_OF[request.state]].push(request)
  byLane.waiting.sort((a, b) => a.id - b.id)
  const shown = new Set()
  const origin = stage.getBoundingClientRect()
  for (const [name, lane] of Object.entries(lanes)) {
    const drawn = arrange(lane, byLane[name], name === "waiting", origin)
    for (const request of drawn) shown.add(request.id)
    lane.element.querySelector(".count").textContent = counts[name].toLocaleString("en")
    const rest = counts[name] - drawn.length
    lane.element.querySelector(".undrawn").textContent = rest > 0 ? `${rest.toLocaleString("en")} not drawn` : ""
  }
  for (const [id, card] of cards) if (!shown.has(id)) remove(id, card)
  stage.classList.toggle("idle", counts.waiting + counts.computing + counts.memory === 0)
  const late = live.requests.filter((request) => request.slack_s < 0).length
  stage.setAttribute(
    "aria-label",
    `Requests: ${counts.waiting} waiting, ${counts.computing} computing, ${counts.memory} in CPU memory; ${late} late`,
  )
}

// Positions for a lane's requests; returns those there is room for.
function arrange(lane, requests, queue, origin) {
  const box = lane.room.getBoundingClientRect()
  let grid = gridOf(lane.size, box)
  // Down at once, up only with room to spare: a request more or less must not make all cards change size each time.
  while (requests.length > grid.capacity && lane.size < SIZES.length - 1) grid = gridOf(++lane.size, box)
  while (lane.size > 0 && requests.length < 0.8 * gridOf(lane.size - 1, box).capacity) grid = gridOf(--lane.size, box)
  const drawn = requests.slice(0, grid.capacity)
  const places = queue ? drawn.map((_, at) => at) : keepPlaces(lane, drawn, grid.capacity)
  drawn.forEach((request, at) => {
    const column = places[at] % grid.columns
    const row = Math.floor(places[at] / grid.columns)
    const x = box.left - origin.left + column * (grid.width + grid.gap)
    const y = box.top - origin.top + row * (grid.height + grid.gap)
    draw(request, x, y, grid)
  })
  return drawn
}

function gridOf(at, box) {
  const size = SIZES[at]
  const gap = size.gap || GAP
  const columns = Math.max(1, Math.floor((box.width + gap) / (size.width + gap)))
  const rows = Math.max(0, Math.floor((box.height + gap) / (size.height + gap)))
  const width = size.stretch ? (box.width + gap) / columns - gap : size.width
  return { name: size.name, gap, columns, width, height: size.height, capacity: columns * rows }
}

// In memory nobody moves up when another leaves: a card keeps its place while it stays, and newcomers fill the gaps.
function keepPlaces(lane, requests, capacity) {
  const before = lane.held
  lane.held = new Map()
  const taken = new Set()
  for (const { id } of requests) {
    const place = before.get(id)
    if (place !== undefined && place < capacity) {
      lane.held.set(id, place)
      taken.add(place)
    }
  }
  let free = 0
  for (const { id } of requests) {
    if (lane.held.has(id)) continue
    while (taken.has(free)) free++
    lane.held.set(id, free)
    taken.add(free)
  }
  return requests.map(({ id }) => lane.held.get(id))
}

function draw(request, x, y, grid) {
  let card = cards.get(request.id)
  if (card === undefined) {
    card = add(request)
    card.element.style.transform = `translate(${x}px, ${y}px)`
    requestAnimationFrame(() => card.element.classList.remove("new"))
  }
  const late = request.slack_s < 0
  const kind = `card ${grid.name} ${colourOf(request.slo_class)}${late ? " late" : ""}`
  const classes = `${kind}${request.state === "loading" ? " loading" : ""}`
  if (card.classes !== classes) {
    const fresh = card.element.classList.contains("new") ? " new" : ""
    card.element.className = classes + fresh
    card.classes = classes
  }
  const place = `translate(${x}px, ${y}px)`
  if (card.place !== place) card.element.style.transform = card.place = place
  if (card.width !== grid.width || card.height !== grid.height) {
    card.element.style.width = `${(card.width = grid.width)}px`
    card.element.style.height = `${(card.height = grid.height)}px`
  }
  const output = request.output_tokens || 0
  const share = request.max_tokens ? Math.min(1, output / request.max_tokens) : 0
  card.done.style.transform = `scaleX(${share.toFixed(3)})`
  const slack = request.slack_s === undefined ? null : request.slack_s
  card.tokens.textContent = output ? `${output} tok` : request.state === "computing" ? "prefill" : `${request.prompt_tokens} in`
  card.slack.textContent = slack === null ? "" : signed(slack)
  card.element.dataset.state = request.state
  card.element.title =
    `${request.slo_class || "default"} · ${request.state} · prompt ${request.prompt_tokens} · ` +
    `output ${output} of at most ${request.max_tokens || 0} · here for ${seconds(request.age_s)}` +
    (slack === null ? "" : slack < 0 ? ` · late by ${seconds(-slack)}` : ` · ${seconds(slack)} until the next token is due`) +
    (request.program ? ` · program ${request.program}` : "")
}

function add(request) {
  const element = document.createElement("div")
  element.className = "card new"
  element.dataset.request = request.request_id
  const done = element.appendChild(document.createElement("i"))
  done.className = "done"
  const said = element.appendChild(document.createElement("span"))
  said.className = "said"
  const tokens = said.appendChild(document.createElement("span"))
  tokens.className = "tokens"
  const slack = said.appendChild(document.createElement("span"))
  slack.className = "slack"
  layer.appendChild(element)
  const card = { element, done, tokens, slack, classes: "", place: "", width: 0, height: 0 }
  cards.set(request.id, card)
  return card
}

function remove(id, card) {
  cards.delete(id)
  card.element.classList.add("old")
  setTimeout(() => card.element.remove(), 300)
}

addEventListener("resize", () => last && showLanes(last))
