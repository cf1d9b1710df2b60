// Draws the figures of a report with plotly, lets the reader choose what runs along the x axis, and copies hashes.
// Colours come from the page's own variables, so plots follow light and dark.
(() => {
  "use strict";
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const narrow = window.matchMedia("(max-width: 46rem)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const SEEN = { faint: ["accent", 0.32], ink: ["ink", 0.9], muted: ["muted", 0.9] }; // colour and opacity of a role

  function paintTrace(trace, axis) {
    const meta = trace.meta || {};
    const [name, opacity] = SEEN[meta.role] || [meta.role || "ink", meta.opacity || 1];
    const tone = colour(name);
    if (meta.x) trace.x = meta.x[axis];
    if (trace.type === "heatmap") {
      trace.colorscale = [[0, colour("card")], [1, colour("accent")]];
      return;
    }
    if (trace.error_y) trace.error_y.color = colour("muted");
    if (trace.line && trace.type !== "bar") Object.assign(trace, { opacity, line: { ...trace.line, color: tone } });
    trace.textfont = { color: tone };
    trace.marker = { ...trace.marker, color: tone };
    if (trace.marker.line && trace.type !== "bar") trace.marker.line.color = tone;
  }

  function paint() {
    const chosen = document.querySelector("input[name=axis]:checked");
    const axisStyle = {
      gridcolor: colour("grid"), linecolor: colour("rule"), zeroline: false, automargin: true,
      title: { standoff: 10, font: { size: 12, color: colour("muted") } }, tickfont: { size: 11.5, color: colour("muted") },
    };
    for (const target of document.querySelectorAll(".plot")) {
      const { data, layout } = JSON.parse(document.getElementById(target.dataset.figure).textContent);
      for (const trace of data) paintTrace(trace, chosen && chosen.value);
      if (layout.height) target.style.height = `${layout.height}px`;
      for (const name of ["xaxis", "yaxis"]) {
        layout[name] = { ...axisStyle, ...layout[name], title: { ...axisStyle.title, ...(layout[name] || {}).title } };
      }
      if (chosen && layout.meta) layout.xaxis.title.text = layout.meta.axes[chosen.value];
      for (const shape of layout.shapes || []) shape.line = { width: 1, dash: "dot", color: colour("muted") };
      for (const note of layout.annotations || []) note.font = { size: 11, color: colour("muted") };
      Plotly.react(target, data, {
        hovermode: "x unified",
        ...layout,
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
        margin: { l: 8, r: 14, t: 14, b: 8 },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colour("muted") } },
        hoverlabel: { bgcolor: colour("card"), bordercolor: colour("rule"), font: { color: colour("ink") } },
        dragmode: coarse.matches || narrow.matches ? false : "zoom",
      }, { responsive: true, displaylogo: false, displayModeBar: false });
    }
  }

  paint();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  for (const input of document.querySelectorAll("input[name=axis]")) input.addEventListener("change", paint);

  const status = document.getElementById("status");
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const selection = getSelection();
      selection.selectAllChildren(document.getElementById(button.dataset.copy));
      try {
        await navigator.clipboard.writeText(selection.toString());
        status.textContent = "Copied.";
      } catch {
        status.textContent = "Selected; copy it with the keyboard.";
      }
    });
  }
})();
