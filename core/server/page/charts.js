// Sparklines (SVG) and the map of the KV blocks (canvas).

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 120, HEIGHT = 34;

function shape(parent, name, className, attributes) {
  const made = document.createElementNS(SVG, name);
  made.setAttribute("class", className);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
}

/** Draw `values` (null: no value) into an svg, oldest first, scaled to the largest. */
export function sparkline(svg, values) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren();
  const top = Math.max(...values.map((value) => value ?? 0)) || 1;
  const x = (index) => ((index * WIDTH) / Math.max(1, values.length - 1)).toFixed(2);
  const y = (value) => (HEIGHT - 1 - (value / top) * (HEIGHT - 4)).toFixed(2);
  shape(svg, "path", "base", { d: `M0 ${HEIGHT - 0.5}H${WIDTH}` });
  let run = [];
  const flush = () => {
    if (run.length === 1) shape(svg, "path", "point", { d: `M${run[0][0]} ${run[0][1]}h0.01` });
    if (run.length > 1) {
      const line = run.map(([px, py]) => `${px} ${py}`).join("L");
      shape(svg, "path", "area", { d: `M${run[0][0]} ${HEIGHT}L${line}L${run.at(-1)[0]} ${HEIGHT}Z` });
      shape(svg, "path", "line", { d: `M${line}` });
    }
    run = [];
  };
  values.forEach((value, index) => {
    if (value === null) flush();
    else run.push([x(index), y(value)]);
  });
  flush();
}

const STATES = ["free", "cached", "active", "shared"];
const LEAST = 512; // blocks shown at least, so that a few used ones among thousands can be seen

/** Draw runs of [state, length] as cells in order of block id. Returns how many blocks, from the first, are shown. */
export function blockMap(canvas, runs) {
  const states = [];
  let used = 0;
  for (const [state, length] of runs) {
    for (let i = 0; i < length; i++) states.push(state);
    if (state) used = states.length;
  }
  const shown = Math.min(states.length, Math.max(LEAST, 2 ** Math.ceil(Math.log2(used + 1))));
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width || !shown) return shown;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const colours = STATES.map((name) => style.getPropertyValue(`--${name}`));
  const { columns, rows } = grid(shown, width, height);
  const cellWidth = width / columns, cellHeight = height / rows;
  const gap = cellWidth > 5 ? 1.5 : cellWidth > 3 ? 1 : 0;
  for (let i = 0; i < shown; i++) {
    context.fillStyle = colours[states[i]] ?? colours[0];
    const left = (i % columns) * cellWidth, top = Math.floor(i / columns) * cellHeight;
    context.beginPath();
    context.roundRect(left, top, cellWidth - gap, cellHeight - gap, gap ? 1.5 : 0);
    context.fill();
  }
  return shown;
}

function grid(cells, width, height) {
  const columns = Math.max(1, Math.round(Math.sqrt((cells * width) / height)));
  return { columns, rows: Math.ceil(cells / columns) };
}
