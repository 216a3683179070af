// The time slider: four figures that show one step, redrawn as the slider moves.
(() => {
  const source = document.getElementById("explorer-data");
  if (!source) return;
  const data = JSON.parse(source.textContent), $ = (name) => document.getElementById("explorer-" + name);
  const slider = $("step"), picker = $("instance"), play = $("play"), now = $("now"), marks = $("marks");
  const N = data.features, R = data.rank, still = {...pageOptions, displayModeBar: false};
  const decoded = new Map();
  const bytes = (text) => {
    if (!decoded.has(text)) decoded.set(text, new Int8Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
    return decoded.get(text);
  };
  const matrix = (text, frame, rows, columns) => {
    const all = bytes(text), start = frame * rows * columns;
    return Array.from({length: rows}, (_, i) => Array.from({length: columns}, (_, j) => {
      const value = all[start + i * columns + j];
      return value === -128 ? null : value / 127;
    }));
  };
  const few = data.attended.length <= 6;
  const names = Array.from({length: N}, (_, i) => data.attended.includes(i) ? `<b>${i}</b>` : `${i}`);
  const ticks = (n, text) => {
    const every = Math.ceil(n / 10), named = text && few && n <= 40; // else names would lie over each other
    const at = [...Array(n).keys()].filter((k) => k % every === 0 || named && data.attended.includes(k));
    return {tickvals: at, ticktext: at.map((k) => text ? names[k] : k + 1)};
  };
  const heat = (id, title, across, signed, columns) => Plotly.newPlot("explorer-" + id, [{
    type: "heatmap", z: [[0]], zmin: signed ? -1 : 0, zmax: 1, zauto: false,
    colorscale: signed ? "RdBu" : "Cividis", reversescale: signed, colorbar: {thickness: 10, len: 0.9},
    hovertemplate: `feature %{y}, ${signed ? "feature" : "singular vector"} %{x}: %{z:.2f}<extra></extra>`,
  }], {
    template: pageLook(), title: {text: title, font: {size: 14}}, height: 340, margin: {l: 45, r: 10, t: 40, b: 45},
    xaxis: {title: {text: across}, ...ticks(columns, signed), constrain: "domain"},
    yaxis: {title: {text: "feature"}, autorange: "reversed", ...ticks(N, true)},
  }, still);
  const drawn = [];
  if (R) {
    heat("left", "left singular vectors, |cosine|", "singular index", false, R);
    heat("right", "right singular vectors, |cosine|", "singular index", false, R);
    drawn.push("left", "right");
  }
  heat("gram", "Gram matrix W<sup>T</sup>W, relative to its largest entry", "feature", true, N);
  const plane = data.pair ? [`along feature ${data.pair[0]}`, `rest of feature ${data.pair[1]}`] : ["dimension 1", "dimension 2"];
  Plotly.newPlot("explorer-plane", [
    {type: "scatter", mode: "lines", x: [], y: [], line: {color: "#8C8C8C", width: 1}, hoverinfo: "skip", showlegend: false},
    {type: "scatter", mode: "markers+text", x: [], y: [], text: [], textposition: "top center", showlegend: false,
      marker: {size: 9, color: Array.from({length: N}, (_, i) => data.attended.includes(i) ? "#D55E00" : "#0072B2")},
      hovertemplate: "feature %{customdata}<extra></extra>", customdata: [...Array(N).keys()]},
  ], {
    template: pageLook(), height: 340, margin: {l: 50, r: 10, t: 40, b: 45},
    title: {text: data.pair ? "features in the plane of the attended pair" : "features", font: {size: 14}},
    xaxis: {title: {text: plane[0]}, range: [-1.3, 1.3], zeroline: true},
    yaxis: {title: {text: plane[1]}, range: [-1.3, 1.3], zeroline: true, scaleanchor: "x"},
  }, still);
  drawn.push("gram", "plane");

  let timer = null;
  const show = () => {
    const frame = Number(slider.value), own = data.instances[Number(picker ? picker.value : 0)], step = data.steps[frame];
    if (R) for (const side of ["left", "right"]) Plotly.restyle("explorer-" + side, {z: [matrix(own[side], frame, N, R)]});
    Plotly.restyle("explorer-gram", {z: [matrix(own.gram, frame, N, N)]});
    const [x, y] = matrix(own.plane, frame, 2, N), line = (v) => v.flatMap((value) => [0, value, null]);
    Plotly.restyle("explorer-plane", {x: [line(x), x], y: [line(y), y], text: [[], names.map((name, i) => few && data.attended.includes(i) || N <= 12 ? name : "")]}, [0, 1]);
    const past = own.moments.filter(([at]) => at <= step).map(([, words]) => words);
    const text = `step ${step.toLocaleString("en")}` + (past.length ? `: ${past.join("; ")}` : "");
    now.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
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
    for (const [step, words] of data.instances[Number(picker ? picker.value : 0)].moments) {
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
  };
  slider.addEventListener("input", () => { stop(); show(); });
  if (picker) picker.addEventListener("change", () => { list(); show(); });
  pageDark.addEventListener("change", () => { for (const id of drawn) Plotly.relayout("explorer-" + id, {template: pageLook()}); });
  list();
  slider.value = data.steps.length - 1;
  show();
})();
