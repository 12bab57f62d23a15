// Light, dark, or as the system has it; kept for the next visit.

import { byId } from "./dom.js";

const KEY = "v4jax-theme";
const NEXT = { auto: "light", light: "dark", dark: "auto" };

function show(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = byId("theme");
  button.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[theme];
  button.setAttribute("aria-label", `Theme: ${theme}. Press for ${NEXT[theme]}.`);
}

export function begin() {
  let theme = localStorage.getItem(KEY);
  if (!(theme in NEXT)) theme = "auto";
  show(theme);
  byId("theme").addEventListener("click", () => {
    theme = NEXT[theme];
    localStorage.setItem(KEY, theme);
    show(theme);
  });
}
