// The head picker: attention and relative score of one head over the words of one prompt.
(() => {
  const data = JSON.parse(document.getElementById("words-data").textContent), $ = (name) => document.getElementById("words-" + name);
  const pickHead = $("head"), pickPrompt = $("prompt"), slider = $("checkpoint");
  const P = data.prompts.length, W = data.words, T = data.top;
  const colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"];
  const decoded = new Map();
  const numbers = (text) => {
    if (!decoded.has(text)) decoded.set(text, new Int16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
    return decoded.get(text);
  };
  const part = (text, at, size, scale) =>
    Array.from(numbers(text).slice(at * size, (at + 1) * size), (value) => value === -32768 ? null : value * scale);
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

  const show = () => {
    const head = Number(pickHead.value), p = Number(pickPrompt.value), prompt = data.prompts[p], n = prompt.words.length;
    const checkpoint = data.checkpoints[slider ? Number(slider.value) : 0], at = head * P + p;
    const attention = part(checkpoint.attention, at, W, 1 / 32767).slice(0, n);
    const relative = part(checkpoint.relative, at, W, checkpoint.scale).slice(0, n);
    const top = part(checkpoint.contributions, at, W * T, checkpoint.scale);
    const index = Array.from(numbers(checkpoint.index).slice(at * T, (at + 1) * T));
    const name = `L${Math.floor(head / data.heads)}H${head % data.heads}`;

    $("text").replaceChildren(...prompt.words.flatMap((word, i) => {
      const mark = document.createElement("span");
      mark.textContent = word;
      mark.className = "word" + (i === prompt.key ? " key" : "") + (i === prompt.query ? " query" : "");
      mark.style.setProperty("--weight", `${Math.round(60 * (attention[i] || 0))}%`);
      mark.title = attention[i] === null ? "not seen" : `attention ${attention[i].toFixed(3)}`;
      return prompt.joined[i] ? [mark] : [" ", mark];
    }));

    const x = [...Array(n).keys()], own = index.map((k, t) => x.map((i) => top[i * T + t])).filter((_, t) => index[t] >= 0);
    const rest = relative.map((sum, i) => sum === null ? null : own.reduce((left, values) => left - values[i], sum));
    const labels = prompt.words.map((word, i) => asText(word) + (i === prompt.key ? " (key)" : i === prompt.query ? " (query)" : ""));
    const bar = {type: "bar", x, customdata: labels};
    const traces = [
      {...bar, y: attention, yaxis: "y2", name: "attention weight", showlegend: false, marker: {color: "#8C8C8C"},
        hovertemplate: "%{customdata}: attention %{y:.3f}<extra></extra>"},
      ...own.map((values, t) => ({...bar, y: values, name: `pair ${index[t] + 1}`, marker: {color: colours[t % colours.length]},
        hovertemplate: `%{customdata}: pair ${index[t] + 1} %{y:.3f} nats<extra></extra>`})),
      {...bar, y: rest, name: "all other pairs", marker: {color: "#8C8C8C"},
        hovertemplate: "%{customdata}: all other pairs %{y:.3f} nats<extra></extra>"},
      {type: "scatter", mode: "markers", x, y: relative, customdata: labels, name: "sum",
        marker: {symbol: "diamond-open", size: 9, color: pageLook().layout.font.color, line: {width: 2}},
        hovertemplate: "%{customdata}: relative score %{y:.3f} nats<extra></extra>"},
    ];
    Plotly.react("words-figure", traces, {
      template: pageLook(), barmode: "relative", height: 460, margin: {l: 70, r: 20, t: 40, b: 90}, bargap: 0.25,
      legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom"}, modebar: {orientation: "v"},
      xaxis: {tickvals: x, ticktext: labels, tickangle: -45, anchor: "y", range: [-0.6, n - 0.4]},
      yaxis: {domain: [0, 0.66], title: {text: "relative score (nats)"}, zeroline: true},
      yaxis2: {domain: [0.74, 1], title: {text: "attention"}, range: [0, 1.03], nticks: 3},
    }, pageOptions);

    const atKey = relative[prompt.key], word = `“${prompt.words[prompt.key]}”`;
    let text = `${name}, ${checkpoint.name}: `;
    if (atKey === null) text += `the head does not compare ${word} with other words.`;
    else {
      const made = own.map((values, t) => `pair ${index[t] + 1} ${signed(values[prompt.key])}`);
      text += `attention ${attention[prompt.key].toFixed(2)} on ${word}, whose score is ${Math.abs(atKey).toFixed(2)} nats ` +
        `${atKey < 0 ? "below" : "above"} the mean of the other words: ${made.join(", ")}, all others ${signed(rest[prompt.key])}.`;
    }
    $("now").textContent = text;
    if (slider) slider.setAttribute("aria-valuetext", checkpoint.name);
  };
  for (const control of [pickHead, pickPrompt]) control.addEventListener("change", show);
  if (slider) slider.addEventListener("input", show);
  pageDark.addEventListener("change", show);
  show();
})();
