// Server-sent events out of a response's body, as they come.

// Yields {event, data}; comments and fields that nobody needs are left out.
export async function* events(body) {
  let event = "";
  let data = [];
  for await (const line of lines(body)) {
    if (line === "") {
      if (data.length) yield { event: event || "message", data: data.join("\n") };
      event = "";
      data = [];
      continue;
    }
    const colon = line.indexOf(":");
    if (colon === 0) continue; // a comment that keeps the connection open
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") data.push(value);
    else if (field === "event") event = value;
  }
}

// Lines end with \n, \r\n or \r, wherever the network cuts the bytes.
async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      let cut;
      while ((cut = /\r\n|\n|\r(?!$)/.exec(rest))) {
        yield rest.slice(0, cut.index);
        rest = rest.slice(cut.index + cut[0].length);
      }
      if (done) break;
    }
    if (rest) yield rest.replace(/\r$/, "");
  } finally {
    reader.releaseLock();
  }
}
