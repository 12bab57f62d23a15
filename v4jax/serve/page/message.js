// How one message looks; an answer grows while it streams.

import { el, tokenButton } from "./dom.js";
import * as roving from "./roving.js";

export function userMessage(text, title = "You") {
  return el("article", { class: "message user" }, el("h3", {}, title), el("div", { class: "text" }, text));
}

// An answer on its way. `onToken(message, place)` is called for a clicked piece.
export class Answer {
  constructor(title, onToken) {
    this.onToken = onToken;
    this.request = null; // what the server says of it: {request, prompt_tokens, cached_tokens}
    this.made = 0;
    this.drafted = 0;
    this.places = null; // where the next piece of text begins among the answer's tokens
    this.calls = [];
    this.status = el("p", { class: "status" });
    this.text = el("div", { class: "text", role: "group", "aria-label": "Answer, by tokens" });
    this.thought = el("div", { class: "text" });
    this.thoughtCount = el("span", { class: "count" });
    this.thinking = el("details", { class: "thinking", hidden: true, open: true },
      el("summary", {}, "Thinking ", this.thoughtCount), this.thought);
    this.callList = el("div", { class: "calls" });
    this.node = el("article", { class: "message answer", "aria-busy": "true" },
      el("h3", {}, title), this.thinking, this.text, this.callList, this.status);
    for (const part of [this.text, this.thought]) {
      roving.begin(part, ".token");
      part.addEventListener("click", (event) => this.clicked(event));
    }
  }

  clicked(event) {
    const token = event.target.closest(".token");
    if (!token) return;
    for (const other of document.querySelectorAll(".message .token[aria-current]")) other.removeAttribute("aria-current");
    token.setAttribute("aria-current", "true");
    this.onToken(this, Number(token.dataset.place));
  }

  // What the server says of the tokens whose text comes next.
  about(detail) {
    this.request = detail;
    this.made = detail.first + detail.count;
    this.drafted += detail.drafted.length;
    this.places ??= { first: detail.first, drafted: false };
    this.places.drafted ||= detail.drafted.length > 0;
  }

  piece(part, text) {
    const places = this.places;
    this.places = null;
    const kind = places?.drafted ? "draft" : "decode";
    if (places === null || !this.onToken) return part.append(el("span", {}, text));
    const others = part.querySelector(".token") !== null;
    part.append(tokenButton({ class: kind, tabindex: others ? "-1" : "0", "data-place": places.first }, text));
  }

  addText(text) {
    // Once the answer itself begins, what was thought folds.
    if (!this.text.hasChildNodes()) this.thinking.open = false;
    this.piece(this.text, text);
  }

  addThought(text) {
    this.thinking.hidden = false;
    this.thoughts = (this.thoughts || 0) + 1;
    this.thoughtCount.textContent = `${this.thoughts} pieces`;
    this.piece(this.thought, text);
  }

  // Tool calls come in parts, each with its number.
  addCalls(deltas) {
    this.places = null;
    this.thinking.open = false;
    for (const delta of deltas) {
      const call = (this.calls[delta.index ?? 0] ??= this.newCall());
      if (delta.id) call.value.id = delta.id;
      if (delta.function?.name) call.value.function.name += delta.function.name;
      if (delta.function?.arguments) call.value.function.arguments += delta.function.arguments;
      call.name.textContent = call.value.function.name;
      call.arguments.textContent = call.value.function.arguments;
    }
  }

  newCall() {
    const name = el("code", {});
    const args = el("pre", { class: "arguments" });
    const node = el("section", { class: "call", "aria-label": "Tool call" }, el("h4", {}, "calls ", name), args);
    this.callList.append(node);
    return { node, name, arguments: args, value: { id: "", type: "function", function: { name: "", arguments: "" } } };
  }

  // Fields for what the tools gave; `send(results)` goes on with them.
  askForResults(send) {
    const fields = this.calls.map((call) => {
      const field = el("textarea", { rows: "2", class: "code", "aria-label": `Result of ${call.value.function.name}` });
      call.node.append(el("label", {}, "result", field));
      return field;
    });
    const button = el("button", { type: "button", onclick: () => {
      button.disabled = true;
      for (const field of fields) field.readOnly = true;
      send(this.calls.map((call, i) => ({ role: "tool", tool_call_id: call.value.id, content: fields[i].value })));
    } }, this.calls.length > 1 ? "Send the results" : "Send the result");
    this.callList.append(button);
  }

  // The message as the next request has to repeat it.
  asMessage() {
    const message = { role: "assistant", content: this.text.textContent };
    if (this.thoughts) message.reasoning_content = this.thought.textContent;
    if (this.calls.length) message.tool_calls = this.calls.map((call) => call.value);
    return message;
  }

  end(facts) {
    this.node.setAttribute("aria-busy", "false");
    this.status.replaceChildren(...facts.map((fact) => el("span", {}, fact)));
    if (this.request && this.onToken) {
      this.status.append(el("button", {
        type: "button", class: "quiet look", onclick: () => this.onToken(this, null),
      }, "Look inside"));
    }
  }
}
