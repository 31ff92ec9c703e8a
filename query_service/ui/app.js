// The page: search by picture, and watch pictures arrive. Talks to this service only, through the same API as everyone else.

const STATUS_EVERY_MS = 2000;
const FEED_EVERY_MS = 400; // how often arrivals are drawn: a big import must not drown the browser, nor the service in thumbnails
const FEED_LENGTH = 20;
const FEED_THUMBNAILS_A_DRAW = 8;
const RECONNECT_MS = 3000;

const $ = (id) => document.getElementById(id);
// -- the key, where this service asks for one --------------------------------------------------------------------------------
const KEY = "image-search-key"; // of this tab only: it is gone when the tab is closed

// fetch, with the key if there is one. An image's or an event stream's own address could not carry it.
async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) $("key-form").hidden = false;
  return response;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  location.reload();
});

const number = new Intl.NumberFormat("en");

// -- search ------------------------------------------------------------------------------------------------------------
let running = null; // the AbortController of the search under way
let last = browse; // how to ask the last question again, when a filter changes

const NOTHING_THERE = "Nothing here yet. Put pictures into the bucket, then drop one above to find others like it.";
const NOTHING_FOUND = "Nothing found. Widen the filters, or put more pictures into the bucket.";

function parameters(path) {
  const chosen = new URLSearchParams({ limit: $("limit").value });
  if ($("prefix").value) chosen.set("prefix", $("prefix").value);
  if (path === "/v1/images") chosen.set("state", "indexed");
  else if ($("min-score").value) chosen.set("min_score", $("min-score").value);
  return chosen;
}

async function ask(path, options, show) {
  running?.abort();
  const mine = (running = new AbortController());
  $("hits").classList.add("waiting");
  $("results-note").textContent = "Looking…";
  try {
    const since = performance.now();
    const response = await call(`${path}?${parameters(path)}`, { ...options, signal: mine.signal });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    say(null);
    show(answer, performance.now() - since);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("results-note").textContent = "";
    say(error instanceof TypeError ? "The service does not answer." : error.message);
  } finally {
    if (running === mine) $("hits").classList.remove("waiting");
  }
}

// What there is to start from, before anything was searched for.
function browse() {
  last = browse;
  return ask("/v1/images", {}, (page) => {
    draw("In the bucket", page.images, NOTHING_THERE);
    $("results-note").textContent = page.images.length ? "Select one to find others like it" : "";
  });
}

function searchBy(file) {
  const headers = { "Content-Type": "application/octet-stream" };
  last = () => ask("/v1/search", { method: "POST", body: file, headers }, showHits);
  if (location.hash) history.pushState(null, "", location.pathname);
  describe(file.name || "Pasted picture", "Drop, paste or");
  preview(file);
  return last();
}

function searchLike(id, key) {
  last = () => ask(`/v1/images/${id}/similar`, {}, showHits);
  describe(key ? `Like ${key}` : "Like a stored picture", "Drop, paste or");
  call(`/v1/images/${id}/content`)
    .then((response) => (response.ok ? response.blob() : Promise.reject(new Error("gone"))))
    .then(preview)
    .catch(() => preview(null));
  return last();
}

function showHits(answer, milliseconds) {
  draw("Results", answer.hits, NOTHING_FOUND);
  const count = answer.hits.length;
  $("results-note").textContent = `${number.format(count)} ${count === 1 ? "hit" : "hits"} in ${Math.round(milliseconds)} ms`;
}

function draw(title, images, nothing) {
  $("results-title").textContent = title;
  $("hits").replaceChildren(...images.map(card));
  $("hits-empty").hidden = images.length > 0;
  $("hits-empty").textContent = nothing;
}

