// Draws the figures of a report when they come near the window; its buttons choose x axis, scale and smoothing.
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const view = { x: "step", y: "auto", mean: "on" };
  const own = {}; // figure: a scale that its own button chose
  const drawn = new Set();
  const touch = window.matchMedia("(hover: none)").matches; // where the tools would always lie over the figure
  const config = {
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
    modeBarButtons: [["toImage", "pan2d", "zoom2d", "resetScale2d"]],
  };

  // a figure keeps to its card, whatever made that narrower or wider
  const sizes = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const place = entry.target;
      if (place._fullLayout && Math.abs(place._fullLayout.width - place.clientWidth) > 1) Plotly.Plots.resize(place);
    }
  });

  function isLog(id) {
    if (own[id] !== undefined) return own[id];
    return view.y === "auto" ? data.figures[id].log : view.y === "log";
  }

  function xOf(meta) {
    return view.x === "tokens" && meta.tokens ? meta.tokens : meta.step;
  }

  function parts(id) {
    const figure = data.figures[id];
    const traces = figure.traces.map((trace) => {
      const copy = Object.assign({}, trace);
      if (figure.training) copy.x = xOf(trace.meta);
      if (trace.meta && trace.meta.role === "mean") copy.visible = view.mean === "on";
      if (trace.showlegend === false && view.mean === "off") Object.assign(copy, { opacity: 1, showlegend: true });
      return copy;
    });
    const layout = Object.assign({}, figure.layout, { autosize: true, uirevision: view.x + isLog(id) });
    layout.xaxis = Object.assign({}, layout.xaxis);
    layout.yaxis = Object.assign({}, layout.yaxis);
    if (isLog(id) !== figure.log) {
      layout.yaxis.type = isLog(id) ? "log" : "linear";
      delete layout.yaxis.dtick;
      delete layout.yaxis.range;
    }
    if (figure.training) {
      layout.xaxis.title = { text: view.x === "tokens" ? "tokens trained on" : "step", standoff: 6 };
      layout.shapes = data.borders.map((border) => ({
        type: "line", xref: "x", yref: "paper", x0: border[view.x], x1: border[view.x], y0: 0, y1: 1,
        line: { color: "#8b949e", width: 1, dash: "dot" }, layer: "below",
      }));
      layout.annotations = data.borders.map((border) => ({
        text: border.stage, xref: "x", yref: "paper", x: border[view.x], y: 1, xanchor: "left", yanchor: "bottom",
        showarrow: false, font: { size: 10, color: "#59636e" },
      }));
    }
    return [traces, layout];
  }

  function draw(place) {
    const id = place.id;
    const [traces, layout] = parts(id);
    const button = place.parentNode.querySelector(".log");
    if (button) button.setAttribute("aria-pressed", String(isLog(id)));
    if (!drawn.has(place)) sizes.observe(place);
    drawn.add(place);
    Plotly.react(place, traces, layout, config);
  }

  const places = Array.from(document.querySelectorAll(".plot"));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "800px" });
  places.forEach((place) => watcher.observe(place));
  window.addEventListener("beforeprint", () => places.filter((place) => !drawn.has(place)).forEach(draw));

  document.querySelectorAll(".pick button").forEach((button) => {
    button.addEventListener("click", () => {
      const kind = button.parentNode.dataset.kind;
      view[kind] = button.value;
      if (kind === "y") Object.keys(own).forEach((id) => delete own[id]);
      for (const each of button.parentNode.children) each.setAttribute("aria-pressed", String(each === button));
      drawn.forEach(draw);
    });
  });
  document.querySelectorAll("figcaption .log").forEach((button) => {
    const place = button.closest("figure").querySelector(".plot");
    button.addEventListener("click", () => {
      own[place.id] = !isLog(place.id);
      draw(place);
    });
  });
  document.querySelectorAll("figcaption .enlarge").forEach((button) => {
    const figure = button.closest("figure");
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(figure.classList.toggle("large")));
      draw(figure.querySelector(".plot"));
      Plotly.Plots.resize(figure.querySelector(".plot"));
    });
  });
})();
