// The server's interface, as any client of OpenAI's API would use it.

let key = sessionStorage.getItem("cumo-key") || "";

export function setKey(value) {
  key = value.trim();
  sessionStorage.setItem("cumo-key", key);
}

async function request(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (!response.ok) throw new Error(await sentence(response));
  return response;
}

async function sentence(response) {
  try {
    const { error } = await response.json();
    if (response.status === 401) return `${error.message} (see Settings)`;
    return error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

export async function describeModel() {
  return (await request("/cumo/model")).json();
}

export async function routingOf(url) {
  return (await request("/cumo/routing", { image: url })).json();
}

// Pieces of the answer; the last yield is the reason why it ended.
export async function* answer(body, signal) {
  const response = await request("/v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    pending += value;
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const message = JSON.parse(data);
      if (message.error) throw new Error(message.error.message);
      const choice = message.choices[0];
      if (choice && choice.delta.content) yield { piece: choice.delta.content };
      if (choice && choice.finish_reason) yield { reason: choice.finish_reason };
    }
  }
}
