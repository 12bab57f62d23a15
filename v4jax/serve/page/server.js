// Requests to this server, with the API key if there is one.

const KEY = "v4jax-key";

export const savedKey = () => sessionStorage.getItem(KEY) || "";

export function saveKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, { body, signal, detail } = {}) {
  const headers = {};
  if (savedKey()) headers.Authorization = `Bearer ${savedKey()}`;
  if (detail) headers["X-V4jax-Detail"] = "1";
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await fetch(path, options);
  if (!response.ok) throw new Refused(response.status, await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}
