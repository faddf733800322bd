"""Style and script of the report's page. The script reads PLOTS (traces and layout of each figure) and MAPS (models
with their users' attention maps, or null), which the page defines before it.
"""

STYLE = """
:root { --back: #ffffff; --card: #f7f8fa; --text: #1c2128; --muted: #5d6672; --rule: #dde1e7; --accent: #2563b8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1c2026; --text: #e4e7eb; --muted: #9aa3af; --rule: #30363f; --accent: #7db0f2; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0; }
section > h3 { margin: 1.1rem 0 .3rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
figcaption { margin-top: .4rem; }
.muted, figcaption, summary { color: var(--muted); font-size: .88rem; }
.lead { margin-top: .9rem; font-weight: 600; color: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin-bottom: .5rem; }
th, td { padding: .4rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { color: var(--muted); font-weight: 500; border-bottom-width: 2px; }
tr > th:first-child { text-align: left; position: sticky; left: 0; background: var(--back); padding-left: 0; }
tbody th { font-weight: 500; }
td b { color: var(--accent); }
.facts { margin-top: .5rem; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: 8px; min-width: 0; }
.plot { height: 350px; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin: .6rem 0; }
.controls label { color: var(--muted); font-size: .88rem; }
select { font: inherit; color: var(--text); background: var(--back); border: 1px solid var(--rule); border-radius: 4px;
  padding: .15rem .3rem; max-width: 22rem; }
.maps { height: 520px; }
.warning td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.warning td:first-of-type { white-space: nowrap; }
"""

# Colours follow the page's, also when the reader switches between light and dark while it is open.
SCRIPT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--rule"), zerolinecolor: colour("--rule"), automargin: true };
  PLOTS.forEach(([traces, layout], index) => Plotly.react("plot" + index, traces, {
    showlegend: traces.length > 1, hovermode: "x unified", ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("--back"), bordercolor: colour("--rule") },
    font: { color: colour("--muted"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 8, r: 8, t: 12, b: 8 }, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" },
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, { displayModeBar: false, responsive: true }));
  if (MAPS) drawMaps(colour);
}

// One user's maps: the mean on the left, samples on the right, all on one colour scale.
const chosen = name => document.getElementById("map-" + name);
function options(name, texts) {
  const select = chosen(name), kept = Math.min(Math.max(select.selectedIndex, 0), texts.length - 1);
  select.replaceChildren(...texts.map((text, index) => new Option(text, index)));
  select.selectedIndex = kept;
}
function chooseMaps() {
  const model = MAPS[chosen("model").selectedIndex];
  options("user", model.users.map(user => "user " + user.user_id + ", " + user.item_ids.length + " items"));
  options("block", model.users[0].maps.map(map => "block " + map.block + ", head " + map.head));
}
function drawMaps(colour) {
  const model = MAPS[chosen("model").selectedIndex], user = model.users[chosen("user").selectedIndex];
  const map = user.maps[chosen("block").selectedIndex], names = user.titles || user.item_ids.map(id => "item " + id);
  const safe = names.map(name => String(name).replace(/&/g, "&amp;").replace(/</g, "&lt;"));
  const panels = [map.mean, ...map.samples], size = names.length, lifts = [];
  const traces = panels.map((weights, panel) => {
    const z = [], text = [];
    for (let row = 0; row < size; row++) {
      const cells = weights.slice(row * (row + 1) / 2, (row + 1) * (row + 2) / 2).map(w => w * model.unit);
      const lift = cells.map(w => w * (user.older + row + 1));
      if (row) lifts.push(...lift);
      z.push([...lift, ...Array(size - row - 1).fill(null)]);
      text.push(cells.map((w, column) => "after " + safe[row] + "<br>" + (row - column) + " back: " + safe[column]
        + "<br>weight " + w.toFixed(4) + ", " + lift[column].toFixed(2) + "× even"));
    }
    const axis = panel ? String(panel + 1) : "";
    return { type: "heatmap", z, text, coloraxis: "coloraxis", xaxis: "x" + axis, yaxis: "y" + axis,
      hovertemplate: "%{text}<extra></extra>", hoverongaps: false };
  });
  lifts.sort((a, b) => a - b);
  const top = Math.max(2, lifts[Math.floor(0.98 * (lifts.length - 1))] || 2);
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 28, b: 8 },
    hoverlabel: { bgcolor: colour("--back"), bordercolor: colour("--rule"), align: "left" },
    font: { color: colour("--muted"), size: 12, family: "system-ui, sans-serif" },
    coloraxis: { cmin: 0, cmax: top, colorbar: { title: { text: "× even" }, thickness: 12, outlinewidth: 0 },
      colorscale: [[0, colour("--card")], [0.5, colour("--accent")], [1, colour("--text")]] },
    annotations: [],
  };
  const wide = panels.length > 1 ? 0.48 : 1;
  const title = panel => panel ? "sample " + panel : panels.length > 1 ? "mean of the samples" : "the map";
  panels.forEach((_, panel) => {
    const column = (panel - 1) % 2, line = Math.floor((panel - 1) / 2), axis = panel ? String(panel + 1) : "";
    const x = panel ? [0.53 + 0.24 * column, 0.75 + 0.24 * column] : [0, wide];
    const y = panel ? [0.53 * (1 - line), 0.53 * (1 - line) + 0.46] : [0, 1];
    const bare = { showticklabels: false, showgrid: false, zeroline: false, ticks: "" };
    layout["xaxis" + axis] = { ...bare, domain: x, anchor: "y" + axis, constrain: "domain", constraintoward: "left" };
    layout["yaxis" + axis] = { ...bare, domain: y, anchor: "x" + axis, autorange: "reversed",
      scaleanchor: "x" + axis, constrain: "domain" };
    layout.annotations.push({ text: title(panel), showarrow: false, xref: "paper",
      yref: "paper", x: x[0], y: y[1], xanchor: "left", yanchor: "bottom" });
  });
  Plotly.react("maps", traces, layout, { displayModeBar: false, responsive: true });
  const facts = ["entropy " + map.entropy.toFixed(3) + " of an even spread"];
  if (map.total_variation === null) facts.push("nothing in this map is random");
  else facts.push("total variation between samples " + map.total_variation.toFixed(3),
    "mean of " + model.num_samples + " samples");
  facts.push("next item: " + (user.target_title || user.target_id));
  document.getElementById("map-facts").textContent = facts.join(" · ");
}
if (MAPS) {
  options("model", MAPS.map(model => model.label));
  chosen("model").selectedIndex = Math.max(0, MAPS.findIndex(model => model.users[0].maps[0].samples.length));
  chooseMaps();
  for (const name of ["model", "user", "block"])
    chosen(name).addEventListener("change", () => { if (name === "model") chooseMaps(); draw(); });
}
draw();
dark.addEventListener("change", draw);
"""