function card(image) {
  const entry = $("hit-template").content.firstElementChild.cloneNode(true);
  const button = entry.querySelector(".hit-button");
  const score = entry.querySelector(".score");
  picture(entry.querySelector("img"), image.url);
  entry.querySelector(".key").textContent = image.key;
  entry.querySelector(".open").href = image.url;
  button.title = `${image.bucket}/${image.key}`;
  if (image.score === undefined) {
    score.remove();
    button.setAttribute("aria-label", `${image.key}. Search for pictures like it`);
  } else {
    score.textContent = image.score.toFixed(1);
    score.style.setProperty("--share", `${Math.max(0, Math.min(100, image.score))}%`);
    button.title += `\ndistance ${image.distance}`;
    button.setAttribute("aria-label", `${image.key}, score ${image.score.toFixed(1)}. Search for pictures like it`);
  }
  button.addEventListener("click", () => goTo(image.id, image.key));
  return entry;
}

function goTo(id, key) {
  history.pushState({ id, key }, "", `#like=${id}`);
  searchLike(id, key);
  window.scrollTo({ top: 0 });
}

function fromAddress() {
  const id = /^#like=([0-9a-f]{64})$/.exec(location.hash)?.[1];
  if (id) return searchLike(id, history.state?.key);
  describe("Drop a picture here", "or paste one, or");
  preview(null);
  return browse();
}

function say(problem) {
  $("problem").textContent = problem ?? "";
  $("problem").hidden = !problem;
}

function describe(title, hint) {
  $("drop-title").textContent = title;
  $("drop-hint").textContent = hint;
}

// Drawn rather than shown by an address of its own: the page's policy lets images come from this service only.
async function preview(blob) {
  const canvas = $("preview");
  canvas.hidden = true;
  if (!blob) return;
  try {
    const bitmap = await createImageBitmap(blob);
    const scale = Math.min(1, 480 / bitmap.width, 352 / bitmap.height);
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    canvas.hidden = false;
  } catch {
    // No picture that the browser can draw. The service says whether it is one for the search.
  }
}

function picture(image, url) {
  image.addEventListener("error", () => {
    image.closest(".frame").classList.add("missing");
    image.remove();
  });
  if (!sessionStorage.getItem(KEY)) {
    image.src = url;
    return;
  }
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  call(url)
    .then((response) => (response.ok ? response.blob() : Promise.reject(new Error("gone"))))
    .then((blob) => (image.src = URL.createObjectURL(blob)))
    .catch(() => image.dispatchEvent(new Event("error")));
}

$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) searchBy(file);
  $("file").value = ""; // so that choosing the same file again is a change
});

document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((entry) => entry.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  searchBy(file);
});

let depth = 0; // dragenter and dragleave also fire for every element within
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (carriesFiles(event)) $("curtain").hidden = ++depth === 0;
});
document.addEventListener("dragleave", (event) => {
  if (carriesFiles(event)) $("curtain").hidden = --depth <= 0;
});
document.addEventListener("dragover", (event) => {
  if (carriesFiles(event)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  depth = 0;
  $("curtain").hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) searchBy(file);
});

$("filters").addEventListener("submit", (event) => event.preventDefault());
$("filters").addEventListener("change", () => last());
window.addEventListener("popstate", fromAddress);

// -- arrivals ----------------------------------------------------------------------------------------------------------
const WORDS = { indexed: "can be found", updated: "updated", deleted: "deleted", failed: "failed", ignored: "ignored" };
let waiting = []; // arrivals not drawn yet, newest last
let arrived = 0;

function hear(data) {
  arrived += 1;
  waiting.push(JSON.parse(data));
  if (waiting.length > FEED_LENGTH) waiting.shift();
}

// What EventSource does, with a key: each block of lines up to an empty one, and the last id for when it comes back.
async function listenWithKey(lastId = "") {
  try {
    const headers = lastId ? { "Last-Event-ID": lastId } : {};
    const response = await call(`/v1/events?type=${Object.keys(WORDS)}`, { headers });
    if (!response.ok) lastId = "";
    else {
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
        const blocks = (text + piece.value).split("\n\n");
        text = blocks.pop();
        for (const lines of blocks.map((block) => block.split("\n"))) {
          const of = (name) => lines.filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2));
          lastId = of("id").at(-1) ?? lastId;
          if (of("data").length) hear(of("data").join("\n"));
        }
      }
    }
  } catch {
    // It comes back below.
  }
  setTimeout(() => listenWithKey(lastId), RECONNECT_MS);
}

