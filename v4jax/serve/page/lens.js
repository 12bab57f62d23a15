// The panel beside the chat: the tokens of one request, and what the model looked at for one.

import { byId, el, tokenButton, visible } from "./dom.js";
import { alternatives, layers } from "./figures.js";
import * as roving from "./roving.js";
import { ask } from "./server.js";

const ORIGINS = {
  cache: "from the prefix cache",
  prefill: "read (prefill)",
  decode: "made one by one",
  draft: "from a draft",
};
const SHOWN = 1200; // tokens in the strip, around the one that is looked at

export class Lens {
  constructor(server, { onError }) {
    this.onError = onError;
    this.request = null;
    this.tokens = [];
    this.position = null;
    this.wrote = false; // show the pass that wrote the token, not the one that read it
    byId("lens-note").textContent = server.lens
      ? "Click a token of an answer, or walk to it with Tab and the arrow keys and press Enter."
      : "The lens is off. Start the server with --lens to see what the model looks at.";
    const strip = byId("strip");
    roving.begin(strip, ".token");
    strip.addEventListener("click", (event) => {
      const token = event.target.closest(".token");
      if (token) this.look(Number(token.dataset.position));
    });
  }

  // Shows a request; `place` counts the answer's tokens, null for the last of them.
  async open(detail, place) {
    if (!detail) return;
    try {
      if (this.request?.id !== detail.request || this.request.made !== detail.first + detail.count) {
        const found = await (await ask(`/lens?request=${encodeURIComponent(detail.request)}`)).json();
        this.request = { id: detail.request, made: detail.first + detail.count, prompt: found.prompt_tokens };
        this.tokens = found.tokens;
      }
      const last = this.tokens.length - 1;
      await this.look(place === null ? last : Math.min(this.request.prompt + place, last), true);
    } catch (error) {
      this.onError(error.message);
    }
  }

  async look(position, moves = false) {
    this.position = position;
    byId("lens-body").hidden = false;
    byId("lens-note").hidden = true;
    byId("figures").setAttribute("aria-busy", "true");
    this.drawStrip();
    const at = this.wrote && position > 0 ? position - 1 : position;
    try {
      const query = `/lens?request=${encodeURIComponent(this.request.id)}&position=${at}`;
      const figures = await (await ask(query)).json();
      if (this.position !== position) return; // another token was asked for meanwhile
      this.draw(figures, position);
      if (moves && window.matchMedia("(max-width: 78rem)").matches) byId("lens").scrollIntoView();
    } catch (error) {
      this.onError(error.message);
    } finally {
      byId("figures").setAttribute("aria-busy", "false");
    }
  }

  drawStrip() {
    const first = Math.max(0, Math.min(this.position - SHOWN / 2, this.tokens.length - SHOWN));
    const strip = byId("strip");
    const keeps = document.activeElement?.closest("#strip") !== null;
    if (this.drawn?.tokens !== this.tokens || this.drawn.first !== first) {
      const count = Math.min(SHOWN, this.tokens.length - first);
      const after = this.tokens.length - first - count;
      strip.replaceChildren(
        ...(first > 0 ? [el("span", { class: "more" }, `${first} tokens before`)] : []),
        ...Array.from({ length: count }, (_, i) => this.button(first + i)),
        ...(after > 0 ? [el("span", { class: "more" }, `${after} tokens behind`)] : []));
      this.drawn = { tokens: this.tokens, first };
      this.drawLegend();
    }
    strip.querySelector("[aria-current]")?.removeAttribute("aria-current");
    const current = strip.querySelector(`[data-position="${this.position}"]`);
    current.setAttribute("aria-current", "true");
    roving.stop([...strip.querySelectorAll(".token")], current);
    if (keeps) current.focus();
    centre(strip, current);
  }

  button(position) {
    const token = this.tokens[position];
    return tokenButton({
      class: token.origin,
      "data-position": position,
      tabindex: "-1",
      title: `${position}: ${ORIGINS[token.origin]}, id ${token.id}`,
    }, visible(token.text));
  }

  drawLegend() {
    const counts = Object.keys(ORIGINS).map((origin) =>
      [origin, this.tokens.filter((token) => token.origin === origin).length]);
    byId("legend").replaceChildren(...counts.map(([origin, count]) =>
      el("span", {}, el("span", { class: `token ${origin}` }, "abc"), ` ${ORIGINS[origin]} `, el("b", {}, String(count)))));
  }

  draw(figures, position) {
    const token = this.tokens[position];
    const text = (id) => figures.texts[id] ?? String(id);
    byId("token").replaceChildren(
      el("h3", {}, el("span", { class: `token ${token.origin}` }, visible(token.text)),
        el("small", {}, ` token ${position} of ${this.tokens.length}, id ${token.id}, ${ORIGINS[token.origin]}`)),
      this.passSwitch(position));
    const parts = [alternatives(figures, text), layers(figures, (at) => this.tokens[at]?.text ?? "")];
    byId("figures").replaceChildren(...parts);
  }

  passSwitch(position) {
    const choice = (wrote, label) => el("label", { class: "check" },
      el("input", { type: "radio", name: "pass", checked: this.wrote === wrote, onchange: () => {
        this.wrote = wrote;
        this.look(position).then(() => byId("token").querySelector("input:checked")?.focus());
      } }), ` ${label}`);
    return el("div", { class: "row", role: "radiogroup", "aria-label": "Which pass" },
      choice(false, "the pass that read it"), choice(true, "the pass that wrote it"));
  }
}

// Scrolls inside the strip, and not the page.
function centre(strip, token) {
  if (token) strip.scrollTop = token.offsetTop - strip.offsetTop - strip.clientHeight / 2;
}
