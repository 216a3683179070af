// The time slider: pictures of one step, redrawn as the slider moves.
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const $ = (name) => document.getElementById("explorer-" + name);
  const slider = $("step"), picker = $("place"), play = $("play"), now = $("now"), marks = $("marks");
  const attended = (feature) => data.attended.includes(feature), few = data.is_named;
  const blue = "#0072B2", vermillion = "#D55E00", grey = "#8C8C8C";

  const decoded = new Map();
  const bytes = (text) => {
    if (!decoded.has(text)) decoded.set(text, new Int8Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
    return decoded.get(text);
  };
  // the numbers of one frame: rows of columns, or one row
  const matrix = ({values, scale}, frame, [rows, columns]) => {
    const all = bytes(values), start = frame * rows * columns;
    return Array.from({length: rows}, (_, i) => Array.from({length: columns}, (_, j) => {
      const value = all[start + i * columns + j];
      return value === -128 ? null : value / 127 * scale;
    }));
  };
  const name = (feature) => attended(feature) ? `<b>${feature}</b>` : `${feature}`;
  // about ten labels; of features, the attended ones too, unless names would lie over each other
  const ticks = (cell, axis) => {
    const n = cell.sizes[axis], every = Math.ceil(n / 10), named = cell.features[axis] && few && n <= 40;
    const at = [...Array(n).keys()].filter((k) => k % every === 0 || named && attended(k));
    return {tickvals: at, ticktext: at.map((k) => cell.features[axis] ? name(k) : `${k + cell.counted_from[axis]}`)};
  };
  const shape = (cell) => cell.kind === "plane" ? [2, cell.sizes[1]] : cell.kind === "bars" ? [1, cell.sizes[0]] : cell.sizes;
  const largest = (cell, i) => Math.max(...data.places.map((place) => place.cells[i].scale));

  const draw = (cell, i) => {
    const layout = {template: pageLook(), title: {text: asText(cell.title), font: {size: 14}}, height: 340, margin: {l: 50, r: 10, t: 40, b: 45}};
    let traces;
    const dims = cell.dims.map(asText);
    if (cell.kind === "heat") {
      const limit = largest(cell, i);
      traces = [{
        type: "heatmap", z: [[0]], zmin: cell.signed ? -limit : 0, zmax: limit, zauto: false,
        colorscale: cell.signed ? "RdBu" : "Cividis", reversescale: cell.signed, colorbar: {thickness: 10, len: 0.9},
        hovertemplate: `${dims[0]} %{y}, ${dims[1]} %{x}: %{z:.2f}<extra></extra>`,
      }];
      layout.xaxis = {title: {text: dims[1]}, ...ticks(cell, 1), constrain: "domain"};
      layout.yaxis = {title: {text: dims[0]}, autorange: "reversed", ...ticks(cell, 0)};
    } else if (cell.kind === "bars") {
      const limit = 1.05 * largest(cell, i);
      traces = [{type: "bar", y: [0], marker: {color: blue}, hovertemplate: `${dims[0]} %{x}: %{y:.3f}<extra></extra>`}];
      layout.xaxis = {title: {text: dims[0]}, ...ticks(cell, 0)};
      layout.yaxis = {range: [cell.signed ? -limit : 0, limit]};
    } else {
      const features = [...Array(cell.sizes[1]).keys()], limit = 1.3 * largest(cell, i);
      traces = [
        {type: "scatter", mode: "lines", x: [], y: [], line: {color: grey, width: 1}, hoverinfo: "skip", showlegend: false},
        {type: "scatter", mode: "markers+text", x: [], y: [], textposition: "top center", showlegend: false, customdata: features,
          text: features.map((k) => few && attended(k) || features.length <= 12 ? name(k) : ""),
          marker: {size: 9, color: features.map((k) => attended(k) ? vermillion : blue)}, hovertemplate: "feature %{customdata}<extra></extra>"},
      ];
      if (data.pair) layout.title.text = "features in the plane of " + (data.attended.length ? "an attended pair" : "two of them");
      const axes = data.pair ? [`along feature ${data.pair[0]}`, `rest of feature ${data.pair[1]}`] : ["dimension 1", "dimension 2"];
      layout.xaxis = {title: {text: axes[0]}, range: [-limit, limit], zeroline: true};
      layout.yaxis = {title: {text: axes[1]}, range: [-limit, limit], zeroline: true, scaleanchor: "x"};
    }
    Plotly.newPlot("explorer-" + i, traces, layout, {...pageOptions, displayModeBar: false});
  };
  data.cells.forEach(draw);

  const place = () => data.places[Number(picker ? picker.value : 0)];
  const show = () => {
    const frame = Number(slider.value), step = data.steps[frame];
    let hasNumbers = false;
    data.cells.forEach((cell, i) => {
      const values = matrix(place().cells[i], frame, shape(cell)), id = "explorer-" + i;
      hasNumbers ||= values.some((row) => row.some((value) => value !== null));
      if (cell.kind === "heat") Plotly.restyle(id, {z: [values]});
      else if (cell.kind === "bars") Plotly.restyle(id, {y: [values[0]]});
      else {
        const line = (v) => v.flatMap((value) => [0, value, null]);
        Plotly.restyle(id, {x: [line(values[0]), values[0]], y: [line(values[1]), values[1]]}, [0, 1]);
      }
    });
    const past = place().moments.filter(([at]) => at <= step).map(([, words]) => words);
    const told = hasNumbers ? past : [...past, "no number was measured"];
    const text = `step ${step.toLocaleString("en")}` + (told.length ? `: ${told.join("; ")}` : "");
    now.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; play.setAttribute("aria-pressed", "false"); };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === data.steps.length - 1) slider.value = 0;
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      if (Number(slider.value) === data.steps.length - 1) return stop();
      slider.value = Number(slider.value) + 1;
      show();
    }, 150);
  });
  const list = () => {
    marks.replaceChildren();
    for (const [step, words] of place().moments) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `step ${step.toLocaleString("en")}: ${words}`;
      button.addEventListener("click", () => {
        stop();
        slider.value = data.steps.findIndex((at) => at >= step);
        show();
      });
      marks.append(button);
    }
    for (const words of place().absent) {
      const text = document.createElement("span");
      text.textContent = words;
      marks.append(text);
    }
  };
  slider.addEventListener("input", () => { stop(); show(); });
  if (picker) picker.addEventListener("change", () => { list(); show(); });
  pageDark.addEventListener("change", () => data.cells.forEach((_, i) => Plotly.relayout("explorer-" + i, {template: pageLook()})));
  list();
  slider.value = data.steps.length - 1;
  show();
})();