function listen() {
  if (sessionStorage.getItem(KEY)) return listenWithKey();
  const source = new EventSource(`/v1/events?type=${Object.keys(WORDS)}`);
  source.onmessage = (message) => hear(message.data);
  source.onerror = () => {
    // It comes back by itself with its last id, unless the service refused that id: then start anew from now.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, RECONNECT_MS);
  };
}

function arrival(event) {
  const kind = event.type.split(".").pop();
  const { object_id: id, key, bucket, reason, message, timings_ms: timings } = event.data;
  const entry = $("feed-template").content.firstElementChild.cloneNode(true);
  const button = entry.querySelector("button");
  const findable = kind === "indexed" || kind === "updated";
  const took = timings?.since_put >= 50 ? ` after ${(timings.since_put / 1000).toFixed(1)} s` : "";
  entry.dataset.kind = kind;
  entry.querySelector(".key").textContent = key;
  entry.querySelector(".arrival-note").textContent = reason ? `${WORDS[kind]}: ${message ?? reason}` : WORDS[kind] + took;
  button.title = `${bucket}/${key}`;
  button.disabled = !findable;
  if (findable) {
    picture(entry.querySelector("img"), `/v1/images/${id}/content`);
    button.addEventListener("click", () => goTo(id, key));
  } else {
    entry.querySelector(".frame").classList.add("missing");
    entry.querySelector("img").remove();
  }
  return entry;
}

function drawFeed() {
  if (!waiting.length || document.hidden) return;
  const entries = waiting.slice(-FEED_THUMBNAILS_A_DRAW).reverse().map(arrival);
  waiting = [];
  for (const entry of entries) entry.classList.add("new");
  $("feed").prepend(...entries);
  while ($("feed").children.length > FEED_LENGTH) $("feed").lastElementChild.remove();
  $("feed-empty").hidden = true;
  $("feed-note").textContent = `${number.format(arrived)} since you opened this page`;
  if (last === browse && $("hits").children.length < Number($("limit").value)) browse();
}

// -- status ------------------------------------------------------------------------------------------------------------
function age(milliseconds) {
  if (milliseconds < 10_000) return `${(milliseconds / 1000).toFixed(1)} s`;
  if (milliseconds < 120_000) return `${Math.round(milliseconds / 1000)} s`;
  return `${number.format(Math.round(milliseconds / 60_000))} min`;
}

function describeStatus(status) {
  const { images, freshness, lag, model } = status;
  const pending = Object.values(lag).reduce((sum, topic) => sum + topic.pending, 0);
  const parts = [`${number.format(images.indexed)} ${images.indexed === 1 ? "picture" : "pictures"}`];
  if (pending) parts.push(`${number.format(pending)} on their way`);
  if (images.failed) parts.push(`${number.format(images.failed)} failed`);
  if (freshness.reason) parts.push(freshness.reason);
  else parts.push(`indexed through ${age(freshness.lag_ms)} ago`);
  parts.push(model.name);
  return [pending || freshness.reason ? "busy" : "good", parts.join(" · ")];
}

async function refreshStatus() {
  if (document.hidden) return;
  let state = "bad";
  let text = "The service does not answer";
  try {
    const response = await call("/v1/status");
    const answer = await response.json();
    [state, text] = response.ok ? describeStatus(answer) : ["bad", answer.error.message];
  } catch {
    // Said above.
  }
  $("status").dataset.state = state;
  $("status-text").textContent = text;
}

// One after the other, never two at once: a slow service must not be asked more, the slower it is.
async function keepStatus() {
  await refreshStatus();
  setTimeout(keepStatus, STATUS_EVERY_MS);
}

fromAddress();
listen();
keepStatus();
setInterval(drawFeed, FEED_EVERY_MS);
document.addEventListener("visibilitychange", refreshStatus);
