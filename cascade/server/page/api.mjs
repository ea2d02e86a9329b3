// The server: calls, and the news that it sends.

const client = sessionStorage.getItem("client") ?? `tab-${Math.random().toString(36).slice(2)}`;
sessionStorage.setItem("client", client); // each tab gets its turn in the queue

// The answer as JSON. Throws an Error with a line for the user and, where the page acts on it, a `code`.
export async function call(method, path, body = undefined) {
  const form = body instanceof FormData;
  const headers = { "x-cascade-client": client, ...(body && !form ? { "content-type": "application/json" } : {}) };
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: form ? body : body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is `cascade studio` still running?");
  }
  if (answer.status === 204) return null;
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(said.error ?? `The server answered ${answer.status}.`), { code: said.code });
  return said;
}

// handlers: {kind: data => ...}; `lost` and `found` say whether the server is there.
export function follow(handlers) {
  const source = new EventSource("/api/events");
  for (const [kind, handle] of Object.entries(handlers)) {
    source.addEventListener(kind, event => handle(JSON.parse(event.data)));
  }
  source.onerror = () => handlers.lost?.();
  source.onopen = () => handlers.found?.();
  return source;
}

export const fileOf = (picture, download = false) =>
  `/api/pictures/${picture.id}/file${download ? "?download=true" : ""}`;
export const thumbnailOf = picture => `/api/pictures/${picture.id}/thumbnail`;
export const askedOf = picture => call("GET", `/api/pictures/${picture.id}/asked`);
export const star = picture =>
  call("PUT", `/api/pictures/${picture.id}/star`, { starred: !picture.starred });
export const remove = picture => call("DELETE", `/api/pictures/${picture.id}`);
export const restore = picture => call("POST", `/api/pictures/${picture.id}/restore`);
export const ask = asked => call("POST", "/api/jobs", asked);
export const askMatrix = (asked, matrix) => call("POST", "/api/matrix", { asked, matrix });
export const stop = job => call("DELETE", `/api/jobs/${job.id}`);

export const sourceOf = name => `/api/uploads/${name}`;

// Settings of a picture that a cascade drew.
export const read = file => sent("/api/read", file);

// A picture or a mask for `image` and `mask` of a job: {name, width, height}.
export const upload = file => sent("/api/uploads", file);

function sent(path, file) {
  const form = new FormData();
  form.append("picture", file, "picture");
  return call("POST", path, form);
}
