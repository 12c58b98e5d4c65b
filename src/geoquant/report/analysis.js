// The map and the profile of one site. Without JavaScript the tables below the map tell the same.
const data = JSON.parse(document.getElementById("data").textContent);
const pick = document.getElementById("score");
const cells = [...document.querySelectorAll("button.cell")];
const named = (name) => data.scores.find((score) => score.name === name);
const brief = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5
  ? String(Number(value.toPrecision(3))) : value.toExponential(2);
let chosen = null;  // until somebody picks: the site with the most

const over = document.getElementById("over");

// What the map shows of each site: the score, or for sums that grow with a layer the score over its null.
function shown(name) {
  const relative = named(name).combine === "sum" && over.checked;
  return data.sites.map((site) => {
    const one = site.scores[name], value = one?.value ?? null;
    return !relative || value === null ? value : one.null > 0 ? value / one.null : null;
  });
}

// Ranks, not values: one massive site would leave all others in one colour.
function colour() {
  const name = pick.value;
  const values = shown(name);
  const ordered = values.filter((value) => value !== null).sort((a, b) => a - b);
  for (const cell of cells) {
    const value = values[cell.dataset.site];
    const rank = value === null ? 0 : ordered.indexOf(value) / Math.max(1, ordered.length - 1);
    cell.style.setProperty("--rank", rank.toFixed(3));
    cell.classList.toggle("empty", value === null);
    cell.title = `${data.sites[cell.dataset.site].name}: ${brief(value)}`;
  }
  const score = named(name);
  document.getElementById("unit").textContent = `${score.title}${score.unit ? `, in ${score.unit}` : ""}.` +
    (score.combine === "sum" ? " A sum over the layer: large layers have more of it, and so has their null." : "");
  document.getElementById("over-label").hidden = score.combine !== "sum";
  const what = score.combine === "sum" && over.checked ? " times its null" : "";
  const known = ordered.length;
  document.getElementById("scale").textContent = known ? `${brief(ordered[0])} to ${brief(ordered[known - 1])}${what}, by rank, darker is higher` : "not measured";
  show(chosen ?? Math.max(0, values.indexOf(ordered[known - 1])));
}

// Of a site's geometry, beside its null; nothing where it was not asked for.
function classed(found) {
  const told = [];
  if (found?.columns) {
    const of = ["spike", "island", "core"].map((name) =>
      `${found.columns.counts[name]} ${name} (null ${brief(found.columns.null[name])})`);
    told.push(`Of ${found.columns.of} columns: ${of.join(", ")}.`);
  }
  if (found?.distortion && found.distortion.ratio !== null) {
    const one = found.distortion;
    told.push(`Rounding bends rows by ${brief(one.md)} in the metric of the inputs, noise as long by ${brief(one.null)}` +
      ` (ratio ${brief(one.ratio)}, standard error of its logarithm ${brief(one.error)}).`);
  }
  return told.join(" ");
}

function show(index) {
  const site = data.sites[index], name = pick.value, one = site.scores[name], score = named(name);
  for (const cell of cells) cell.setAttribute("aria-pressed", String(Number(cell.dataset.site) === index));
  document.getElementById("site").textContent = site.name;
  const words = document.getElementById("words"), curve = document.getElementById("curve");
  curve.replaceChildren();
  document.getElementById("classes").textContent = classed(site.classes);
  if (!one || one.value === null) { words.textContent = "This score was not measured here."; return; }
  const all = shown(name), own = all[index] ?? -Infinity;
  const rank = 1 + all.filter((other) => other !== null && other > own).length;
  const among = all.filter((other) => other !== null).length;
  let text = `${score.title}: ${brief(one.value)}`;
  if (one.se !== null) text += ` ± ${brief(one.se)}`;
  text += `, number ${rank} of ${among}; where nothing is to be found it would be ${brief(one.null)}`;
  if (one.null_sd) text += ` ± ${brief(one.null_sd)}`;
  text += one.null > 0 && score.combine === "sum" ? ` (${brief(one.value / one.null)} times that).` : ".";
  if (one.beyond !== null && one.beyond !== undefined) {
    text += ` ${one.beyond} of ${site.shape[one.axis === "columns" ? 1 : 0]} ${one.axis} lie beyond 99% of the null's.`;
  }
  if (site.name.includes("experts.") && site.tokens) text += ` ${site.tokens.public} tokens of public text reach it.`;
  if (one.largest && one.largest.length) {
    text += ` The ${one.axis} with the most: ${one.largest.join(", ")}`;
    text += one.share === null ? "." : `; the first holds ${(100 * one.share).toPrecision(3)}% of the whole.`;
  }
  words.textContent = text;
  if (!one.profile || !one.profile.length) return;
  const size = site.shape[one.axis === "columns" ? 1 : 0], width = 560, height = 190, left = 64, bottom = 28, top = 8;
  const values = one.profile.map((value) => value ?? 0), positive = values.every((value) => value > 0);
  const at = positive ? values.map(Math.log10) : values, low = Math.min(...at), high = Math.max(...at);
  const x = (i) => left + (width - left - 8) * i / Math.max(1, at.length - 1);
  const y = (v) => top + (height - top - bottom) * (1 - (v - low) / ((high - low) || 1));
  const draw = (kind, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    curve.append(element);
  };
  draw("line", {x1: left, x2: width - 8, y1: height - bottom, y2: height - bottom, class: "axis"});
  draw("polyline", {points: at.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" "), class: "profile"});
  draw("text", {x: left - 6, y: top + 8, "text-anchor": "end"}, brief(Math.max(...values)));
  draw("text", {x: left - 6, y: height - bottom, "text-anchor": "end"}, brief(Math.min(...values)));
  draw("text", {x: left, y: height - 8}, "1");
  draw("text", {x: width - 8, y: height - 8, "text-anchor": "end"}, `${one.axis} of ${size}, largest first${positive ? ", logarithmic" : ""}`);
}

for (const cell of cells) cell.addEventListener("click", () => { chosen = Number(cell.dataset.site); show(chosen); });
pick.addEventListener("change", colour);
over.addEventListener("change", colour);
document.getElementById("explore").hidden = false;
colour();
