// Wires the page together.

import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { Lens } from "./lens.js";
import * as load from "./load.js";
import { ask, savedKey, saveKey } from "./server.js";
import * as theme from "./theme.js";

function alertOf(message) {
  byId("alert").textContent = message;
  byId("alert").hidden = !message;
}

function keyForm(server) {
  byId("key-form").hidden = !server.keys;
  byId("key").value = savedKey();
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    saveKey(byId("key").value.trim());
    alertOf("");
    byId("prompt").focus();
  });
}

function composer(server, chat) {
  const prompt = byId("prompt");
  const send = (event) => {
    event?.preventDefault();
    const text = prompt.value;
    if (!text.trim() || chat.busy) return;
    alertOf("");
    prompt.value = "";
    chat.send(text);
  };
  byId("composer").addEventListener("submit", send);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chat.busy) {
      event.preventDefault();
      chat.stop();
      prompt.focus();
    }
  });
  byId("stop").addEventListener("click", () => {
    chat.stop();
    prompt.focus();
  });
  byId("clear").addEventListener("click", () => {
    chat.clear();
    prompt.focus();
  });
  if (!server.chat) {
    byId("prompt-label").textContent = "Text to continue: this checkpoint has no chat tokens";
    byId("send").textContent = "Continue";
    byId("thinking-row").hidden = byId("more").hidden = true;
  }
}

async function begin() {
  theme.begin();
  try {
    const server = await (await ask("/page/server.json")).json();
    byId("model").textContent = server.model;
    document.title = `${server.model} · v4jax`;
    const lens = new Lens(server, { onError: alertOf });
    const chat = new Chat(server, { onToken: (answer, place) => lens.open(answer.request, place), onError: alertOf });
    keyForm(server);
    composer(server, chat);
    load.begin(server);
    document.body.dataset.ready = "";
    byId("prompt").focus();
  } catch (error) {
    alertOf(`The server does not answer: ${error.message}`);
  }
}

begin();
