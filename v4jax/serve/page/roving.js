// A row of tokens is one stop of the Tab key; arrow keys move inside it.

export function begin(container, selector) {
  const all = () => [...container.querySelectorAll(selector)];
  container.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && event.target.matches(selector)) {
      event.preventDefault();
      event.target.click();
      return;
    }
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    const items = all();
    const at = items.indexOf(document.activeElement);
    if (step === undefined || at < 0) return;
    event.preventDefault();
    go(items, Math.min(Math.max(at + step, 0), items.length - 1));
  });
  container.addEventListener("focusin", (event) => {
    const items = all();
    if (items.includes(event.target)) stop(items, event.target);
  });
}

function go(items, at) {
  stop(items, items[at]);
  items[at].focus();
}

// Only this one of them is reached with Tab.
export function stop(items, chosen) {
  for (const item of items) item.tabIndex = item === chosen ? 0 : -1;
}
