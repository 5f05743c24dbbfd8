// The panel: a map of experts over the picture, their legend, and the load of every block.

// Okabe and Ito's colours, which people tell apart whatever they see; further experts get other hues.
const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#4D4D4D"];
const ORDINALS = ["First choice", "Second choice", "Third choice", "Fourth choice"];

export function colour(expert) {
  if (expert < PALETTE.length) return PALETTE[expert];
  return `hsl(${(expert * 137.5) % 360} 65% ${40 + (expert % 3) * 12}%)`;
}

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(0)} %`;

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

class Grid {
  constructor(maps, title) {
    Object.assign(this, maps, { title });
    this.experts = bytes(maps.experts);
    this.weights = bytes(maps.weights);
  }

  at(layer, choice, row, column) {
    const index = ((layer * this.choices + choice) * this.height + row) * this.width + column;
    return [this.experts[index], this.weights[index] / 255];
  }

  // Share of the patches whose first, second, ... choice an expert is, in one block.
  shares(layer, choice) {
    const counts = new Array(this.num_experts).fill(0);
    const size = this.height * this.width;
    const begin = (layer * this.choices + choice) * size;
    for (let index = begin; index < begin + size; index++) counts[this.experts[index]]++;
    return counts.map((count) => count / size);
  }
}

export class ExpertPanel {
  constructor() {
    this.grids = [];
    this.turn = 0;
    this.canvas = $("overlay");
    $("layer").addEventListener("input", () => this.set({ layer: Number($("layer").value) - 1 }));
    $("strength").addEventListener("input", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  say(text) {
    $("panel-state").textContent = text;
    $("panel-state").hidden = !text;
  }

  clear() {
    this.turn++;
    this.grids = [];
    $("maps").hidden = true;
    this.say("No picture yet.");
  }

  async show(routing) {
    const turn = ++this.turn;
    $("maps").hidden = true;
    this.say("Looking at the picture …");
    let data, image;
    try {
      data = await routing;
      image = new Image();
      image.src = data.picture;
      await image.decode();
    } catch (error) {
      if (turn === this.turn) this.say(error.message);
      return;
    }
    if (turn !== this.turn) return;
    this.image = image;
    this.grids = data.vision.map((maps) => new Grid(maps, maps.scale === 1 ? "Whole picture" : `${maps.scale} × ${maps.scale} tiles`));
    if (data.connector) this.grids.push(new Grid(data.connector, "Connector"));
    if (!this.grids.length) {
      this.say("The encoder and the connector of this model are dense: there are no experts to show.");
      return;
    }
    this.say(data.vision.length ? "" : "The encoder of this model is dense; these are the experts of its connector.");
    $("maps").hidden = false;
    const same = this.state && this.grids[this.state.source];
    this.state = same ? this.state : { source: 0, layer: Math.floor(this.grids[0].layers / 2), choice: 0, only: null };
    this.set({});
  }

  set(change) {
    this.state = { ...this.state, ...change };
    const grid = this.grids[this.state.source];
    this.state.layer = Math.min(this.state.layer, grid.layers - 1);
    this.state.choice = Math.min(this.state.choice, grid.choices - 1);
    if (this.state.only !== null && this.state.only >= grid.num_experts) this.state.only = null;
    this.controls(grid);
    this.legend(grid);
    this.load(grid);
    this.draw();
  }

  controls(grid) {
    const options = (root, titles, chosen, choose) =>
      root.replaceChildren(
        ...titles.map((title, index) => {
          const button = element("button", { type: "button", textContent: title, onclick: () => choose(index) });
          button.setAttribute("role", "radio");
          button.setAttribute("aria-checked", String(index === chosen));
          return button;
        }),
      );
    options($("sources"), this.grids.map((each) => each.title), this.state.source, (source) => this.set({ source }));
    options($("choices"), ORDINALS.slice(0, grid.choices), this.state.choice, (choice) => this.set({ choice }));
    $("layer").max = grid.layers;
    $("layer").value = this.state.layer + 1;
    $("layer").disabled = grid.layers === 1;
    $("layer-value").textContent = `${this.state.layer + 1} of ${grid.layers}`;
  }

  legend(grid) {
    const { layer, choice, only } = this.state;
    $("legend").replaceChildren(
      ...grid.shares(layer, choice).map((share, expert) => {
        const chip = element("span", { className: "chip" });
        chip.style.background = colour(expert);
        const button = element("button", { type: "button", title: "Show this expert alone" }, chip, `Expert ${expert + 1}: ${percent(share)}`);
        button.setAttribute("aria-pressed", String(only === expert));
        button.onclick = () => this.set({ only: only === expert ? null : expert });
        return button;
      }),
    );
  }

  load(grid) {
    $("load").replaceChildren(
      ...grid.load.map((shares, layer) => {
        const bar = element("span", { className: "bar" });
        shares.forEach((share, expert) => {
          const part = element("span", { title: `Expert ${expert + 1}: ${percent(share)}` });
          part.style.background = colour(expert);
          part.style.flexGrow = share;
          bar.append(part);
        });
        const button = element("button", { type: "button", onclick: () => this.set({ layer }) }, String(layer + 1), bar);
        const text = shares.map((share, expert) => `expert ${expert + 1} ${percent(share)}`).join(", ");
        button.setAttribute("aria-label", `Block ${layer + 1}: ${text}`);
        button.setAttribute("aria-current", String(layer === this.state.layer));
        return button;
      }),
    );
  }

  draw() {
    const grid = this.grids[this.state?.source];
    if (!grid || !this.canvas.clientWidth) return;
    const size = Math.round(this.canvas.clientWidth * window.devicePixelRatio);
    if (this.canvas.width !== size) this.canvas.width = this.canvas.height = size;
    const context = this.canvas.getContext("2d");
    const { layer, choice, only } = this.state;
    const strength = Number($("strength").value) / 100;
    context.globalAlpha = 1;
    const pale = Math.min(1, 2 * strength); // grey and light, so that colours are those of experts
    context.filter = `grayscale(${pale}) contrast(${1 - 0.3 * pale}) brightness(${1 + 0.3 * pale})`;
    context.drawImage(this.image, 0, 0, size, size);
    context.filter = "none";
    const edge = (index, count) => Math.round((index * size) / count);
    for (let row = 0; row < grid.height; row++) {
      for (let column = 0; column < grid.width; column++) {
        const [expert, weight] = grid.at(layer, choice, row, column);
        if (only !== null && expert !== only) continue;
        const [x, y] = [edge(column, grid.width), edge(row, grid.height)];
        // a choice of little weight is paler
        context.globalAlpha = strength * (0.4 + 0.6 * weight);
        context.fillStyle = colour(expert);
        context.fillRect(x, y, edge(column + 1, grid.width) - x, edge(row + 1, grid.height) - y);
      }
    }
    context.globalAlpha = 1;
    if (this.pointed) {
      const { row, column } = this.pointed;
      const [width, height] = [size / grid.width, size / grid.height];
      context.lineWidth = Math.max(2, size / 250);
      context.strokeStyle = "#ffffff";
      context.strokeRect(column * width, row * height, width, height);
    }
  }

  point(event) {
    const grid = this.grids[this.state?.source];
    if (!grid) return;
    this.pointed = null;
    let text = "Point at a patch to see its experts.";
    if (event) {
      const box = this.canvas.getBoundingClientRect();
      const place = (at, begin, length, count) => Math.min(count - 1, Math.max(0, Math.floor(((at - begin) / length) * count)));
      const row = place(event.clientY, box.top, box.height, grid.height);
      const column = place(event.clientX, box.left, box.width, grid.width);
      this.pointed = { row, column };
      const chosen = [];
      for (let choice = 0; choice < grid.choices; choice++) {
        const [expert, weight] = grid.at(this.state.layer, choice, row, column);
        chosen.push(`expert ${expert + 1} (${percent(weight)})`);
      }
      text = `Patch in row ${row + 1}, column ${column + 1}: ${chosen.join(", then ")}`;
    }
    $("patch").textContent = text;
    this.draw();
  }
}
