"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const settings = { logarithmic: true, intervals: true };
  const figures = [];

  // ---- colours: viridis for what has an order (layers, ranks, steps), Okabe-Ito with dashes for classes

  const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c"];
  const CLASSES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31"];
  const STYLES = [["solid", "circle"], ["dashed", "triangle"], ["dotted", "rect"], ["solid", "diamond"]];

  function ordered(place, count) {
    const at = count < 2 ? 0.35 * (VIRIDIS.length - 1) : (place / (count - 1)) * (VIRIDIS.length - 1);
    const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    const channel = (colour, from) => parseInt(colour.slice(from, from + 2), 16);
    const mix = (from) =>
      Math.round(channel(VIRIDIS[low], from) * (low + 1 - at) + channel(VIRIDIS[low + 1], from) * (at - low));
    return `rgb(${mix(1)},${mix(3)},${mix(5)})`;
  }

  // ---- numbers as people read them

  function compact(value) {
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}B`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return `${+value.toPrecision(4)}`;
  }

  function exact(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential(3) : `${+value.toPrecision(5)}`;
  }

  // The value to the second digit of its standard error.
  function withError(series, at) {
    const value = series.value[at];
    const error = series.stderr[at];
    if (value === null || error === null) return exact(value);
    const decimals = error > 0 ? 1 - Math.floor(Math.log10(error)) : 0;
    return error > 0 && decimals >= 0 && decimals <= 9
      ? `${value.toFixed(decimals)} ± ${error.toFixed(decimals)}`
      : `${exact(value)} ± ${exact(error)}`;
  }

  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // ---- the axis of steps: log(1 + step / first positive step), so that step 0 has a place

  function stepAxis(steps, width) {
    const unit = steps.find((step) => step > 0) ?? 1;
    const place = settings.logarithmic ? (step) => Math.log10(1 + step / unit) : (step) => step;
    const first = place(steps[0]);
    const range = place(steps[steps.length - 1]) - first || 1;
    const pixels = (step) => ((place(step) - first) / range) * width;
    const ticks = [];
    let limit = Infinity;
    for (const step of [...steps].reverse()) {
      // from the end, so that the last step always has its label
      const half = 3.6 * compact(step).length + 2;
      if (pixels(step) + half > limit) continue;
      ticks.push(step);
      limit = pixels(step) - half;
    }
    const labels = new Map(ticks.map((step) => [place(step), compact(step)]));
    const margin = 0.02 * range;
    return {
      place,
      axis: {
        type: "value",
        name: settings.logarithmic ? "training step (logarithmic)" : "training step",
        nameLocation: "middle",
        nameGap: 28,
        min: first - margin,
        max: first + range + margin,
        axisLine: { onZero: false },
        axisTick: { customValues: steps.map(place) },
        axisLabel: { customValues: [...labels.keys()], formatter: (value) => labels.get(value) ?? "" },
        splitLine: { show: false },
      },
    };
  }

  // Positive numbers over more than two and a half decades are compared by their ratios.
  function extent(lines) {
    let low = Infinity;
    let high = -Infinity;
    for (const line of lines) {
      for (const value of line.value) {
        if (value === null) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    return { low, high, logarithmic: low > 0 && high / low > 300 };
  }

  function valueAxis(chart, lines) {
    const { low, logarithmic } = extent(lines);
    const unit = chart.unit && chart.unit !== "1" ? chart.unit : "";
    return {
      floor: logarithmic ? low / 3 : -Infinity,
      axis: {
        type: logarithmic ? "log" : "value",
        scale: true,
        name: [unit, logarithmic ? "log scale" : ""].filter(Boolean).join(", "),
        nameTextStyle: { align: "left" },
        axisLabel: { formatter: compact },
        splitLine: { lineStyle: { color: "#e9edf2" } },
      },
    };
  }

  // ---- lines with their intervals

  // Runs of neighbouring points that have both a value and a standard error.
  function stretches(xs, line, floor) {
    const found = [[]];
    xs.forEach((x, at) => {
      if (line.value[at] === null || line.stderr[at] === null) {
        found.push([]);
        return;
      }
      const reach = 1.96 * line.stderr[at];
      found[found.length - 1].push([x, Math.max(floor, line.value[at] - reach), line.value[at] + reach]);
    });
    return found.filter((stretch) => stretch.length);
  }

  function band(name, colour, xs, line, floor) {
    const parts = stretches(xs, line, floor);
    return {
      type: "custom",
      name,
      silent: true,
      clip: true,
      z: 1,
      color: colour,
      tooltip: { show: false },
      encode: { x: 0, y: [1, 2] },
      data: parts.flat(),
      renderItem: (params, api) => {
        if (params.dataIndexInside !== 0) return null;
        const children = parts.map((part) => {
          const upper = part.map(([x, , high]) => api.coord([x, high]));
          const lower = part.map(([x, low]) => api.coord([x, low]));
          return part.length === 1
            ? { type: "line", shape: { x1: upper[0][0], y1: upper[0][1], x2: lower[0][0], y2: lower[0][1] },
                style: { stroke: colour, lineWidth: 1.5, opacity: 0.6 } }
            : { type: "polygon", shape: { points: [...upper, ...lower.reverse()] },
                style: { fill: colour, opacity: 0.16 } };
        });
        return { type: "group", children };
      },
    };
  }

  function drawn(lines, xs, colours, styles, floor) {
    return lines.flatMap((line, place) => [
      {
        type: "line",
        name: line.name,
        color: colours[place],
        data: xs.map((x, at) => [x, line.value[at]]),
        symbol: styles[place][1],
        symbolSize: styles[place][1] === "circle" ? 5 : 7,
        lineStyle: { width: 1.8, type: styles[place][0] },
        emphasis: { focus: "series" },
        z: 3,
      },
      ...(settings.intervals && line.stderr.some((error) => error !== null)
        ? [band(line.name, colours[place], xs, line, floor)]
        : []),
    ]);
  }

  // Room for the legend, by its longest entry.
  function legendWidth(lines) {
    return lines.length > 1 ? 44 + Math.min(86, 7 * Math.max(...lines.map((line) => line.name.length))) : 20;
  }

  function frame(lines) {
    return {
      animation: false,
      textStyle: { fontFamily: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif" },
      aria: { enabled: true },
      grid: { left: 62, right: legendWidth(lines), top: 30, bottom: 46 },
      legend: lines.length > 1
        ? { type: "scroll", orient: "vertical", right: 0, top: 18, bottom: 10, itemWidth: 22, itemHeight: 9,
            data: lines.map((line) => line.name), textStyle: { width: 86, overflow: "truncate", fontSize: 12 },
            tooltip: { show: true } }
        : { show: false },
    };
  }

  function tooltip(heading, lines, index) {
    return {
      trigger: "axis",
      confine: true,
      order: "valueDesc",
      formatter: (items) => {
        const seen = items.filter((item) => item.seriesType === "line");
        if (!seen.length) return "";
        const at = index(seen[0].dataIndex);
        const rows = seen.slice(0, 24).map((item) => {
          const line = lines.find((candidate) => candidate.name === item.seriesName);
          return `${item.marker}${escaped(item.seriesName)}: <b>${withError(line, item.dataIndex)}</b>`;
        });
        const n = lines.find((line) => line.name === seen[0].seriesName).n[seen[0].dataIndex];
        if (seen.length === 1 && n !== null) rows.push(`n = ${n.toLocaleString("en")}`);
        return [`<b>${heading(at)}</b>`, ...rows].join("<br>");
      },
    };
  }

  // ---- one figure: a chart, its views, its table

  const layerName = (layer) => (layer === null ? "model" : `layer ${layer}`);

  class Figure {
    constructor(chart, parent) {
      this.chart = chart;
      this.layers = [...new Set(chart.series.map((series) => series.layer))].sort((a, b) => a - b);
      this.layered = this.layers.length > 1;
      this.layer = this.layers[this.layers.length - 1];
      this.views = [];
      if (chart.steps.length > 1) this.views.push(["steps", "over steps"]);
      if (this.layered && !chart.labelled) this.views.push(["layers", "over layers"]);
      if (chart.steps.length > 1 && (chart.labelled ? chart.series.length > 2 : this.layered)) {
        this.views.push(["map", "map"]);
      }
      if (!this.views.length) this.views.push(["steps", "over steps"]);
      this.view = this.views[0][0];
      this.build(parent);
    }

    build(parent) {
      const { chart } = this;
      const component = chart.component === "all" ? null : chart.component;
      const where = [chart.task && `task ${chart.task}`, component].filter(Boolean).join(", ");
      const unit = chart.unit && chart.unit !== "1" ? ` [${chart.unit}]` : "";
      this.plot = element("div", { class: "plot", role: "img", "aria-label": `${chart.metric} ${where}` });
      this.tools = element("div", { class: "tools" });
      for (const [view, title] of this.views.length > 1 ? this.views : []) {
        const button = element("button", { type: "button", "aria-pressed": String(view === this.view) }, title);
        button.addEventListener("click", () => {
          this.view = view;
          for (const other of this.tools.querySelectorAll("button[aria-pressed]")) {
            other.setAttribute("aria-pressed", String(other === button));
          }
          this.draw();
        });
        this.tools.append(button);
      }
      if (chart.labelled && this.layered) {
        const select = element("select", { "aria-label": "layer" });
        for (const layer of this.layers) select.append(element("option", { value: String(layer) }, layerName(layer)));
        select.value = String(this.layer);
        select.addEventListener("change", () => {
          this.layer = Number(select.value);
          this.draw();
        });
        this.tools.append(select);
      }
      const svg = element("button", { type: "button" }, "save SVG");
      svg.addEventListener("click", () => this.save(this.drawing.renderToSVGString(), "image/svg+xml", "svg"));
      const csv = element("button", { type: "button" }, "save CSV");
      csv.addEventListener("click", () => this.save(this.csv(), "text/csv", "csv"));
      this.tools.append(svg, csv);
      const numbers = element("details", {}, element("summary", {}, "Numbers"));
      numbers.addEventListener("toggle", () => {
        if (numbers.open && numbers.children.length === 1) numbers.append(this.table());
      });
      parent.append(
        element(
          "figure",
          {},
          element(
            "figcaption",
            {},
            element("strong", {}, `${chart.metric}${unit}`),
            element("span", { class: "where" }, where ? `  ${where}` : ""),
            element("div", { class: "meaning" }, chart.meaning),
          ),
          this.plot,
          this.tools,
          numbers,
        ),
      );
    }

    // The series of the current view, with names and colours.
    lines() {
      const { chart } = this;
      const chosen = chart.labelled && this.layered
        ? chart.series.filter((series) => series.layer === this.layer)
        : chart.series;
      const isRank = (series) => chart.labelled && /^\d+$/.test(series.label);
      const ranks = chosen.filter(isRank);
      const lines = chosen.map((series) => ({
        ...series,
        name: chart.labelled ? (isRank(series) ? `rank ${series.label}` : series.label) : layerName(series.layer),
      }));
      // Layers and ranks have an order (what has no rank comes after those that do); classes have none.
      const scale = chart.labelled ? ranks : lines;
      const inOrder = (at) => at < scale.length;
      const other = (at) => at - scale.length + (chart.labelled && ranks.length ? 1 : 0);
      return {
        lines,
        colours: lines.map((_, at) => (inOrder(at) ? ordered(at, scale.length) : CLASSES[other(at) % CLASSES.length])),
        styles: lines.map((_, at) => STYLES[inOrder(at) ? 0 : Math.floor(other(at) / CLASSES.length) % STYLES.length]),
      };
    }

    overSteps() {
      const { chart } = this;
      const { lines, colours, styles } = this.lines();
      const { place, axis } = stepAxis(chart.steps, this.plot.clientWidth - 62 - legendWidth(lines));
      const scale = valueAxis(chart, lines);
      const heading = (at) =>
        `step ${chart.steps[at].toLocaleString("en")}` +
        (chart.tokens && chart.tokens[at] !== null ? ` (${compact(chart.tokens[at])} tokens)` : "");
      return {
        ...frame(lines),
        tooltip: tooltip(heading, lines, (at) => at),
        xAxis: axis,
        yAxis: scale.axis,
        series: drawn(lines, chart.steps.map(place), colours, styles, scale.floor),
      };
    }

    // Profiles: one line for each of up to eight steps, evenly chosen along the axis of steps.
    overLayers() {
      const { chart } = this;
      const count = Math.min(8, chart.steps.length);
      const chosen = [
        ...new Set(
          Array.from({ length: count }, (_, i) => Math.round((i * (chart.steps.length - 1)) / Math.max(1, count - 1))),
        ),
      ];
      const lines = chosen.map((at) => ({
        name: `step ${compact(chart.steps[at])}`,
        value: chart.series.map((series) => series.value[at]),
        stderr: chart.series.map((series) => series.stderr[at]),
        n: chart.series.map((series) => series.n[at]),
      }));
      const xs = chart.series.map((series) => series.layer);
      const scale = valueAxis(chart, lines);
      return {
        ...frame(lines),
        tooltip: tooltip((at) => layerName(xs[at]), lines, (at) => at),
        xAxis: { type: "value", name: "layer", nameLocation: "middle", nameGap: 28, min: Math.min(...xs),
          max: Math.max(...xs), minInterval: 1, axisLine: { onZero: false }, splitLine: { show: false } },
        yAxis: scale.axis,
        series: drawn(lines, xs, lines.map((_, at) => ordered(at, lines.length)), lines.map(() => STYLES[0]),
          scale.floor),
      };
    }

    map() {
      const { chart } = this;
      const { lines } = this.lines();
      const { low, high, logarithmic } = extent(lines);
      const scaled = (value) => (logarithmic ? Math.log10(value) : value);
      const cells = lines.flatMap((line, row) =>
        line.value.flatMap((value, at) => (value === null ? [] : [[at, row, scaled(value)]])));
      return {
        ...frame([]),
        grid: { left: chart.labelled ? 96 : 62, right: 86, top: 30, bottom: 46 },
        tooltip: {
          confine: true,
          formatter: ({ data: [at, row] }) =>
            `<b>step ${chart.steps[at].toLocaleString("en")}, ${escaped(lines[row].name)}</b><br>` +
            withError(lines[row], at),
        },
        xAxis: { type: "category", data: chart.steps.map(compact), name: "training step", nameLocation: "middle",
          nameGap: 28, axisTick: { alignWithLabel: true } },
        yAxis: { type: "category", data: lines.map((line) => line.name), axisLabel: { width: 84, overflow: "truncate" } },
        visualMap: { min: scaled(low), max: scaled(high), calculable: false, hoverLink: false, orient: "vertical", right: 8,
          top: "middle", itemHeight: 170, itemWidth: 14, text: [compact(high), compact(low)],
          inRange: { color: [...VIRIDIS, "#fde725"] } },
        series: [{ type: "heatmap", data: cells, itemStyle: { borderColor: "#fff", borderWidth: 0.5 } }],
      };
    }

    draw() {
      this.drawing ??= echarts.init(this.plot, null, { renderer: "svg" });
      const option = { steps: () => this.overSteps(), layers: () => this.overLayers(), map: () => this.map() };
      this.drawing.setOption(option[this.view](), true);
    }

    table() {
      const { chart } = this;
      const head = element("tr", {}, element("th", {}, "step"));
      const named = chart.series.map((series) =>
        [series.label, series.layer === null ? null : layerName(series.layer)].filter((part) => part !== null).join(", "));
      for (const name of named) head.append(element("th", {}, name || "value"));
      const body = element("tbody");
      chart.steps.forEach((step, at) => {
        const row = element("tr", {}, element("td", {}, step.toLocaleString("en")));
        for (const series of chart.series) row.append(element("td", {}, withError(series, at)));
        body.append(row);
      });
      return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), body));
    }

    csv() {
      const { chart } = this;
      const cell = (value) => (value === null || value === undefined ? "" : /[",\n]/.test(String(value))
        ? `"${String(value).replaceAll('"', '""')}"` : String(value));
      const rows = [["step", "task", "component", "layer", "label", "metric", "value", "stderr", "n"]];
      for (const series of chart.series) {
        chart.steps.forEach((step, at) => rows.push([step, chart.task, chart.component, series.layer, series.label,
          chart.metric, series.value[at], series.stderr[at], series.n[at]]));
      }
      return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
    }

    save(text, type, suffix) {
      const { chart } = this;
      const name = [chart.analyzer, chart.metric, chart.task, chart.component].filter(Boolean).join("-");
      const link = element("a", {
        href: URL.createObjectURL(new Blob([text], { type })),
        download: `${name.replace(/[^\w.-]+/g, "_")}.${suffix}`,
      });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }
  }

  // ---- the page: charts that change first, constants behind a fold; drawn when they come into view

  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (!isIntersecting) continue;
        const figure = figures.find((candidate) => candidate.plot === target);
        watcher.unobserve(target);
        figure.draw();
      }
    },
    { rootMargin: "500px" },
  );

  data.sections.forEach((section, at) => {
    const grid = document.querySelector(`#section-${at} .grid`);
    const moving = section.charts.filter((chart) => !chart.constant);
    const constant = section.charts.filter((chart) => chart.constant);
    const tasks = new Set(moving.map((chart) => chart.task)).size > 1;
    const place = (charts, parent) => {
      let task = null;
      for (const chart of charts) {
        if (tasks && chart.task && chart.task !== task) {
          task = chart.task;
          parent.append(element("h3", {}, `Task ${task}${chart.labelled ? ", by class" : ""}`));
        }
        const figure = new Figure({ ...chart, analyzer: section.analyzer }, parent);
        figures.push(figure);
      }
    };
    place(moving.filter((chart) => !chart.labelled), grid);
    const labelled = moving.filter((chart) => chart.labelled);
    if (!tasks && labelled.length && labelled.length < moving.length) grid.append(element("h3", {}, "By class or rank"));
    place(labelled, grid);
    if (constant.length) {
      const fold = element(
        "details",
        {},
        element("summary", {}, `Constant over all steps: ${[...new Set(constant.map((c) => c.metric))].join(", ")}`),
        element("div", { class: "grid" }),
      );
      grid.append(fold);
      place(constant, fold.lastChild);
    }
  });

  document.querySelector(".controls").hidden = false;
  // Measure all before drawing any: a chart does not change the height of the page.
  const near = figures.map(({ plot }) => !plot.closest("details:not([open])") && plot.getBoundingClientRect().top < innerHeight + 500);
  figures.forEach((figure, at) => (near[at] ? figure.draw() : watcher.observe(figure.plot)));
  for (const name of Object.keys(settings)) {
    document.getElementById(name).addEventListener("change", (event) => {
      settings[name] = event.target.checked;
      for (const figure of figures) if (figure.drawing) figure.draw();
    });
  }
  let waiting = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => figures.forEach((figure) => {
      if (!figure.drawing) return;
      figure.drawing.resize();
      figure.draw();
    }));
  });
  addEventListener("beforeprint", () => figures.forEach((figure) => figure.plot.closest("details:not([open])") || figure.draw()));
})();
