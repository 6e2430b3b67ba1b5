// How this page speaks to its server: the key, errors in OpenAI's shape, server-sent events.

export const KEY = "superinfer-key" // in the tab's session storage

export function headers() {
  const key = sessionStorage.getItem(KEY)
  return key ? { authorization: `Bearer ${key}` } : {}
}

export async function failureOf(response) {
  const text = await response.text()
  try {
    return JSON.parse(text).error.message
  } catch {
    return `${response.status} ${response.statusText}`
  }
}

// The server-sent events of a response.
export async function* sent(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ""
  while (true) {
    const { value, done } = await reader.read()
    if (done) return
    rest += value
    const blocks = rest.split("\n\n")
    rest = blocks.pop()
    for (const block of blocks) {
      let event = "message"
      let data = ""
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event = line.slice(7)
        else if (line.startsWith("data: ")) data += line.slice(6)
      }
      if (data) yield { event, data }
    }
  }
}
