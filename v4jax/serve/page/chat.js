// The conversation: sends it, streams the answer into the page, keeps what the next turn needs.

import { byId } from "./dom.js";
import { Answer, userMessage } from "./message.js";
import { ask } from "./server.js";
import { events } from "./sse.js";

export class Chat {
  constructor(server, { onToken, onError }) {
    Object.assign(this, { server, onToken, onError });
    this.messages = [];
    this.controller = null;
    this.list = byId("messages");
  }

  get busy() {
    return this.controller !== null;
  }

  stop() {
    this.controller?.abort();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.list.replaceChildren();
  }

  async send(text) {
    if (this.server.chat) {
      this.messages.push({ role: "user", content: text });
      this.show(userMessage(text));
      await this.answer();
    } else {
      this.show(userMessage(text, "Text"));
      await this.complete(text);
    }
  }

  show(node) {
    this.list.append(node);
    node.scrollIntoView({ block: "nearest" });
    this.list.scrollTop = this.list.scrollHeight;
  }

  async answer() {
    const system = byId("system").value;
    const body = {
      messages: [...(system ? [{ role: "system", content: system }] : []), ...this.messages],
      thinking: { type: byId("thinking").checked ? "enabled" : "disabled" },
      ...this.settings(),
    };
    const tools = byId("tools").value.trim();
    if (tools) {
      try {
        body.tools = JSON.parse(tools);
      } catch {
        return this.onError("The tools are not valid JSON; expected a list of functions.");
      }
    }
    const answer = await this.run("/v1/chat/completions", body, (answer, choice) => {
      const delta = choice.delta || {};
      if (delta.reasoning_content) answer.addThought(delta.reasoning_content);
      if (delta.content) answer.addText(delta.content);
      if (delta.tool_calls) answer.addCalls(delta.tool_calls);
    });
    if (!answer) return;
    this.messages.push(answer.asMessage());
    if (answer.finish === "tool_calls") {
      answer.askForResults((results) => {
        this.messages.push(...results);
        this.answer();
      });
    }
  }

  async complete(prompt) {
    await this.run("/v1/completions", { prompt, ...this.settings() }, (answer, choice) => {
      if (choice.text) answer.addText(choice.text);
    });
  }

  settings() {
    return {
      model: this.server.model,
      temperature: Number(byId("temperature").value),
      max_tokens: Number(byId("max-tokens").value),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  // One request; the answer, or null where none came.
  async run(path, body, take) {
    const answer = new Answer(this.server.model, this.server.lens ? this.onToken : null);
    const times = { began: performance.now(), first: null };
    this.controller = new AbortController();
    this.changed();
    try {
      const response = await ask(path, { body, signal: this.controller.signal, detail: true });
      this.show(answer.node);
      for await (const event of events(response.body)) {
        if (event.data === "[DONE]") break;
        this.take(answer, event, take, times);
      }
      return answer;
    } catch (error) {
      if (error.name !== "AbortError") this.onError(error.message);
      else answer.finish = "stopped";
      return answer.node.isConnected ? answer : null;
    } finally {
      this.controller = null;
      this.changed();
      const follows = this.follows();
      answer.end(facts(answer, times));
      if (follows) this.list.scrollTop = this.list.scrollHeight;
    }
  }

  take(answer, event, take, times) {
    const value = JSON.parse(event.data);
    if (event.event === "v4jax") return answer.about(value);
    if (value.error) throw new Error(value.error.message);
    if (value.usage) answer.usage = value.usage;
    const choice = value.choices?.[0];
    if (!choice) return;
    const follows = this.follows();
    take(answer, choice);
    if (times.first === null && answer.node.textContent) times.first = performance.now();
    if (choice.finish_reason) answer.finish = choice.finish_reason;
    if (follows) this.list.scrollTop = this.list.scrollHeight;
  }

  // Whether the end of the conversation is in sight.
  follows() {
    return this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 60;
  }

  changed() {
    byId("send").hidden = this.busy;
    byId("stop").hidden = !this.busy;
  }
}

// The line under an answer.
function facts(answer, times) {
  const { usage, request, finish } = answer;
  const prompt = usage?.prompt_tokens ?? request?.prompt_tokens;
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? request?.cached_tokens ?? 0;
  const made = answer.made || usage?.completion_tokens;
  const found = [];
  if (prompt !== undefined) found.push(`${prompt} prompt tokens, ${cached} from the prefix cache`);
  if (made) found.push(`${made} new${answer.drafted ? `, ${answer.drafted} of them drafted` : ""}`);
  if (times.first !== null) {
    const first = times.first - times.began;
    found.push(`first text after ${(first / 1000).toFixed(2)} s`);
    const seconds = (performance.now() - times.first) / 1000;
    if (made > 1 && seconds > 0) found.push(`${((made - 1) / seconds).toFixed(0)} tokens/s`);
  }
  const ends = { length: "cut at the limit of new tokens", stopped: "stopped", error: "ended with an error" };
  if (ends[finish]) found.push(ends[finish]);
  return found;
}
