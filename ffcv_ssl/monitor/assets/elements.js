// Small helpers. Texts of users' files only ever become text nodes or attributes, never HTML.

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "line"].includes(tag) ? "http://www.w3.org/2000/svg" : null;
  const node = svg ? document.createElementNS(svg, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const byId = (id) => document.getElementById(id);

// Replace a node's children, unless they would be the same: focus and selected text stay.
const drawn = new WeakMap();
function redraw(node, signature, make) {
  if (drawn.get(node) === signature) return false;
  drawn.set(node, signature);
  node.replaceChildren(...[make()].flat(Infinity).filter(Boolean));
  return true;
}

// ---- Numbers in words

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function short(value, digits = 4) {
  if (!isNumber(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e7 || (size < 1e-4 && size > 0)) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
}

function percent(value) {
  return isNumber(value) ? `${(100 * value).toFixed(2)} %` : "–";
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (hours < 1) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function since(unixSeconds) {
  if (!isNumber(unixSeconds)) return "–";
  const date = new Date(1000 * unixSeconds), pad = (n) => String(n).padStart(2, "0");
  const day = `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())}`;
  return `${day} ${pad(date.getHours())}:${pad(date.getMinutes())}`;
}

const SHARE = /(?:^|\/)(?:top\d+|map)$|_wait$/;
function amount(key, value) {
  return SHARE.test(key) ? percent(value) : short(value, 6);
}

// Plotly reads a little HTML in texts; names stay as they are.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}
