// The conversation: pictures and questions in, answers piece by piece out.

import { answer, describeModel, routingOf, setKey } from "./api.js";
import { ExpertPanel } from "./maps.js";

const $ = (id) => document.getElementById(id);
const panel = new ExpertPanel();
const routings = new Map(); // of pictures, by their data URL
let model = null;
let messages = []; // as the server takes them
let attached = []; // data URLs of pictures for the next question
let running = null; // the AbortController of the answer that is being made

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function learnAboutTheModel() {
  try {
    model = await describeModel();
  } catch (error) {
    $("model").textContent = error.message;
    return;
  }
  const { vision, connector } = model;
  const experts = vision.experts > 1 ? `${vision.layers} blocks of ${vision.experts} experts, ${vision.choices} per patch` : "dense encoder";
  const joined = connector.experts > 1 ? `connector of ${connector.experts} experts` : "dense connector";
  $("model").textContent = `${model.id}: ${experts}, ${joined}, scales ${model.scales.join(" and ")}, ${model.language_model}`;
  $("model").title = $("model").textContent;
  $("max-tokens").max = model.limits.tokens;
}

// Pictures

function fail(text) {
  const box = element("div", { className: "error", textContent: text });
  box.setAttribute("role", "alert");
  $("welcome").hidden = true;
  $("messages").append(box);
  box.scrollIntoView({ block: "end" });
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function attach(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      fail(`${file.name || "This"} is no picture.`);
      continue;
    }
    if (model && file.size > model.limits.image_bytes) {
      fail(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; the server takes up to ${model.limits.image_bytes / 2 ** 20}.`);
      continue;
    }
    if (model && attached.length >= model.limits.images) {
      fail(`The server takes up to ${model.limits.images} pictures at once.`);
      break;
    }
    const url = await read(file);
    attached.push(url);
    look(url);
  }
  showAttached();
  $("question").focus();
}

function routing(url) {
  if (!routings.has(url)) {
    const made = routingOf(url);
    routings.set(url, made);
    made.catch(() => routings.delete(url)); // it may work later
  }
  return routings.get(url);
}

function look(url) {
  panel.show(routing(url));
  for (const thumb of document.querySelectorAll(".thumb")) thumb.classList.toggle("shown", thumb.dataset.url === url);
}

function thumbnail(url) {
  const image = element("img", { src: url, alt: "Picture" });
  const button = element("button", { type: "button", className: "thumb", title: "Show its experts", onclick: () => look(url) }, image);
  button.dataset.url = url;
  return button;
}

function showAttached() {
  $("attached").replaceChildren(
    ...attached.map((url, index) => {
      const remove = element("button", { type: "button", className: "remove", textContent: "×", title: "Remove" });
      remove.setAttribute("aria-label", "Remove this picture");
      remove.onclick = () => {
        attached.splice(index, 1);
        showAttached();
      };
      return element("span", {}, thumbnail(url), remove);
    }),
  );
}

// Questions and answers

function showMessage(role, text, pictures = []) {
  $("welcome").hidden = true;
  const body = element("div", { className: "text", textContent: text });
  const box = element("div", { className: `message ${role}` });
  if (pictures.length) box.append(element("div", { className: "thumbs" }, ...pictures.map(thumbnail)));
  box.append(body);
  $("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

// Appends pieces to an element, at most once in a frame: a fast model says more than a screen can show.
function writer(body) {
  let pending = "";
  const flush = () => {
    const list = $("messages");
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    body.append(pending);
    pending = "";
    if (atEnd) list.scrollTop = list.scrollHeight;
  };
  return (piece) => {
    if (!pending) requestAnimationFrame(flush);
    pending += piece;
  };
}

async function ask(text) {
  const pictures = attached;
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  const question = { role: "user", content: [...parts, { type: "text", text }] };
  const asked = showMessage("user", text, pictures);
  const box = showMessage("assistant", "");
  const write = writer(box.querySelector(".text"));
  box.classList.add("busy");
  attached = [];
  showAttached();
  const controller = (running = new AbortController());
  setBusy(true);
  const options = { temperature: Number($("temperature").value), max_tokens: Number($("max-tokens").value) || undefined };
  let said = "";
  let note = "";
  try {
    for await (const event of answer({ messages: [...messages, question], ...options }, controller.signal)) {
      if (event.piece) {
        said += event.piece;
        write(event.piece);
      }
      if (event.reason === "length") note = "The answer reached its limit.";
    }
  } catch (error) {
    if (error.name === "AbortError") note = "Stopped.";
    else if (running === controller) {
      // as if it had not been asked, so that it can be asked again
      asked.remove();
      box.remove();
      attached = pictures;
      showAttached();
      $("question").value = text;
      fail(error.message);
      running = null;
      setBusy(false);
      return;
    }
  }
  await new Promise(requestAnimationFrame); // the last pieces are written
  box.classList.remove("busy");
  if (note) box.append(element("div", { className: "note", textContent: note }));
  if (running !== controller) return; // a new conversation has begun
  running = null;
  setBusy(false);
  if (said || note !== "Stopped.") messages.push(question, { role: "assistant", content: said });
}

function beginAnew() {
  running?.abort();
  running = null;
  messages = [];
  attached = [];
  routings.clear();
  showAttached();
  setBusy(false);
  for (const box of document.querySelectorAll("#messages > :not(#welcome)")) box.remove();
  $("welcome").hidden = false;
  panel.clear();
}

// What people do

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || running) return;
  $("question").value = "";
  grow();
  ask(text);
});
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", beginAnew);
for (const button of document.querySelectorAll(".choose")) button.addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  attach([...$("file").files]);
  $("file").value = "";
});
document.querySelector(".sheet").addEventListener("submit", (event) => event.preventDefault());
$("temperature").addEventListener("input", () => ($("temperature-value").textContent = $("temperature").value));
$("key").value = sessionStorage.getItem("cumo-key") || "";
$("key").addEventListener("change", () => {
  setKey($("key").value);
  learnAboutTheModel();
});

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files || [])];
  if (files.length) attach(files);
});
let depth = 0; // entering a child comes before leaving its parent
document.addEventListener("dragenter", (event) => {
  event.preventDefault();
  depth++;
  $("drop").hidden = false;
});
document.addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  $("drop").hidden = depth === 0;
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  attach([...event.dataTransfer.files]);
});

learnAboutTheModel();
